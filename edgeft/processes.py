"""Several processes of one `accelerate launch`: the first writes what is finished, the others wait for its files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

WAIT_S = 0.2  # between two looks


def is_helper() -> bool:
    """Whether this is one of several processes that `accelerate launch` started, and not the first of them."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and int(os.environ.get("RANK", "0")) > 0


def wait_until(done: Callable[[], bool]) -> None:
    """Return when the first process has done its part; if it fails, the launcher ends this one."""
    while not done():
        time.sleep(WAIT_S)
