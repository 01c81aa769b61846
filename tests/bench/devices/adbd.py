"""`python -m tests.bench.devices.adbd ROOT PORT COMMAND...`: COMMAND beside a real adbd, cut off from everything else.

ROOT is a root file system with Debian's adbd (tools/adbd_root.sh). In namespaces of their own adbd and COMMAND see no
network but their loopback, no other process, and programs for ROOT's processor run under QEMU (binfmt_misc, which the
namespace has for itself). adbd asks nobody for permission and also listens on vsock, so that is refused to it.
"""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

WAIT_S = 30.0
ROOM_BYTES = 128 << 20  # what the phone has free
BINFMT = Path("/proc/sys/fs/binfmt_misc")
# 64-bit little-endian ELF programs for machine 183 (AArch64); F: the interpreter is opened now, outside of ROOT.
AARCH64 = (rb":edgeft:M::\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00:"
           rb"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff:")  # fmt: skip
PHONE_CPUINFO = "".join(
    f"processor\t: {n}\nFeatures\t: fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp\n"
    f"CPU implementer\t: 0x41\nCPU architecture: 8\nCPU part\t: {part}\n\n"
    for n, part in enumerate(["0xd05", "0xd0b"])
)


def command_beside_adbd(port: int, room_bytes: int = ROOM_BYTES) -> list[str]:
    """What to put before a command; skips the test where a part is missing. The phone has `room_bytes` free."""
    root = os.environ.get("EDGEFT_TEST_ADBD")
    if not root or not (Path(root) / "usr" / "sbin" / "adbd").is_file():
        pytest.skip("needs Debian's adbd: tools/adbd_root.sh FOLDER, then EDGEFT_TEST_ADBD=FOLDER")
    if not shutil.which("qemu-aarch64-static") and (Path(root) / "usr/lib/aarch64-linux-gnu").is_dir():
        pytest.skip("this adbd is for arm64: needs qemu-aarch64-static (Debian: qemu-user-static)")
    unshare = ["unshare", "--user", "--map-root-user", "--mount", "--net", "--pid", "--fork", "--kill-child"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("this system lets users make no namespaces")
    return [*unshare, "--mount-proc", sys.executable, "-m", __name__, root, str(port), str(room_bytes)]


def _refuse_vsock() -> None:
    """socket(AF_VSOCK) fails in this process and those that it starts (seccomp-BPF: seccomp(2), bpf(4))."""
    number = {"x86_64": 41, "aarch64": 198}[platform.machine()]
    load, equal, give = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
    refused, allowed = 0x00050000 | 97, 0x7FFF0000  # EAFNOSUPPORT
    steps = [(load, 0, 0, 0), (equal, 0, 3, number), (load, 0, 0, 16), (equal, 0, 1, socket.AF_VSOCK),
             (give, 0, 0, refused), (give, 0, 0, allowed)]  # fmt: skip
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *step) for step in steps))
    program = struct.pack("@HP", len(steps), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(38, 1, 0, 0, 0) != 0 or libc.prctl(22, 2, program, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


def _prepare(root: Path, scratch: Path, room_bytes: int) -> None:
    """Loopback, foreign programs, and ROOT's own /proc, /dev and phone-like /proc/cpuinfo."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    if interpreter := shutil.which("qemu-aarch64-static"):
        _mount("-t", "binfmt_misc", "none", str(BINFMT))
        (BINFMT / "register").write_bytes(AARCH64 + interpreter.encode() + b":F\n")
    _mount("--rbind", "/proc", str(root / "proc"))
    _mount("--rbind", "/dev", str(root / "dev"))
    _mount("-t", "tmpfs", "-o", f"size={room_bytes}", "none", str(root / "data" / "local" / "tmp"))
    if (root / "usr/lib/aarch64-linux-gnu").is_dir():
        (scratch / "cpuinfo").write_text(PHONE_CPUINFO)
        _mount("--bind", str(scratch / "cpuinfo"), str(root / "proc" / "cpuinfo"))


def main(root: Path, port: int, room_bytes: int, command: list[str]) -> int:
    scratch = Path(os.environ["HOME"])
    _prepare(root, scratch, room_bytes)
    environment = {"ADBD_PORT": str(port), "PATH": "/usr/bin:/bin:/usr/sbin", "HOME": "/", "TMPDIR": "/data/local/tmp"}
    with (scratch / "adbd.log").open("wb") as log:
        adbd = subprocess.Popen(
            ["chroot", str(root), "/usr/sbin/adbd"], env=environment, stdout=log, stderr=log, preexec_fn=_refuse_vsock
        )
    end = time.monotonic() + WAIT_S
    while not _answers(port):
        if adbd.poll() is not None or time.monotonic() > end:
            print((scratch / "adbd.log").read_text(), file=sys.stderr)
            return 99
        time.sleep(0.1)
    return subprocess.run(command, env={**os.environ, "TEST_ADBD_PID": str(adbd.pid)}).returncode


def _answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]))
