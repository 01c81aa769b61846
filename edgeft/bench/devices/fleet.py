"""Several targets at once: those on different machines together, those on one machine in turns.

Those on this machine begin when the others have their package: sending one takes this machine's time. A target whose
`place` is '' may be on any machine, a phone's browser on the phone beside it: it is measured while no other is."""

from __future__ import annotations

import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, TextIO

from edgeft.bench.devices.device import HERE, Device, DeviceError
from edgeft.bench.devices.measure import Choice, bench_on
from edgeft.bench.devices.work import Work
from edgeft.bench.table import FIELDS, make_row, marks_of
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter

Row = dict[str, Any]


class Plain:
    """A stream that is no terminal: several bars cannot share one."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return False


class Fleet:
    """What runs where. This machine's work for a target counts as a use of this machine."""

    def __init__(self) -> None:
        self.here = threading.RLock()  # held by what works on this machine
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._taken: list[str] = []  # places
        self._unsent = 0
        self._open: list[Device] = []
        self._stopped = False

    def sending(self) -> Callable[[], None]:
        """To be called for every target before any begins; calls of what it gives, after the first, do nothing."""
        self._unsent += 1
        waiting = [True]

        def sent() -> None:
            with self._changed:
                self._unsent -= waiting[0]
                waiting[0] = False
                self._changed.notify_all()

        return sent

    @contextmanager
    def holding(self, device: Device, sent: Callable[[], None] = lambda: None) -> Iterator[None]:
        """One device at a time on a machine; one that may be on this machine waits until all others are `sent`."""
        near = device.place in (HERE, "")
        if near:
            sent()
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or not self._unsent)
        with self._turn(device.place), self.here if near else nullcontext(), self._known(device):
            yield

    @contextmanager
    def _turn(self, place: str) -> Iterator[None]:
        """Takes the place when nobody has it; '' when nobody has any."""

        def free() -> bool:
            return not self._taken if not place else not {place, ""} & set(self._taken)

        with self._changed:
            self._changed.wait_for(lambda: self._stopped or free())
            self._taken.append(place)
        try:
            yield
        finally:
            with self._changed:
                self._taken.remove(place)
                self._changed.notify_all()

    @contextmanager
    def _known(self, device: Device) -> Iterator[None]:
        with self._lock:
            if self._stopped:
                raise EdgeftError(f"{device.name}: stopped")
            self._open.append(device)
        try:
            yield
        finally:
            with self._lock:
                self._open.remove(device)

    def stop(self) -> None:
        """End what runs on all devices; none begins any more."""
        with self._lock:
            self._stopped = True
            self._changed.notify_all()
            running = list(self._open)
        for device in running:
            device.stop()


def bench_fleet(targets: Sequence[str], work: Work, choice: Choice, stream: TextIO | None) -> list[Row]:
    """One row for each target in the given order, of the same schema; a target that failed has "error" and no figures.

    An interrupt ends all of them, and each leaves nothing behind.
    """
    fleet = Fleet()

    def measured(target: str, sent: Callable[[], None]) -> Row:
        plain: Any = Plain(stream) if stream and len(targets) > 1 else stream
        report = Reporter(target, stream=plain)
        try:
            found = bench_on(target, work, choice, report, fleet.here, partial(fleet.holding, sent=sent), sent)
        except EdgeftError as error:
            report.note(f"failed: {error}")
            return failed(target, work, error)
        except Exception as error:  # a defect must not cost what the other targets measured
            report.note(f"failed: {''.join(traceback.format_exception(error))}")
            return failed(target, work, DeviceError(f"{type(error).__name__}: {error}", "this is a defect of edgeft"))
        finally:
            sent()
        if choice.strict and (marks := marks_of(found["row"])):
            return failed(target, work, DeviceError(f"the timings are doubtful: {'; '.join(marks)}"))
        return {**found["row"], "target": target, "error": None, "device": found["host"]}

    with ThreadPoolExecutor(max_workers=len(targets)) as pool:
        all_sending = [fleet.sending() for _ in targets]
        futures = [pool.submit(measured, target, sent) for target, sent in zip(targets, all_sending, strict=True)]
        try:
            with _ended_politely():
                wait(futures)
        except BaseException:
            fleet.stop()
            raise
        return [future.result() for future in futures]


@contextmanager
def _ended_politely() -> Iterator[None]:
    """Let `kill` interrupt as Ctrl-C does, so that devices are cleaned up; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def failed(target: str, work: Work, error: EdgeftError) -> Row:
    """A row without figures, that says why."""
    reason = f"the target failed: {error.message}"
    absent = {**dict.fromkeys(FIELDS, reason), **work.facts["absent"]}
    row = make_row({**work.facts["values"], "package": work.package.name}, absent)
    return {**row, "target": target, "error": str(error), "device": None}
