"""Progress lines of a process that measures, shown as bars: JSON {"what", "total", "done"}; other lines are its own."""

from __future__ import annotations

import json
from contextlib import ExitStack

from edgeft.progress import Reporter, Task


class Follower:
    """Takes line by line; a context, so that the last bar ends. `begun` and `total` place a part in a longer work."""

    def __init__(self, report: Reporter, begun: int = 0, total: int | None = None) -> None:
        self._report, self._begun, self._total = report, begun, total
        self._stack = ExitStack()
        self._part: str | None = None
        self._done = 0
        self._task: Task | None = None

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def line(self, text: str) -> None:
        """A line of a runtime's chatter is passed over."""
        try:
            step = json.loads(text)
            what, total, done = str(step["what"]), int(step["total"]), int(step["done"])
        except (ValueError, KeyError, TypeError):
            return
        if what != self._part:
            self._stack.close()
            track = self._report.track(what, self._total or total, self._begun)
            self._task, self._part, self._done = self._stack.enter_context(track), what, 0
        assert self._task is not None
        self._task.advance(done - self._done)
        self._done = done
