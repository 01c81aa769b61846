"""The reporter: plain lines with an estimate, values beside them, and a metrics file."""

from __future__ import annotations

import io
import json
import math
import struct
from pathlib import Path

import pytest
from tensorboardX.proto.event_pb2 import Event

from edgeft import progress
from edgeft.progress import Reporter, format_seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that tests set by hand."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (8.4, "8s"), (59.4, "59s"), (60, "1m00s"), (185, "3m05s"), (3599, "59m59s"), (3720, "1h02m")],
)
def test_durations_read_naturally(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


def test_an_unknown_duration_is_a_question_mark() -> None:
    assert format_seconds(math.nan) == "?"


def test_a_plain_bar_says_how_much_is_left(clock: list[float]) -> None:
    stream = io.StringIO()
    with Reporter("train", stream=stream).track("step", 100) as task:
        for _ in range(50):
            clock[0] += 1
            task.advance(loss=0.5)
    lines = stream.getvalue().splitlines()
    assert lines[0] == "  train: step 15% loss 0.5, left 1m25s"
    assert lines[-1] == "  train: step 50% loss 0.5, took 50s"
    assert len(lines) == 4  # every 15 s, and the end


def test_the_estimate_of_a_resumed_bar_counts_only_what_this_run_did(clock: list[float]) -> None:
    stream = io.StringIO()
    with Reporter("train", stream=stream).track("step", 100, done=80) as task:
        clock[0] += 15
        task.advance(5)
    assert "85%, left 45s" in stream.getvalue()


def test_a_bar_that_fails_does_not_claim_to_be_done() -> None:
    stream = io.StringIO()
    with pytest.raises(RuntimeError), Reporter("train", stream=stream).track("step", 10):
        raise RuntimeError
    assert stream.getvalue() == ""


def test_a_reporter_without_stream_says_nothing_and_keeps_metrics(tmp_path: Path) -> None:
    report = Reporter("train", tmp_path)
    report.note("quiet")
    report.metric(step=1, loss=0.25)
    report.metric(step=2, loss=0.125)
    rows = [json.loads(line) for line in (tmp_path / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["loss"]) for row in rows] == [(1, 0.25), (2, 0.125)]
    assert all(row["time"] > 1e9 for row in rows)


def test_notes_carry_the_name_of_the_stage() -> None:
    stream = io.StringIO()
    Reporter("merge", stream=stream).note("210 tensors folded")
    assert stream.getvalue() == "  merge: 210 tensors folded\n"


def test_on_a_terminal_a_bar_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    with Reporter("train", stream=Terminal()).track("step", 2) as task:
        task.advance()
        task.advance(loss=0.5)
    assert "train: step" in capsys.readouterr().err


def test_numbers_of_a_step_can_be_watched_in_tensorboard(tmp_path: Path) -> None:
    reporter = Reporter("train", tmp_path)
    reporter.metric(row=3, kl_mean=0.5)  # no step: not for TensorBoard
    reporter.metric(step=1, loss=2.5, tokens=400, note="first")
    reporter.metric(step=2, loss=1.25)
    (path,) = (tmp_path / "log").glob("*tfevents*")
    data, events = path.read_bytes(), []
    while data:  # a record: length, checksum, message, checksum
        (size,) = struct.unpack("Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + size]))
        data = data[16 + size :]
    assert events[0].file_version == "brain.Event:2"
    seen = [(e.step, {v.tag: v.simple_value for v in e.summary.value}) for e in events[1:]]
    assert seen == [(1, {"loss": 2.5, "tokens": 400.0}), (2, {"loss": 1.25})]
