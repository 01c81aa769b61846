"""What a bench on a target makes of its device: what it says of itself, and a connection that breaks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from edgeft.bench.devices import measure
from edgeft.bench.devices.device import DEVICES, DeviceError, DeviceLost, OnLine
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.local import LocalDevice
from edgeft.bench.devices.measure import Choice, bench_on
from edgeft.bench.devices.side_by_side import target_table
from edgeft.bench.devices.work import Work, prepare
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings, TaskSettings

TRACE = [{"clocks_mhz": {"policy0": mhz}, "zones_c": {"cpu": 84.0}} for mhz in (2800.0, 2000.0)]
TOLD = {"threads": 1, "memory": {"bytes": 123_400_000, "kinds": {}}, "trace": TRACE, "better_runner": "build it"}


class Far(LocalDevice):
    """This machine, but what it says is changed."""

    name = "far"

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        return {**super().run(job, scratch, on_line), **TOLD}


@pytest.fixture
def work(tiny_gguf: Path) -> Work:
    settings = BenchSettings(threads=2, prompt_tokens=8, decode_tokens=2, repeats=3)
    return prepare(tiny_gguf, None, settings, TaskSettings())


@pytest.fixture
def opens(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Lets the target `far` be what a function gives."""

    def register(connect: Callable[[], Any]) -> None:
        monkeypatch.setitem(DEVICES, "far", f"{__name__}:connected")
        monkeypatch.setattr(f"{__name__}.connected", lambda address: connect(), raising=False)
        monkeypatch.setattr(measure, "RETRY_S", 0.0)

    return register


def test_a_row_holds_what_the_device_itself_said(
    work: Work, opens: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opens(Far)
    found = bench_on("far", work, Choice(tmp_path), Reporter("far", stream=sys.stderr))
    said = found["row"]["conditions"]
    assert said["threads"] == found["host"]["threads"] == 1, "not what was asked for"
    assert said["wasm_memory"]["bytes"] == 123_400_000 and said["better_runner"] == "build it"
    assert {"throttling: the fastest clock was between 2000 and 2800 MHz",
            "hot: the hottest zone reached 84 C while it was timed"} <= set(said["marks"])  # fmt: skip
    assert "a faster runner fits this processor: build it" in capsys.readouterr().err
    row = {**found["row"], "target": "far", "device": None}
    other = {**row, "target": "local", "conditions": {**said, "wasm_memory": None}}
    assert ["WASM MB", "123", "—"] in target_table([row, other])[1]
    assert "WASM MB" not in {line[0] for line in target_table([other])[1]}


def test_a_lost_device_may_take_both_attempts_to_come_back(
    work: Work, opens: Callable[..., None], tmp_path: Path
) -> None:
    class Lost(Far):
        def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
            raise DeviceLost("the cable")

        def clean_up(self) -> None:
            super().clean_up()
            raise DeviceError("its folder may still be there", "remove it")

    def connect_all(steps: list[Any]) -> None:
        left = iter(steps)

        def connect() -> Any:
            step = next(left)
            if isinstance(step, DeviceError):
                raise step
            return step()

        opens(connect)

    away = DeviceError("adb sees no phone")
    connect_all([Lost, away, Far])
    assert bench_on("far", work, Choice(tmp_path), Reporter("far"))["row"]["decode_tps"]
    connect_all([Lost, Lost, Lost, Far])
    with pytest.raises(DeviceLost, match="the cable") as lost:
        bench_on("far", work, Choice(tmp_path), Reporter("far"))
    assert "its folder may still be there; remove it" in lost.value.hint
    connect_all([away, Far])
    with pytest.raises(DeviceError, match="sees no phone"):
        bench_on("far", work, Choice(tmp_path), Reporter("far"))


def test_what_was_measured_is_not_lost_if_something_stays_on_the_device(
    work: Work, opens: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Unplugged(Far):
        def clean_up(self) -> None:
            super().clean_up()
            raise DeviceError("its folder may still be there", "remove it")

    opens(Unplugged)
    found = bench_on("far", work, Choice(tmp_path), Reporter("far", stream=sys.stderr))
    assert found["row"]["decode_tps"] and "its folder may still be there; remove it" in capsys.readouterr().err


def test_answers_of_another_build_are_not_taken_for_those_of_this_one(work: Work) -> None:
    keys = {work.key(target, build, []) for target in ("ssh:a", "ssh:b") for build in ("armv8.2", "armv9")}
    assert len(keys) == 4
