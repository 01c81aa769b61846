"""The browser's runtimes: packages of npm at pinned versions, fetched once into the user's cache and checked there."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from edgeft.artifact import file_sha256
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.native import cache_folder

MOST_BYTES = 200 << 20  # of one package's files that are kept
RECORD = "edgeft.json"  # written last: a folder without it was never finished


@dataclass(frozen=True)
class Runtime:
    """One package of npm: the sha512 of its archive as the registry states it, and what of it is kept."""

    package: str
    version: str
    integrity: str  # https://www.w3.org/TR/SRI/
    keep: tuple[str, ...]  # paths inside the package, or folders that end with '/'

    @property
    def name(self) -> str:
        """Without the scope: 'wllama'."""
        return self.package.rpartition("/")[2]

    @property
    def folder(self) -> Path:
        """Where its files lie once they are fetched."""
        return cache_folder() / f"browser-{self.name}-{self.version}"


RUNTIMES = {  # format of a package -> what runs it
    "gguf": Runtime(
        "@wllama/wllama",
        "3.8.1",
        "sha512-Pl7BEJhPU8OHnV/yhn3DFZYhLLOdSHh+4TND79WCftHnlUAdQPAsyc/CfIOY+4mVxvf5VW3Xw3Uf7BBfotS1gw==",
        ("esm/index.js", "esm/wasm/wllama.wasm", "package.json", "LICENCE"),
    ),
    "onnx": Runtime(
        "onnxruntime-web",
        "1.30.0",
        "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        (
            "dist/ort.wasm.min.mjs",
            "dist/ort-wasm-simd-threaded.mjs",
            "dist/ort-wasm-simd-threaded.wasm",
            "package.json",
        ),
    ),
}


def find_runtime(fmt: str) -> Runtime:
    """The runtime of packages of this format, fetched and unchanged. Raises DeviceError if it is not."""
    runtime = RUNTIMES[fmt]
    record = runtime.folder / RECORD
    if not record.is_file():
        raise DeviceError(f"{runtime.package} {runtime.version} is not fetched yet", "edgeft device fetch-browser")
    known = json.loads(record.read_text("utf-8"))
    changed = [name for name, digest in known["files"].items() if not _is_file_with(runtime.folder / name, digest)]
    if known["integrity"] != runtime.integrity or changed:
        what = f": {changed[0]}" if changed else ""
        raise DeviceError(f"{runtime.folder} is not what was fetched{what}", "edgeft device fetch-browser --again")
    return runtime


def fetch_all(again: bool = False) -> list[Path]:
    """Fetch each runtime that is not there yet (all with `again`); returns their folders. Raises DeviceError."""
    folders = []
    for fmt, runtime in RUNTIMES.items():
        try:
            if again:
                raise DeviceError("asked for")
            find_runtime(fmt)
        except DeviceError:
            _fetch(runtime)
        folders.append(runtime.folder)
    return folders


def _fetch(runtime: Runtime) -> None:
    npm = shutil.which("npm")
    if npm is None:
        raise DeviceError("npm is not installed; it fetches the browser's runtimes", "install Node.js with npm")
    runtime.folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=runtime.folder.parent) as scratch:
        name = f"{runtime.package}@{runtime.version}"
        argv = [npm, "pack", name, "--ignore-scripts", "--pack-destination", scratch]
        done = subprocess.run(argv, cwd=scratch, capture_output=True, text=True, check=False)
        archives = list(Path(scratch).glob("*.tgz"))
        if done.returncode != 0 or len(archives) != 1:
            last = "\n".join(done.stderr.strip().splitlines()[-4:])
            raise DeviceError(f"npm cannot fetch {name}:\n{last}", "check the network, or npm's registry setting")
        unpacked = Path(scratch) / "unpacked"
        unpack(archives[0], runtime, unpacked)
        shutil.rmtree(runtime.folder, ignore_errors=True)
        unpacked.rename(runtime.folder)


def unpack(archive: Path, runtime: Runtime, folder: Path) -> None:
    """Write the kept files of an archive to a new folder.

    Raises DeviceError if the archive is not the pinned one, or a path in it leads out of it; no link is followed.
    """
    found = integrity_of(archive)
    if found != runtime.integrity:
        raise DeviceError(
            f"{runtime.package} {runtime.version} is not the archive that edgeft was tested with\n"
            f"  expected {runtime.integrity}\n  found    {found}",
            "check where npm fetches from; nothing of it was unpacked",
        )
    folder.mkdir(parents=True)
    files: dict[str, str] = {}
    size = 0
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            inside = PurePosixPath(member.name)
            if inside.is_absolute() or ".." in inside.parts:
                raise DeviceError(f"{archive.name} holds a path that leads out of it: {member.name}")
            name = "/".join(inside.parts[1:])  # behind the 'package/' that all archives of npm begin with
            if not member.isfile() or not _kept(name, runtime.keep):
                continue
            size += member.size
            if size > MOST_BYTES:
                raise DeviceError(f"{archive.name} holds more than {MOST_BYTES >> 20} MB of files that are kept")
            source = tar.extractfile(member)
            assert source is not None
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as out:
                shutil.copyfileobj(source, out)
            files[name] = file_sha256(target)
    record = {"package": runtime.package, "version": runtime.version, "integrity": runtime.integrity, "files": files}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def integrity_of(path: Path) -> str:
    """'sha512-...' of a file, as registries state it."""
    with path.open("rb") as f:
        digest = hashlib.file_digest(f, "sha512").digest()
    return "sha512-" + base64.b64encode(digest).decode("ascii")


def _kept(name: str, keep: tuple[str, ...]) -> bool:
    return any(name == path or (path.endswith("/") and name.startswith(path)) for path in keep)


def _is_file_with(path: Path, digest: str) -> bool:
    return path.is_file() and file_sha256(path) == digest
