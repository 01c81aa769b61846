"""A Linux machine reached with the system's ssh: 'ssh:USER@HOST', 'ssh:NAME-IN-SSH-CONFIG', 'ssh:HOST:/FOLDER'.

One connection serves all calls. Its own session is the guard of the private folder: a shell there that waits until
this side is gone, in whatever way, then ends what still works in the folder and removes it. If the machine went down
or the guard was killed, the next connection removes the folder, which says of which boot it is and who guards it.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from edgeft.artifact import file_sha256
from edgeft.bench.devices.child import Children, ignore
from edgeft.bench.devices.device import HERE, DeviceError, DeviceLost, OnLine
from edgeft.bench.devices.job import Job
from edgeft.bench.devices.linux import PROBE, facts_of, sections_of
from edgeft.bench.devices.private import private_folder
from edgeft.bench.devices.shell import MODEL_NAME, RUNNER_NAME, Exit, check_runner, hint, reason, run_job

ADDRESS = re.compile(r"(?P<host>[A-Za-z0-9_][A-Za-z0-9_.@%+-]*)(:(?P<folder>/.*))?")
CONFIG = "EDGEFT_SSH_CONFIG"  # a file for ssh -F
PYTHON = "EDGEFT_SSH_PYTHON"  # the Python there that has edgeft
CONNECT_S = 15
OPTIONS = (
    "-T", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={CONNECT_S}", "-o", "ServerAliveInterval=10",
    "-o", "ServerAliveCountMax=3", "-o", "ForwardAgent=no", "-o", "ForwardX11=no", "-o", "ClearAllForwardings=yes",
)  # fmt: skip
LOST = 255  # ssh's own code
NOT_THERE = 3
LOOPBACK = ("localhost", "127.", "::1")

GUARD = r"""
umask 077
boot=$(cat /proc/sys/kernel/random/boot_id 2>/dev/null)
space=$(readlink /proc/self/ns/pid 2>/dev/null)
for left in "${1:-$HOME}"/.edgeft-*; do
  [ -f "$left/.guard" ] && [ ! -L "$left" ] || continue
  { read -r its_boot && read -r its_space && read -r its_pid; } < "$left/.guard" || continue
  if [ "$its_boot" != "$boot" ]; then rm -rf "$left"
  elif [ "$its_space" = "$space" ] && ! kill -0 "$its_pid" 2>/dev/null; then rm -rf "$left"; fi
done
made=$(mktemp -d "${1:-$HOME}/.edgeft-XXXXXXXXXX") && folder=$(cd "$made" && pwd -P) || exit 1
[ -n "$boot" ] && printf '%s\n%s\n%s\n' "$boot" "$space" $$ > "$folder/.guard"
trap '' HUP INT PIPE TERM
echo "folder $folder"
cat > /dev/null
tries=0
while [ $tries -lt 20 ]; do
  busy=
  for process in /proc/[0-9]*; do
    if [ "$(readlink "$process/cwd" 2>/dev/null)" = "$folder" ]; then
      kill -KILL "${process#/proc/}" 2>/dev/null && busy=1
    fi
  done
  [ -z "$busy" ] && break
  tries=$((tries + 1))
  sleep 0.2 2>/dev/null || sleep 1
done
rm -rf "$folder"
[ -e "$folder" ] || echo removed
"""
IN_FOLDER = 'cd "$1" || exit 125; shift; "$@"; exit $?'  # no exec: the shell turns a signal into a code
TAKE = r"""
mkdir -p "$(dirname "$1")" && cat > "$1.partial" && mv "$1.partial" "$1" && chmod "$2" "$1" && exit
rm -f "$1.partial"
exit 1
"""
GIVE = f'[ -f "$1" ] || exit {NOT_THERE}; cat "$1"'
SUMS = 'df -Pk . | tail -n 1; for name in "$@"; do if [ -f "$name" ]; then sha256sum "$name"; fi; done'


class SshDevice:
    """`Device` and `Shell` over one connection."""

    kind = "ssh"
    emulated = False
    formats = frozenset({"gguf", "onnx"})

    def __init__(self, address: str) -> None:
        parsed = ADDRESS.fullmatch(address)
        if not parsed:
            raise DeviceError(f"ssh:{address} names no host", "write ssh:USER@HOST, or ssh:HOST:/FOLDER/THERE")
        self.name = f"ssh:{address}"
        self._host = parsed["host"]
        self._children = Children(self.name)
        self.place = place_of(self._host)
        self._near = private_folder()
        self._socket = f"{self._near}/c"
        self._runner: list[str] | None = None
        self._better: str | None = None  # see `native.better_runner`
        self._pushed: set[str] = set()
        self._removed = False
        try:
            self._guard, self.folder = self._connect(parsed["folder"] or "")
        except BaseException:
            shutil.rmtree(self._near, ignore_errors=True)
            raise

    def _connect(self, folder: str) -> tuple[subprocess.Popen[bytes], str]:
        remote = shlex.join(["sh", "-c", GUARD, "edgeft", *([folder] if folder else [])])
        argv = [*_ssh(), "-o", "ControlMaster=yes", "-o", f"ControlPath={self._socket}", "--", self._host, remote]
        with open(f"{self._near}/stderr", "wb") as stderr:
            guard = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr, start_new_session=True
            )
        try:
            for raw in guard.stdout or ():  # what a login script prints comes first
                line = raw.decode("utf-8", "replace").strip()
                if line.startswith("folder /"):
                    return guard, line.removeprefix("folder ")
            guard.wait()
            raise _not_reached(self.name, self._said(), folder)
        except BaseException:
            guard.kill()
            raise

    def _said(self) -> str:
        return Path(self._near, "stderr").read_text("utf-8", errors="replace").strip()

    def probe(self) -> dict[str, Any]:
        lines: list[str] = []
        self._need(self._remote(["sh", "-c", PROBE], lines.append), "cannot be asked about itself")
        return dict(facts_of(sections_of(lines)))

    def push(self, files: Mapping[str, Path]) -> None:
        wanted = {name: (path, file_sha256(path)) for name, path in files.items()}
        there, free = self._sums(list(wanted))
        missing = {name: path for name, (path, sha) in wanted.items() if there.get(name) != sha}
        needed = sum(path.stat().st_size for path in missing.values())
        if free is not None and needed > free:
            raise DeviceError(
                f"{self.name}: {self.folder} has {free / 1e6:,.1f} MB free, {needed / 1e6:,.1f} MB are needed",
                "free space there, or name another folder: ssh:HOST:/FOLDER",
            )
        for name, path in missing.items():
            mode = "700" if os.access(path, os.X_OK) else "600"
            self._need(self._remote(["sh", "-c", TAKE, "edgeft", name, mode], stdin=path), f"does not take {name}")
        there, _ = self._sums(list(missing))
        if wrong := [name for name in missing if there.get(name) != wanted[name][1]]:
            raise DeviceError(f"{self.name}: {', '.join(wrong)} did not arrive whole", "run the same command again")
        self._pushed |= set(files)

    def _sums(self, names: Sequence[str]) -> tuple[dict[str, str], int | None]:
        """sha256 of the files that are there, and the free bytes."""
        lines: list[str] = []
        self._need(self._remote(["sh", "-c", SUMS, "edgeft", *names], lines.append), "cannot sum up files")
        disk = lines[0].split() if lines else []
        free = int(disk[3]) * 1024 if len(disk) > 4 and disk[3].isdigit() else None
        return {name: sha for sha, _, name in (line.partition("  ") for line in lines[1:])}, free

    def pull(self, names: Sequence[str], folder: Path) -> None:
        for name in names:
            ended = self._remote(["sh", "-c", GIVE, "edgeft", name], stdout=folder / name)
            if ended.code == NOT_THERE:
                (folder / name).unlink()
            else:
                self._need(ended, f"does not give {name}")

    def call(self, argv: Sequence[str], on_line: OnLine) -> Exit:
        return self._remote(argv, on_line)

    def _remote(
        self, argv: Sequence[str], on_line: OnLine = ignore, stdin: Path | None = None, stdout: Path | None = None
    ) -> Exit:
        """Run a command in the folder over the connection that is there; it never makes another one."""
        remote = shlex.join(["sh", "-c", IN_FOLDER, "edgeft", self.folder, *argv])
        options = ["-o", "ControlMaster=no", "-o", f"ControlPath={self._socket}", "-o", "ProxyCommand=false"]
        ended = self._children.run([*_ssh(), *options, "--", self._host, remote], on_line, stdin, stdout)
        if ended.code == LOST:
            said = (self._said() or ended.stderr.strip()).splitlines()
            raise DeviceLost(
                f"{self.name}: the connection broke" + (f": {said[-1]}" if said else ""),
                "run the same command again: what was measured is kept",
            )
        return ended

    def _need(self, ended: Exit, what: str) -> None:
        if ended.code != 0:
            raise DeviceError(f"{self.name} {what}: it ended {reason(ended)}", hint(ended))

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        """As `Device.run`, with "better_runner" (`native`)."""
        if self._runner is None:
            self._runner = self._native() if MODEL_NAME in self._pushed else self._python()
        threads = ["env", f"OMP_NUM_THREADS={job.threads}"]
        return {**run_job(self, [*threads, *self._runner], job, scratch, on_line), "better_runner": self._better}

    def _native(self) -> list[str]:
        """Push the runner for its processor."""
        from edgeft.bench.devices.native import better_runner, find_runners

        facts = self.probe()
        machine, features = str(facts["machine"]), facts["cpu_features"] or ()
        self._better = better_runner(machine, features)
        runners = find_runners(machine, features=features)
        for program in runners:
            self.push({RUNNER_NAME: program})
            try:
                check_runner(self, [f"./{RUNNER_NAME}"])
                break
            except DeviceLost:
                raise
            except DeviceError:  # the native build may want another C library
                if program == runners[-1]:
                    raise
        return [f"./{RUNNER_NAME}", MODEL_NAME]

    def _python(self) -> list[str]:
        """Find edgeft in a Python there."""
        python = os.environ.get(PYTHON, "python3")
        argv = [python, "-m", "edgeft.bench.devices.worker"]
        try:
            check_runner(self, argv)
        except DeviceLost:
            raise
        except DeviceError as error:
            raise DeviceError(
                f"{error.message}\n  an ONNX package is run by edgeft in the Python there, {python}",
                f"there: {python} -m pip install edgeft (or set {PYTHON} here to the Python that has it); a GGUF "
                "package needs nothing there",
            ) from error
        return [*argv, "."]

    def stop(self) -> None:
        self._children.stop()

    def clean_up(self) -> None:
        """Let the guard work; it also does when nobody asks."""
        if self._removed:
            return
        self._removed = True
        self._children.stop()
        lost = self._guard.poll() is not None
        removed = b"" if lost else _last_words(self._guard)
        shutil.rmtree(self._near, ignore_errors=True)
        if not lost and b"removed" not in removed:
            raise DeviceError(f"{self.name}: {self.folder} could not be removed there", "remove it by hand")


def open_ssh(address: str) -> SshDevice:
    """Connect. Raises DeviceError if the host cannot be reached, and says why."""
    return SshDevice(address)


def place_of(host: str) -> str:
    """The machine that ssh's settings give for a name: `HERE` for the loopback address."""
    done = subprocess.run([*_ssh(), "-G", "--", host], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    settings = dict(line.split(" ", 1) for line in done.stdout.splitlines() if " " in line)
    address = settings.get("hostname", host)
    return HERE if address.startswith(LOOPBACK) else address


def _ssh() -> list[str]:
    found = shutil.which("ssh")
    if not found:
        raise DeviceError("there is no ssh on this machine", "install it (Debian: openssh-client)")
    config = os.environ.get(CONFIG)
    return [found, *(["-F", config] if config else []), *OPTIONS]


def _last_words(guard: subprocess.Popen[bytes]) -> bytes:
    """Close the guard's input and read what it still says; it gets half a minute."""
    timer = threading.Timer(30, guard.kill)
    timer.start()
    try:
        _close(guard.stdin)
        words = guard.stdout.read() if guard.stdout else b""
        _close(guard.stdout)
        guard.wait()
        return words
    finally:
        timer.cancel()


def _close(stream: IO[bytes] | None) -> None:
    try:
        if stream:
            stream.close()
    except BrokenPipeError:
        return


def _not_reached(name: str, said: str, folder: str) -> DeviceError:
    """What ssh's last words mean."""
    hints = {
        "No space left": "the device is full: free space, or name another folder: ssh:HOST:/FOLDER",
        "mktemp": f"edgeft needs a folder to write in: {folder or 'your home folder there'}",
        "Host key verification failed": "connect once by hand (ssh HOST) and accept the host's key",
        "Permission denied": "put your public key there (ssh-copy-id), or start your agent: no password is asked for",
        "Connection refused": "is sshd running there, and is this its port? (Port in ~/.ssh/config)",
        "Could not resolve": "name a host that ssh knows: see ~/.ssh/config",
        "timed out": "is the machine on, and in this network?",
    }
    last = said.splitlines()[-1] if said else "it said nothing"
    advice = next((advice for words, advice in hints.items() if words in said), "does `ssh HOST true` work by hand?")
    return DeviceError(f"{name} cannot be reached: {last}", advice)
