"""Several targets at once: one schema, one table, and no two of them on one machine at the same time."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgeft.bench.accuracy import assess, evaluate, prepare
from edgeft.bench.devices.browser import BrowserDevice, parse_options
from edgeft.bench.devices.device import DEVICES, HERE, DeviceError, OnLine
from edgeft.bench.devices.fleet import Fleet, bench_fleet
from edgeft.bench.devices.job import Job, RowJob, SpeedJob, job_of
from edgeft.bench.devices.local import LocalDevice
from edgeft.bench.devices.measure import Choice, told_of
from edgeft.bench.devices.work import prepare as prepare_work
from edgeft.bench.devices.worker import run
from edgeft.bench.session import open_session
from edgeft.bench.table import FIELDS
from edgeft.bench.task import Task
from edgeft.cli import app
from edgeft.errors import EdgeftError
from edgeft.settings import BenchSettings, TaskSettings


@dataclass
class Place:
    """A device of which only this is asked."""

    name: str
    place: str
    stopped: bool = False

    def stop(self) -> None:
        self.stopped = True


def test_devices_on_one_machine_take_turns_and_others_do_not_wait() -> None:
    fleet, running, most = Fleet(), [0, 0], [0, 0]

    def hold(device: Any, number: int) -> None:
        with fleet.holding(device):
            running[number] += 1
            most[number] = max(most[number], running[number], sum(running) if number else 0)
            time.sleep(0.1)
            running[number] -= 1

    here = [threading.Thread(target=hold, args=(Place(f"here {i}", HERE), 0)) for i in range(3)]
    away = [threading.Thread(target=hold, args=(Place("away", f"phone {i}"), 1)) for i in range(2)]
    for thread in (*here, *away):
        thread.start()
    for thread in (*here, *away):
        thread.join()
    assert most[0] == 1 and most[1] == 3


def test_a_browser_that_may_be_on_any_machine_is_measured_while_no_other_target_is() -> None:
    fleet: Any = Fleet()
    running: list[str] = []
    together: list[list[str]] = []

    def hold(name: str, place: str) -> None:
        with fleet.holding(Place(name, place)):
            running.append(name)
            together.append(list(running))
            time.sleep(0.05)
            running.remove(name)

    targets = [("here", HERE), ("phone", "android:A"), ("cdp 1", ""), ("phone again", "android:A"), ("cdp 2", "")]
    threads = [threading.Thread(target=hold, args=target) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 5 and all(len(names) == 1 for names in together if "cdp" in " ".join(names))
    assert BrowserDevice("browser:cdp=http://a", parse_options("cdp=http://a")).place == ""


def test_a_stopped_fleet_ends_what_runs_and_begins_nothing() -> None:
    fleet: Any = Fleet()
    device = Place("first", HERE)
    with fleet.holding(device):
        fleet.stop()
        assert device.stopped
    with pytest.raises(EdgeftError, match="second: stopped"), fleet.holding(Place("second", HERE)):
        pass


def test_this_machine_is_timed_when_the_others_have_their_package(
    tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    near_runs, together = threading.Event(), [False]

    class Near(LocalDevice):
        def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
            order.append("near runs")
            near_runs.set()
            return super().run(job, scratch, on_line)

    class Far(LocalDevice):
        place = "far"

        def __init__(self) -> None:
            super().__init__()
            time.sleep(0.5)  # connecting takes longer than opening this machine

        def push(self, files: Mapping[str, Path]) -> None:
            if "model.gguf" in files:
                order.append("far has it")
            super().push(files)

        def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
            together[0] = near_runs.wait(timeout=10)
            return super().run(job, scratch, on_line)

    class Odd(LocalDevice):
        place = "odd"

        def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
            raise TypeError("'NoneType' object is not iterable")

    for name, device in (("local", Near), ("far", Far), ("broken", None), ("odd", Odd)):
        monkeypatch.setitem(DEVICES, name, f"{__name__}:{name}")
        monkeypatch.setattr(f"{__name__}.{name}", lambda address, device=device: connected(device), raising=False)

    def connected(device: Any) -> Any:
        if device is None:
            raise DeviceError("it never comes so far")
        return device()

    work = prepare_work(tiny_gguf, None, BenchSettings(prompt_tokens=8, decode_tokens=2, repeats=3), TaskSettings())
    rows = bench_fleet(["local", "far", "broken", "odd"], work, Choice(tmp_path), None)
    assert [bool(row["decode_tps"]) for row in rows] == [True, True, False, False]
    assert "TypeError: 'NoneType' object" in rows[3]["error"], "a defect costs its own target alone"
    assert order == ["far has it", "near runs"] and together == [True]


def test_a_stopped_fleet_lets_nobody_wait_for_what_is_not_sent() -> None:
    fleet: Any = Fleet()
    fleet.sending()
    threading.Timer(0.2, fleet.stop).start()
    with pytest.raises(EdgeftError, match="here: stopped"), fleet.holding(Place("here", HERE), fleet.sending()):
        pass


def test_a_job_told_as_text_gives_what_the_session_itself_gives(
    tiny_gguf: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    session, task = open_session(tiny_gguf, 1, 256), Task("intent", "entities")
    cases = prepare(session, rows, task)
    asked = [RowJob(case.prompt_ids, case.reference_ids) for case in cases]
    speed = SpeedJob(cases[0].prompt_ids, 3, 2)
    out = run(tiny_gguf, job_of(Job(1, 256, sorted(session.stop_ids), 6, speed=speed, rows=asked).text()), tmp_path)
    there = assess(session, cases, task, out["answers"], [told_of(one) for one in out["references"]])
    here = evaluate(session, cases, task, 6)
    session.close()
    assert there.rows == here.rows and there.figures == here.figures
    assert [len(sample["decode_s"]) for sample in out["samples"]] == [3, 3]
    with pytest.raises(EdgeftError, match="stops at the tokens"):
        run(tiny_gguf, Job(1, 256, [5]), tmp_path)
    with pytest.raises(ValueError, match="not of version 1"):
        job_of('{"runner": 2}')


def test_a_target_that_fails_leaves_the_others_and_has_the_same_columns(
    tiny_gguf: Path, rows: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, html = tmp_path / "test.jsonl", tmp_path / "page.html"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["bench", str(tiny_gguf), "--data", str(data), "--rows", "2", "--threads", "1"]
    argv += ["--runs", str(tmp_path / "runs"), "--target", "local", "--target", "ssh:-not-a-host"]
    argv += ["--html", str(html), "--json"]
    result = CliRunner().invoke(app, argv)
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    local, other = json.loads(result.stdout)
    assert set(FIELDS) <= set(local) and list(local) == list(other)
    assert local["error"] is None and local["n"] == 2 < len(rows) and local["decode_tps"] > 0
    assert local["conditions"]["target"] == "local" and local["device"]["cores_logical"] > 0
    assert "names no host" in other["error"] and other["decode_tps"] is None
    assert other["absent"]["decode_tps"].startswith("the target failed") and other["bytes"] == local["bytes"]
    page = html.read_text()
    assert "<th>ssh:-not-a-host</th>" in page and "failed: ssh:-not-a-host names no host" in page
    assert "http" not in page.replace("http-equiv", "")
    refused = CliRunner().invoke(app, [*argv, "--like", "pixel-6a"])
    assert isinstance(refused.exception, EdgeftError) and "--like" in str(refused.exception)


def test_rows_to_score_without_any_are_refused(tiny_gguf: Path) -> None:
    refused = CliRunner().invoke(app, ["bench", str(tiny_gguf), "--target", "local", "--rows", "2"])
    assert isinstance(refused.exception, EdgeftError) and "--data FILE" in str(refused.exception)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--like", "pixel-6a", "--strict"], "--strict does not go with --like"),
        (["--target", "local", "--runtime", "torch"], "--runtime does not go with --target"),
        (["--cpus", "4-7", "--html", "x.html"], "--cpus, --html is for targets"),
        (["--target", "local", "--html", "nowhere/x.html"], "there is no folder nowhere"),
        (["--sweep", "--like", "pixel-6a", "--target", "local"], "--like, --target does not go with --sweep"),
    ],
)
def test_options_that_would_be_passed_over_are_refused(options: list[str], said: str, tiny_gguf: Path) -> None:
    refused = CliRunner().invoke(app, ["bench", str(tiny_gguf), *options])
    assert isinstance(refused.exception, EdgeftError) and said in refused.exception.message
