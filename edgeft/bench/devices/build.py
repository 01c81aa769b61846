"""Building the native runner: llama.cpp's source out of llama-cpp-python's package, cmake, and a compiler.

For this machine that is the system's; for others it is Zig's clang from the PyPI package `ziglang`, which brings the
C library (musl) for every processor along: the program is static and needs nothing on the device.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path, PurePosixPath

from filelock import FileLock

from edgeft.artifact import file_sha256
from edgeft.bench.devices.native import (
    LEVELS,
    NATIVE,
    PROGRAM,
    RECORD,
    SOURCE,
    Level,
    cache_folder,
    checked,
    cmake_settings,
    folder_of,
    llama_cpp_version,
)
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter

PACKAGE = "llama-cpp-python"
SHA256 = {"0.3.36": "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"}  # of its source, by version
INSIDE = ("vendor", "llama.cpp")  # of the source package
NEEDED = ("CMakeLists.txt", "cmake", "ggml", "include", "src", "vendor", "LICENSE")
TOOLS = {"cc": "cc", "c++": "c++", "ar": "ar", "ranlib": "ranlib"}  # wrapper -> zig's name for the tool
OURS_ALONE = ("CC", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")  # of the environment: for other builds
STEP = re.compile(r"^\[\s*(\d+)(?:/(\d+)|%)\]")
LAST_LINES = 15


def levels_of(target: str) -> tuple[Level, ...]:
    """The builds that a target needs, the highest first."""
    return (Level(NATIVE),) if target == NATIVE else LEVELS[target]


def build_runner(target: str, level: Level, report: Reporter, source: Path | None = None, again: bool = False) -> Path:
    """The folder with the runner for a target at one level, and its record build.json; built if it is not there.

    `source`: llama.cpp's folder, by default out of the package that belongs to the installed llama-cpp-python; with it,
    or `again`, what is there already is built anew. Raises EdgeftError if a tool is missing or the build fails.
    """
    out = folder_of(target, level)
    log = out.with_name(f"{out.name}.log")
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{out}.lock"):
        if (out / RECORD).is_file() and not again and not source:
            checked(out)
            return out
        tools = _compilers(target, level)
        origin = str(source) if source else f"llama-cpp-python {llama_cpp_version()}"
        source = source or fetch_source(report)
        _check_source(source)
        partial = out.with_name(f"{out.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with tempfile.TemporaryDirectory(prefix="build-", dir=out.parent) as work:
            start = time.monotonic()
            program = _compile(source, Path(work), target, tools, report, log)
            shutil.copy(program, partial / PROGRAM)
        _write_record(partial, target, level, origin, time.monotonic() - start)
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
        log.unlink()
        return out


def _write_record(folder: Path, target: str, level: Level, source: str, seconds: float) -> None:
    program = folder / PROGRAM
    record = {
        "target": target,
        "level": level.name,
        "needs": list(level.needs),
        "sha256": file_sha256(program),
        "bytes": program.stat().st_size,
        "source": source,
        "settings": {**cmake_settings(target), "mcpu": level.mcpu},
        "seconds": round(seconds, 1),
    }
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n", "utf-8")


def fetch_source(report: Reporter) -> Path:
    """llama.cpp's folder from the source package of the installed llama-cpp-python, downloaded once.

    Raises EdgeftError if edgeft knows no sha256 of that version, if pip cannot fetch it or fetches something else.
    """
    wanted = f"{PACKAGE}=={llama_cpp_version()}"
    out = cache_folder() / f"llama.cpp-{llama_cpp_version()}"
    if out.is_dir():
        return out
    if llama_cpp_version() not in SHA256:
        raise EdgeftError(
            f"edgeft knows no sha256 of the source of {wanted}, only of {', '.join(SHA256)}",
            f"pip install -c constraints.txt {PACKAGE}, or name llama.cpp's folder of that package: --source FOLDER",
        )
    report.note(f"fetching the source of {wanted}")
    with tempfile.TemporaryDirectory(prefix="source-", dir=cache_folder()) as scratch:
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
        ran = _run([*pip, "--no-binary", PACKAGE, "--dest", scratch, wanted])
        packages = list(Path(scratch).glob("*.tar.gz"))
        if ran.returncode != 0 or len(packages) != 1:
            raise EdgeftError(
                f"pip cannot fetch the source of {wanted}\n{_last(ran.stderr)}",
                "check the network, or name llama.cpp's folder of that package: --source FOLDER",
            )
        if (found := file_sha256(packages[0])) != SHA256[llama_cpp_version()]:
            raise EdgeftError(
                f"{packages[0].name} is not the source that edgeft was tested with: its sha256 is {found}, not "
                f"{SHA256[llama_cpp_version()]}",
                "look at the index that pip asks (pip config list), and try again without a cache: pip cache purge",
            )
        unpacked = Path(scratch) / "llama.cpp"
        _unpack(packages[0], unpacked)
        unpacked.rename(out)
    return out


def _unpack(package: Path, out: Path) -> None:
    """The needed part of llama.cpp's folder."""
    with tarfile.open(package) as archive:
        for member in archive:
            path = PurePosixPath(member.name)
            inner = PurePosixPath(*path.parts[3:])
            if path.parts[1:3] == INSIDE and any(inner.is_relative_to(name) for name in NEEDED):
                member.name = str(inner)
                archive.extract(member, out, filter="data")


def _check_source(source: Path) -> None:
    missing = [name for name in ("CMakeLists.txt", "include/llama.h", "ggml", "src") if not (source / name).exists()]
    if missing or not (source / "vendor" / "nlohmann" / "json.hpp").is_file():
        raise EdgeftError(
            f"{source} is not llama.cpp's source: it lacks {', '.join(missing) or 'vendor/nlohmann/json.hpp'}",
            f"name the folder {'/'.join(INSIDE)} of the source package of {PACKAGE} {llama_cpp_version()}",
        )


def _compilers(target: str, level: Level) -> list[str]:
    """The compiler's command up to its name of a tool; empty for the system's own. Raises EdgeftError if missing."""
    if not shutil.which("cmake"):
        raise EdgeftError("cmake was not found; building the runner needs 3.21 or newer", "apt install cmake")
    if target == NATIVE:
        return []
    spec = find_spec("ziglang")
    zig = Path(spec.origin).parent / "zig" if spec and spec.origin else None
    if not zig or not zig.is_file():
        raise EdgeftError(
            f"building for {target} needs the package ziglang", "pip install 'edgeft[devices]'; it needs no NDK"
        )
    return [str(zig), "-target", f"{target}-linux-musl", f"-mcpu={level.mcpu}"]


def _write_wrappers(folder: Path, tools: Sequence[str]) -> dict[str, str]:
    """Programs that call zig's tools under one name each, as CMake wants them; the settings that name them."""
    zig, *options = tools
    folder.mkdir()
    for name, tool in TOOLS.items():
        own = [*options, "-fno-sanitize=undefined"] if name in ("cc", "c++") else []
        path = folder / name
        path.write_text(f'#!/bin/sh\nexec {shlex.join([zig, tool, *own])} "$@"\n', "utf-8")
        path.chmod(0o755)
    settings = {"C_COMPILER": "cc", "CXX_COMPILER": "c++", "ASM_COMPILER": "cc", "AR": "ar", "RANLIB": "ranlib"}
    settings |= {f"{language}_COMPILER_{tool}": tool.lower() for language in ("C", "CXX") for tool in ("AR", "RANLIB")}
    return {f"CMAKE_{key}": str(folder / name) for key, name in settings.items()}


def _compile(source: Path, work: Path, target: str, tools: list[str], report: Reporter, log: Path) -> Path:
    """Configure and build in `work`; returns the program. Raises EdgeftError with the log's last lines."""
    settings = {
        **cmake_settings(target),
        **(_write_wrappers(work / "tools", tools) if tools else {}),
        "LLAMA_CPP_SOURCE": str(source.resolve()),
        "LLAMA_CPP_VERSION": llama_cpp_version(),
    }
    configure = ["cmake", "-S", str(SOURCE), "-B", str(work / "out")]
    configure += [f"-D{name}={value}" for name, value in settings.items()]
    configure += ["-G", "Ninja"] if shutil.which("ninja") else []
    build = ["cmake", "--build", str(work / "out"), "--target", PROGRAM, "--parallel", str(os.cpu_count() or 1)]
    environment = {key: value for key, value in os.environ.items() if not tools or key not in OURS_ALONE}
    environment["ZIG_GLOBAL_CACHE_DIR"] = environment["ZIG_LOCAL_CACHE_DIR"] = str(work / "zig")
    with log.open("w+", encoding="utf-8", errors="replace") as said:
        configured = subprocess.run(configure, stdout=said, stderr=subprocess.STDOUT, env=environment)
        said.flush()
        code = configured.returncode or _follow(build, environment, said, report)
        if code != 0:
            said.seek(0)
            raise EdgeftError(f"building the runner for {target} failed\n{_last(said.read())}", f"all of it: {log}")
    return work / "out" / PROGRAM


def _follow(command: list[str], environment: dict[str, str], log: object, report: Reporter) -> int:
    """Run the build, its steps as a progress bar and all it says in the log; returns its exit code."""
    with (
        report.track("compiling, % of the steps", 100) as bar,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
            encoding="utf-8",
            errors="replace",
        ) as build,
    ):
        assert build.stdout is not None
        done = 0.0
        for line in build.stdout:
            print(line, end="", file=log)  # type: ignore[call-overload]
            if found := STEP.match(line):
                now = 100 * int(found[1]) / int(found[2] or 100)
                bar.advance(max(0.0, now - done))
                done = max(done, now)
    return build.returncode


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")


def _last(text: str) -> str:
    return "\n".join(f"  | {line}" for line in text.strip().splitlines()[-LAST_LINES:])
