"""One reporter for all stages: bars on a terminal, plain lines elsewhere; always metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from edgeft.artifact import LOG_DIR

if TYPE_CHECKING:
    from edgeft.events import EventFile

PLAIN_EVERY_S = 15.0


class Task(Protocol):
    """A running piece of work with a known length."""

    def advance(self, amount: float = 1.0, **values: float | str) -> None:
        """Count `amount` as done; `values` (loss, tokens/s, ...) are shown beside the bar."""


class Reporter:
    """What a stage may say while it works. `out=None` keeps no metrics file, `stream=None` shows nothing."""

    def __init__(self, name: str, out: Path | None = None, stream: TextIO | None = None) -> None:
        self.name = name
        self._stream = stream
        self._metrics_path = out / LOG_DIR / "metrics.jsonl" if out else None
        self._events: EventFile | None = None

    def note(self, text: str) -> None:
        """Show one line that the user should see (a fallback, a resume, a choice that was measured)."""
        if self._stream:
            print(f"  {self.name}: {text}", file=self._stream, flush=True)

    def metric(self, **values: Any) -> None:
        """Append one line to `log/metrics.jsonl`, with the time; numbers of a `step` go to TensorBoard's file too."""
        if not self._metrics_path:
            return
        self._metrics_path.parent.mkdir(parents=True, exist_ok=True)
        with self._metrics_path.open("a", encoding="utf-8") as f:
            f.write(json.dumps({"time": round(time.time(), 3), **values}) + "\n")
        if "step" in values:
            from edgeft.events import EventFile  # only stages with steps pay for the import

            self._events = self._events or EventFile(self._metrics_path.parent)
            numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
            self._events.add(int(numbers.pop("step")), numbers)

    @contextmanager
    def track(self, what: str, total: float, done: float = 0.0) -> Iterator[Task]:
        """A progress bar over `total` units, of which `done` were done before (a resumed run)."""
        if self._stream and self._stream.isatty():
            with _rich_task(f"{self.name}: {what}", total, done) as task:
                yield task
        else:
            plain = _PlainTask(f"  {self.name}: {what}", total, done, self._stream)
            yield plain
            plain.finish()


class _PlainTask:
    def __init__(self, label: str, total: float, done: float, stream: TextIO | None) -> None:
        self._label, self._total, self._start_done, self._done = label, total, done, done
        self._stream = stream
        self._start = self._last = time.monotonic()
        self._values: dict[str, float | str] = {}

    def advance(self, amount: float = 1.0, **values: float | str) -> None:
        self._done += amount
        self._values = values or self._values
        now = time.monotonic()
        if now - self._last >= PLAIN_EVERY_S and self._done < self._total:
            self._last = now
            self._say(f"left {format_seconds(self._left(now))}")

    def finish(self) -> None:
        self._say(f"took {format_seconds(time.monotonic() - self._start)}")

    def _left(self, now: float) -> float:
        fresh = self._done - self._start_done
        return (now - self._start) / fresh * (self._total - self._done) if fresh > 0 else float("nan")

    def _say(self, tail: str) -> None:
        if self._stream:
            shown = "".join(f" {k} {_short(v)}" for k, v in self._values.items())
            percent = 100 * self._done / self._total if self._total else 100
            print(f"{self._label} {percent:.0f}%{shown}, {tail}", file=self._stream, flush=True)


@contextmanager
def _rich_task(label: str, total: float, done: float) -> Iterator[Task]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%{task.fields[shown]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(file=sys.stderr)) as bar:
        task_id = bar.add_task(label, total=total, completed=int(done), shown="")

        class RichTask:
            def advance(self, amount: float = 1.0, **values: float | str) -> None:
                shown = "".join(f"  {k} {_short(v)}" for k, v in values.items())
                if values:
                    bar.update(task_id, shown=shown)
                bar.advance(task_id, amount)

        yield RichTask()


def format_seconds(seconds: float) -> str:
    """'8s', '3m05s', '1h02m'; '?' when unknown."""
    if seconds != seconds:  # NaN
        return "?"
    if seconds < 60:
        return f"{seconds:.0f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4g}"
