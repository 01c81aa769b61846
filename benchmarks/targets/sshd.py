"""A real sshd on this machine: Debian's openssh-server on a port of its own, with keys that are thrown away."""

from __future__ import annotations

import getpass
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import psutil

from edgeft.errors import EdgeftError

SERVER = """
ListenAddress 127.0.0.1
Port {port}
HostKey {keys}/host
AuthorizedKeysFile {keys}/user.pub
PidFile none
StrictModes no
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
"""
CLIENT = """
Host edge
  HostName 127.0.0.1
  Port {port}
  User {user}
  IdentityFile {keys}/user
  IdentitiesOnly yes
  UserKnownHostsFile {keys}/known_hosts
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
Host stranger
  HostName 127.0.0.1
  Port {port}
  User {user}
  UserKnownHostsFile {keys}/empty
  GlobalKnownHostsFile /dev/null
Host nobody-home
  HostName 127.0.0.1
  Port {closed}
"""


class Sshd:
    """A running server; `home` is a folder for what is written there, `target()` names it.

    Raises EdgeftError where no sshd is installed."""

    def __init__(self, folder: Path) -> None:
        program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
        if not program:
            raise EdgeftError("no sshd is installed", "Debian: apt install openssh-server")
        self.keys, self.home = folder / "keys", folder / "home"
        self.keys.mkdir()
        self.home.mkdir()
        for name in ("host", "user"):
            make = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.keys / name)]
            subprocess.run(make, check=True)
        port, closed = free_port(), free_port()
        (self.keys / "known_hosts").write_text(f"[127.0.0.1]:{port} {(self.keys / 'host.pub').read_text()}")
        values = {"port": port, "closed": closed, "keys": self.keys, "user": getpass.getuser()}
        (folder / "sshd_config").write_text(SERVER.format(**values))
        self.config = folder / "ssh_config"
        self.config.write_text(CLIENT.format(**values))
        if os.geteuid() == 0:
            Path("/run/sshd").mkdir(exist_ok=True)  # as the service does; only root's sshd wants it
        self.process = subprocess.Popen(
            [program, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=(folder / "sshd.log").open("w")
        )
        for _ in range(100):
            with socket.socket() as s:
                if s.connect_ex(("127.0.0.1", port)) == 0:
                    return
            time.sleep(0.05)
        raise RuntimeError((folder / "sshd.log").read_text())

    def target(self, host: str = "edge") -> str:
        return f"ssh:{host}:{self.home}"

    def drop_connections(self) -> int:
        """Kill the server's processes of all open connections; returns how many there were."""
        children = psutil.Process(self.process.pid).children(recursive=False)
        for child in children:
            for part in [*child.children(recursive=False), child]:
                if part.name().startswith("sshd"):
                    part.kill()
        return len(children)

    def left_behind(self, seconds: float = 10.0) -> list[str]:
        """Files in `home` and processes that work there; waits a little for them to go."""
        end = time.monotonic() + seconds
        while True:
            files = [str(path.relative_to(self.home)) for path in self.home.rglob("*")]
            here = [p.info["name"] for p in psutil.process_iter(["name", "cwd"])
                    if (p.info["cwd"] or "").startswith(str(self.home))]  # fmt: skip
            if not files + here or time.monotonic() > end:
                return files + here
            time.sleep(0.05)

    def close(self) -> None:
        self.drop_connections()
        self.process.terminate()
        self.process.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port
