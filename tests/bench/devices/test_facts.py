"""What a board tells of itself, from what its kernel writes into /proc and /sys, and what follows for a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edgeft.bench.devices import scan
from edgeft.bench.devices.cooling import cooled, heat_marks, state_marks
from edgeft.bench.devices.device import DEVICES, DeviceError, DeviceLost, opened
from edgeft.bench.devices.linux import facts_of, sections_of
from edgeft.bench.devices.measure import big_cores, chosen_cpus, default_threads
from edgeft.bench.devices.scan import phones_in, ssh_hosts
from edgeft.progress import Reporter

CORES = [("0xd05", 1800000)] * 4 + [("0xd0b", 2400000)] * 2  # a Rock 4's or a phone's two kinds
LINES = [
    "@ machine", "aarch64",
    "@ disk", "Filesystem 1024-blocks Used Available Capacity Mounted on", "/dev/root 30000000 1 2000000 1% /",
    "@ model", "Rock Pi 4B\0",
    "@ meminfo", "MemTotal:        4000000 kB", "MemAvailable:    3000000 kB",
    "@ loadavg", "0.10 0.20 0.30 1/100 4242",
    "@ cpuinfo",
    *(line for n, (part, _) in enumerate(CORES)
      for line in (f"processor\t: {n}", "Features\t: fp asimd asimddp", f"CPU part\t: {part}", "")),
    *(line for n, (_, khz) in enumerate(CORES)
      for line in (f"@ cpu{n} cpuinfo_max_freq", str(khz), f"@ cpu{n} scaling_cur_freq", str(khz // 2),
                   f"@ cpu{n} scaling_governor", "schedutil")),
    "@ zone 0 type", "cpu-thermal", "@ zone 0 temp", "66500", "@ zone 1 type", "broken", "@ zone 1 temp", "-274000",
    "@ end",
]  # fmt: skip


def test_a_boards_clusters_heat_and_memory_are_read() -> None:
    facts = facts_of(sections_of(LINES))
    assert facts["model"] == "Rock Pi 4B" and facts["machine"] == "aarch64"
    assert [(c["cpus"], c["max_mhz"], c["part"]) for c in facts["clusters"]] == [
        ([0, 1, 2, 3], 1800.0, "0xd05"), ([4, 5], 2400.0, "0xd0b")
    ]  # fmt: skip
    assert (facts["frequency_mhz"], facts["governor"]) == (1200.0, "schedutil")
    assert facts["thermal"]["zones"] == {"cpu-thermal": 66.5} and facts["temperature_c"] == 66.5
    assert (facts["ram_bytes"], facts["disk_free_bytes"]) == (4_096_000_000, 2_048_000_000)
    assert "asimddp" in facts["cpu_features"]
    assert facts["battery"] is None and facts["absent"]["battery"] == "no battery is readable"


def test_threads_and_cores_are_those_of_the_big_cluster_unless_named() -> None:
    facts = facts_of(sections_of(LINES))
    assert big_cores(facts) == [4, 5] and default_threads(facts) == 2
    assert chosen_cpus(None, facts) is None and chosen_cpus("big", facts) == [4, 5]
    assert chosen_cpus("0,4-5", facts) == [0, 4, 5]
    for wrong in ("6", "big-ones", "4-", ""):
        with pytest.raises(DeviceError, match="cpus"):
            chosen_cpus(wrong, facts)


def test_big_cores_of_a_target_that_tells_no_kinds_are_an_error() -> None:
    with pytest.raises(DeviceError, match="does not tell its kinds of cores"):
        chosen_cpus("big", {"clusters": None})


def cores(*kinds: tuple[int, str | None, int, int]) -> dict[str, Any]:
    """Facts of a processor: of each kind the number of physical cores, part, MHz, and threads of a core."""
    lines, number = ["@ cpuinfo"], 0
    topology = []
    for count, part, mhz, threads in kinds:
        for _ in range(count):
            same = range(number, number + threads)
            for cpu in same:
                lines += [f"processor\t: {cpu}", *([f"CPU part\t: {part}"] if part else [])]
                topology += [f"@ cpu{cpu} cpuinfo_max_freq", str(mhz * 1000)]
                topology += [f"@ cpu{cpu} siblings", f"{same[0]}-{same[-1]}" if threads > 1 else str(cpu)]
            number += threads
    found: dict[str, Any] = facts_of(sections_of([*lines, *topology, "@ end"]))
    return found


@pytest.mark.parametrize(
    ("kinds", "physical", "threads"),
    [
        ([(6, "0x001", 3532, 1), (2, "0x001", 4320, 1)], 8, 8),  # Snapdragon 8 Elite: no little core
        ([(4, "0xd05", 1800, 1), (2, "0xd41", 2250, 1), (2, "0xd44", 2800, 1)], 8, 4),  # Tensor
        ([(4, "0xd03", 1800, 1), (4, "0xd03", 2300, 1)], 8, 8),  # little cores alone
        ([(4, "0xd03", 2000, 1), (4, "0xd09", 2400, 1)], 8, 4),  # little at 0.83 of the clock
        ([(6, None, 4900, 2), (2, None, 5200, 2)], 8, 8),  # favoured cores of one kind, two threads each
        ([(8, None, 3800, 1), (8, None, 5400, 2)], 16, 8),  # a hybrid: 24 logical
        ([(4, None, 0, 2)], 4, 4),  # no clocks told
    ],
)
def test_a_thread_for_each_core_that_is_no_little_one(kinds: Any, physical: int, threads: int) -> None:
    facts = cores(*kinds)
    assert (facts["cores_physical"], default_threads(facts)) == (physical, threads)


def test_a_hot_device_is_waited_for_and_not_for_ever() -> None:
    readings = [{"battery": {"temperature_c": t}} for t in (41.0, 39.0, 37.0)]
    left, slept = iter(readings), [0.0]

    def sleep(seconds: float) -> None:
        slept[0] += seconds

    found = cooled(lambda: next(left), Reporter("test"), clock=lambda: slept[0], sleep=sleep)
    assert found == readings[2] and slept == [20.0]
    hot = {"thermal": {"status": 2}, "temperature_c": None, "battery": None}
    assert cooled(lambda: hot, Reporter("test"), clock=lambda: slept[0], sleep=sleep) == hot
    assert slept[0] == 20.0 + 180.0
    assert heat_marks(hot, hot) == [
        "hot: thermal status moderate before the measurement",
        "throttling: thermal status moderate after the measurement",
    ]
    assert heat_marks(readings[2], readings[2]) == []


def test_a_clock_that_falls_between_repeats_and_a_dark_screen_make_timings_doubtful() -> None:
    clocks = [{"policy0": 1800.0, "policy4": mhz} for mhz in (2800.0, 2790.0, 2000.0)]
    trace = [{"clocks_mhz": now, "zones_c": {}} for now in clocks]
    assert state_marks({"screen": "on"}, trace[:2]) == []
    assert state_marks({"screen": "off"}, trace) == [
        "throttling: the fastest clock was between 2000 and 2800 MHz", "screen off: phones give programs less then"
    ]  # fmt: skip
    assert state_marks({}, [{"clocks_mhz": now, "zones_c": {}} for now in ({}, {"policy0": None})]) == []


def test_a_zone_that_gets_too_hot_between_repeats_makes_timings_doubtful() -> None:
    trace = [{"clocks_mhz": {}, "zones_c": {"cpu": degrees, "gpu": 50.0}} for degrees in (60.0, 84.0, 70.0)]
    assert state_marks({}, trace) == ["hot: the hottest zone reached 84 C while it was timed"]
    assert state_marks({}, [trace[0], trace[2]]) == [], "timing warms a device"
    assert state_marks({"battery": {"temperature_c": 31.0}}, trace) == [], "a phone's battery tells its heat"


@pytest.mark.parametrize("left_behind", [True, False])
def test_a_lost_connection_is_not_hidden_by_what_cannot_be_removed(
    left_behind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Far:
        def clean_up(self) -> None:
            if left_behind:
                raise DeviceError("a folder may still be there")

    monkeypatch.setitem(DEVICES, "far", f"{__name__}:far")
    monkeypatch.setattr(f"{__name__}.far", lambda address: Far(), raising=False)
    with pytest.raises(DeviceLost, match="the cable"), opened("far"):
        raise DeviceLost("the cable")
    with pytest.raises(DeviceError if left_behind else KeyError), opened("far"):
        raise KeyError("a mistake")


def test_an_unknown_kind_of_target_is_answered_with_those_there_are() -> None:
    with pytest.raises(DeviceError, match="no target is called 'phone'") as caught, opened("phone"):
        pass
    assert all(kind in caught.value.hint for kind in DEVICES)


def test_what_is_found_is_named_and_not_connected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "config"
    (tmp_path / "more").write_text("Host jetson\n")
    config.write_text(f"Host pi board *.lan !x\n  User me\nHost=nas\nInclude {tmp_path}/mo*\nMatch all\n")
    monkeypatch.setenv("EDGEFT_SSH_CONFIG", str(config))
    assert ssh_hosts() == ["pi", "board", "nas", "jetson"]
    listing = (
        "List of devices attached\nR58 device usb:1-1 model:SM_S921B device:e1s\nX9 unauthorized usb:1-2\n"
        "Y7 no permissions (user in plugdev group; are your udev rules wrong?); see [http://x] usb:1-3\n"
        "* daemon started successfully\n\n"
    )
    phones = [
        ("android:R58", "ready", "SM_S921B"), ("android:X9", "unauthorized", "allow USB debugging on its screen"),
        ("android:Y7", "no permissions", "give your user access to USB devices"),
    ]  # fmt: skip
    assert phones_in(listing) == phones
    adb = tmp_path / "adb"  # as adbutils brings it, not on the PATH
    adb.write_text(f"#!/bin/sh\ncat <<'.'\n{listing}.\n")
    adb.chmod(0o700)
    monkeypatch.setattr(scan, "find_adb", lambda: str(adb))
    monkeypatch.setenv("EDGEFT_CHROMIUM", str(adb))
    monkeypatch.setenv("EDGEFT_CACHE", str(tmp_path))
    monkeypatch.setattr(scan, "find_spec", lambda name: object())
    found = scan.scan()
    assert ("browser", "no runtime", "edgeft device fetch-browser") in found
    monkeypatch.setattr(scan, "find_spec", lambda name: None)
    assert ("browser", "no Playwright", "pip install 'edgeft[browser]'") in scan.scan()
    monkeypatch.setenv("EDGEFT_CHROMIUM", str(tmp_path / "none"))
    assert "no browser" in [state for name, state, _ in scan.scan() if name == "browser"]
    assert [line for line in found if line[0].startswith("android")] == phones
    assert [line[0] for line in found if line[0].startswith(("local", "ssh"))] == [
        "local", "ssh:pi", "ssh:board", "ssh:nas", "ssh:jetson"
    ]  # fmt: skip
