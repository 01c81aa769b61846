from __future__ import annotations

import subprocess
import sys
import time

import psutil
import pytest

from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.throttle import enter, slowed


def test_a_running_process_gets_no_more_than_its_share_and_the_group_is_removed() -> None:
    try:
        with slowed(0.1) as group:
            with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
                enter(group, [busy.pid, 2**22 + 1])  # one that has ended is passed over
                before, start = psutil.Process(busy.pid).cpu_times().user, time.monotonic()
                time.sleep(0.8)
                share = (psutil.Process(busy.pid).cpu_times().user - before) / (time.monotonic() - start)
                busy.kill()
            assert share < 0.2
    except DeviceError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    assert not group.exists()
