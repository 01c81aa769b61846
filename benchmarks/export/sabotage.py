"""Ways to break an export on purpose, each with the gate that must catch it and what it must say.

`count()` tries them all on a tiny random model. Imported from the repository's root, as `benchmarks.export.sabotage`.
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from edgeft.errors import EdgeftError
from edgeft.export_settings import ExportSettings
from edgeft.formats import gguf
from edgeft.formats.onnx import build_onnx
from edgeft.formats.probe import Probe
from edgeft.plan import ExportNode
from edgeft.progress import Reporter
from edgeft.stages import export
from tests.formats.tiny_model import TEXTS, make_probe, write_tiny_llama


@dataclass(frozen=True)
class World:
    """A tiny model and its sound packages, read only; every sabotage breaks a copy in a folder of its own."""

    folder: Path

    @cached_property
    def model(self) -> Path:
        return write_tiny_llama(self.folder / "model")

    @cached_property
    def probe(self) -> Probe:
        return make_probe(self.model, TEXTS)

    @cached_property
    def gguf(self) -> Path:
        """A package in f16."""
        (self.folder / "gguf").mkdir()
        gguf.write_gguf(self.model, self.folder / "gguf" / "model.gguf", "f16")
        return self.folder / "gguf"

    @cached_property
    def onnx(self) -> Path:
        """A package in fp32."""
        build_onnx(self.model, self.folder / "onnx")
        return self.folder / "onnx"

    def check(self, package: Path, quant: str = "f16", model: Path | None = None, probe: Probe | None = None) -> None:
        """What the export stage does with a package it has written, with the limits a recipe has by default."""
        settings = ExportSettings()
        fmt = "gguf" if (package / "model.gguf").is_file() else "onnx"
        cfg = ExportNode(format=fmt, quant=quant, max_kl=settings.max_kl[quant], max_tail=settings.max_tail)  # type: ignore[index]
        export.check(cfg, model or self.model, probe or self.probe, package, Reporter("sabotage"))


@dataclass(frozen=True)
class Sabotage:
    """One way: `act` breaks something in an empty folder and hands it to the gate, which must raise `says`."""

    name: str
    gate: str
    says: str  # regular expression
    act: Callable[[World, Path], None]


WAYS: list[Sabotage] = []


def way(name: str, gate: str, says: str) -> Callable[[Callable[[World, Path], None]], Callable[[World, Path], None]]:
    """Put a function into the table."""

    def register(act: Callable[[World, Path], None]) -> Callable[[World, Path], None]:
        WAYS.append(Sabotage(name, gate, says, act))
        return act

    return register


def attempt(sabotage: Sabotage, world: World, out: Path) -> str | None:
    """The gate's words if it caught this sabotage by name; None if it passed, or was stopped for another reason."""
    try:
        sabotage.act(world, out)
    except EdgeftError as error:
        return str(error) if re.search(sabotage.says, str(error)) else None
    return None


def copied(folder: Path, out: Path) -> Path:
    """A copy of a folder, to break."""
    return Path(shutil.copytree(folder, out / "broken"))


def ways() -> list[Sabotage]:
    """The whole table."""
    from benchmarks.export import sabotage, ways_merge, ways_package  # noqa: F401 - the ways fill it

    return sabotage.WAYS  # also where this module is known by a shorter name


def count() -> tuple[int, int]:
    """How many ways there are, and how many were caught; those that were not are named on stderr."""
    caught = 0
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        for number, sabotage in enumerate(ways()):
            out = Path(folder) / str(number)
            out.mkdir()
            if attempt(sabotage, world, out) is None:
                print(f"not caught: {sabotage.name} (by {sabotage.gate})", file=sys.stderr)
            else:
                caught += 1
    return len(ways()), caught
