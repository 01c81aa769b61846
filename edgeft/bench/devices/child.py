"""Processes of a device on this side, which another thread can end."""

from __future__ import annotations

import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from edgeft.bench.devices.device import DeviceError, OnLine
from edgeft.bench.devices.shell import Exit

STDERR_BYTES = 4000  # of its end, that are kept


def ignore(line: str) -> None:
    """For output that nobody wants."""


class Children:
    """Starts processes and waits for them; `stop` ends them all and refuses new ones until `go_on`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped = False

    def run(
        self,
        argv: Sequence[str],
        on_line: OnLine = ignore,
        stdin: Path | None = None,
        stdout: Path | None = None,
        cwd: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> Exit:
        """Run to the end; its output goes line by line to `on_line`, or whole into the file `stdout`.

        The code of a process that a signal ended is 128 + its number, as in a shell. It gets no signals of this
        process's terminal, so that cleaning up is left to us. Raises DeviceError after `stop`.
        """
        with ExitStack() as stack:
            errors = stack.enter_context(tempfile.TemporaryFile())
            source = stack.enter_context(stdin.open("rb")) if stdin else subprocess.DEVNULL
            target = stack.enter_context(stdout.open("wb")) if stdout else subprocess.PIPE
            process = self._start(
                argv, stdin=source, stdout=target, stderr=errors, cwd=cwd, env=environment, start_new_session=True
            )
            try:
                for raw in process.stdout or ():
                    on_line(raw.decode("utf-8", "replace").rstrip("\r\n"))
                code = process.wait()
            except BaseException:
                process.kill()
                process.wait()
                raise
            finally:
                if process.stdout:
                    process.stdout.close()
                with self._lock:
                    self._running.discard(process)
            self._refuse_stopped()
            errors.seek(max(0, errors.tell() - STDERR_BYTES))
            return Exit(code if code >= 0 else 128 - code, errors.read().decode("utf-8", "replace"))

    def _start(self, argv: Sequence[str], **streams: object) -> subprocess.Popen[bytes]:
        with self._lock:
            if not self._stopped:
                process: subprocess.Popen[bytes] = subprocess.Popen(list(argv), **streams)  # type: ignore[call-overload]
                self._running.add(process)
                return process
        self._refuse_stopped()
        raise AssertionError

    def _refuse_stopped(self) -> None:
        if self._stopped:
            raise DeviceError(f"{self._name}: stopped")

    def stop(self) -> None:
        """End all of them; later ones are refused."""
        with self._lock:
            self._stopped = True
            for process in self._running:
                process.kill()

    def go_on(self) -> None:
        """Allow processes again: cleaning up needs some."""
        with self._lock:
            self._stopped = False
