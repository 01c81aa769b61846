"""The native runner in the user's cache: which build fits which processor, and that nobody has changed it since."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from edgeft.artifact import digest_of, file_sha256
from edgeft.bench.devices.device import DeviceError

SOURCE = Path(__file__).parent / "runner"
PROGRAM, RECORD = "edgeft-runner", "build.json"
NATIVE = "native"


@dataclass(frozen=True)
class Level:
    """What a build may use of a processor: `mcpu` in the compiler's names, `needs` in those of /proc/cpuinfo."""

    name: str
    mcpu: str = ""
    needs: tuple[str, ...] = ()


# For each machine, as `uname -m` calls it, the highest first; the last runs on any of them. Armv9's own SVE2 is left
# out: many phones' kernels hide it, and llama.cpp's matrix products do well with the 8-bit ones (i8mm).
_ARM_V8_2 = ("asimd", "atomics", "asimdrdm", "asimdhp", "asimddp")
LEVELS = {
    "aarch64": (
        Level("armv9", "generic+v8_2a+fullfp16+dotprod+i8mm+bf16", (*_ARM_V8_2, "i8mm", "bf16")),
        Level("armv8.2", "generic+v8_2a+fullfp16+dotprod", _ARM_V8_2),
        Level("armv8.0", "generic"),
    ),
    "x86_64": (Level("x86-64-v3", "x86_64_v3", ("avx2", "bmi2", "fma", "f16c")),),
}
TARGETS = (NATIVE, *LEVELS)


def find_runner(machine: str, system: str = "linux", features: Sequence[str] = ()) -> Path:
    """The first of `find_runners`."""
    return find_runners(machine, system, features)[0]


def find_runners(machine: str, system: str = "linux", features: Sequence[str] = ()) -> list[Path]:
    """Runners for a machine ('aarch64', as `uname -m` says) whose processor has `features` (of /proc/cpuinfo).

    On a Linux like this one the native build comes first, if there is one; it needs a C library like this one's, so it
    may not start. Then the highest of the built levels that the features allow, the lowest if none are given. Raises
    DeviceError if none of them is built, it was changed, or there is none for such a machine.
    """
    if system.lower() not in ("linux", "android") or machine not in LEVELS:
        raise DeviceError(
            f"there is no runner for {system} on {machine}", f"it runs on Linux and Android on {', '.join(LEVELS)}"
        )
    native = [checked(folder_of(NATIVE, Level(NATIVE)))] if _like_this_one(machine, system, features) else []
    fit = _fitting(machine, features)
    if not fit and not native:
        raise DeviceError(
            f"no runner is made for a {machine} processor without {', '.join(LEVELS[machine][-1].needs)}",
            "install edgeft there and measure on it: edgeft bench PACKAGE",
        )
    built = [level for level in fit if (folder_of(machine, level) / RECORD).is_file()]
    if native and not built:
        return native
    return [*native, runner_of(machine, (built or fit)[0])]


def better_runner(machine: str, features: Sequence[str], system: str = "linux") -> str | None:
    """The command that builds a runner of a higher level than the one that `find_runner` gives; None if it is the
    highest that fits."""
    fit = _fitting(machine, features)
    if not fit or _like_this_one(machine, system, features) or (folder_of(machine, fit[0]) / RECORD).is_file():
        return None
    return build_command(machine, fit[0])


def _fitting(machine: str, features: Sequence[str]) -> list[Level]:
    """Levels that the features allow, the highest first; the lowest of all if no features are known."""
    if not features:
        return [LEVELS[machine][-1]]
    return [level for level in LEVELS[machine] if set(level.needs) <= set(features)]


def _like_this_one(machine: str, system: str, features: Sequence[str]) -> bool:
    """Whether the native build is there and made for such a system and processor."""
    here = (platform.system().lower(), platform.machine())
    built = (folder_of(NATIVE, Level(NATIVE)) / RECORD).is_file()
    return built and (system.lower(), machine) == here and set(own_features()) <= set(features)


def runner_of(target: str, level: Level) -> Path:
    """The runner built for a target at one level. Raises DeviceError if it is not built or was changed."""
    folder = folder_of(target, level)
    if not (folder / RECORD).is_file():
        raise DeviceError(f"the runner for {_said(target, level)} is not built", f"{build_command(target, level)}")
    return checked(folder)


def checked(folder: Path) -> Path:
    """The program in a folder of the cache. Raises DeviceError if it is not the one that was built."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
    program = folder / PROGRAM
    if not program.is_file() or file_sha256(program) != record["sha256"]:
        raise DeviceError(
            f"{program} is not the program that was built: its sha256 is another",
            f"{build_command(record['target'], Level(record['level']))} --again",
        )
    return program


def folder_of(target: str, level: Level) -> Path:
    """Where the build of this source, of the installed llama.cpp and with these flags lies, or will."""
    parts: list[Any] = [source_digest(), llama_cpp_version(), target, level.mcpu, cmake_settings(target)]
    if target == NATIVE:
        parts += [platform.machine(), *own_features()]
    return cache_folder() / f"runner-{level.name}-{digest_of(parts)[:16]}"


def cmake_settings(target: str) -> dict[str, str]:
    """Settings that decide what is built, beside the compilers."""
    if target == NATIVE:
        return {"CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "ON", "RUNNER_STATIC": "OFF"}
    foreign = {"CMAKE_SYSTEM_NAME": "Linux", "CMAKE_SYSTEM_PROCESSOR": target}
    return {"CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "OFF", "RUNNER_STATIC": "ON", **foreign}


def source_digest() -> str:
    """Of all files that the runner is made of, beside llama.cpp."""
    digest = hashlib.sha256()
    for path in sorted(SOURCE.iterdir()):
        digest.update(f"{path.name}\0{file_sha256(path)}\0".encode())
    return digest.hexdigest()


def llama_cpp_version() -> str:
    """Version of the package whose llama.cpp the runner is built from: the one that runs here."""
    return version("llama-cpp-python")


def cache_folder() -> Path:
    """EDGEFT_CACHE, or edgeft's folder among the user's caches."""
    if own := os.environ.get("EDGEFT_CACHE"):
        return Path(own)
    usual = Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache")
    return Path(os.environ.get("XDG_CACHE_HOME") or usual) / "edgeft"


def own_features() -> list[str]:
    """What this machine's processor can do; nothing where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    return features_in(cpuinfo.read_text("utf-8", errors="replace")) if cpuinfo.is_file() else []


def features_in(cpuinfo: str) -> list[str]:
    """Features that all cores in a /proc/cpuinfo have, in order of their names."""
    per_core = [
        set(value.split())
        for key, _, value in (line.partition(":") for line in cpuinfo.splitlines())
        if key.strip() in ("Features", "flags")
    ]
    return sorted(set.intersection(*per_core)) if per_core else []


def level_called(target: str, name: str) -> Level:
    """Raises DeviceError with the names that there are."""
    for level in LEVELS.get(target, ()):
        if level.name == name:
            return level
    known = ", ".join(level.name for level in LEVELS.get(target, ())) or "no levels: it is built for this processor"
    raise DeviceError(f"no level of {target} is called {name!r}", f"there are {known}")


def build_command(target: str, level: Level) -> str:
    """What the user has to type to get a runner."""
    choice = "" if target == NATIVE else f" --cpu {level.name}"
    return f"edgeft device build-runner --target {target}{choice}"


def _said(target: str, level: Level) -> str:
    return "this machine" if target == NATIVE else f"{target} ({level.name})"
