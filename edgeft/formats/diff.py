"""Where two models part: settings and tokens, tensors by name, and the first layer that computes something else."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgeft.errors import ModelError, ParityError
from edgeft.formats.sides import HEAD, Floats, Side, Tensor, open_side

FLOAT_TOLERANCE = 2e-3  # of settings; GGUF stores them as float32, a half-precision graph its rotary table even shorter
PLAIN = {"F64": 1e-6, "F32": 1e-6, "F16": 5e-4, "BF16": 4e-3}  # half a unit in the last place, of every value
SHOWN = 60  # characters of a long value around the place where it differs


@dataclass(frozen=True)
class FactGap:
    """A setting in which the two differ."""

    name: str
    a: str
    b: str


@dataclass(frozen=True)
class TensorGap:
    """A tensor of both: the root mean square of the difference, as a share of that of the values in A."""

    name: str
    kinds: str  # the types on both sides
    error: float
    allowed: float

    @property
    def parts(self) -> bool:
        """Whether the difference is more than storing it in these types makes."""
        return not self.error <= self.allowed


@dataclass(frozen=True)
class LayerGap:
    """A layer given the same input on both sides: the difference, as a share of what the layer adds in A."""

    name: str
    error: float
    allowed: float

    @property
    def parts(self) -> bool:
        return not self.error <= self.allowed


@dataclass(frozen=True)
class Diff:
    """All that was compared, in the model's order."""

    facts: list[FactGap]
    missing: list[str]  # tensors of one side only
    tensors: list[TensorGap]
    layers: list[LayerGap]

    @property
    def equal(self) -> bool:
        return not any(self.parts().values())

    def parts(self) -> dict[str, list[str]]:
        """What was compared, and how it differs: every setting, the first and worst tensor, the first layer."""
        more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
        only = [f"of one side only: {', '.join(self.missing[:3])}{more}"] if self.missing else []
        return {
            "settings": [f"{gap.name}: {gap.a} in A, {gap.b} in B" for gap in self.facts],
            f"{len(self.tensors)} tensors": only + _first_and_worst(self.tensors),
            f"{len(self.layers)} layers": _first_and_worst(self.layers),
        }


def diff(a: Path, b: Path, layers: bool = True) -> Diff:
    """Compare two models. `layers` runs them in torch, where one side is a folder with config.json."""
    with_a, with_b = open_side(a), open_side(b)
    try:
        tensors = compare_tensors(with_a, with_b)
        names = [gap.name for gap in tensors]
        only = sorted((set(with_a.tensors) ^ set(with_b.tensors)) - set(names))
        gaps: list[LayerGap] = []
        if layers and not only and all(math.isfinite(gap.error) for gap in tensors):
            from edgeft.formats.layers import compare_layers

            gaps = compare_layers(with_a, with_b, tensors)
        return Diff(compare_facts(with_a, with_b), only, tensors, gaps)
    finally:
        with_a.open_files.close()
        with_b.open_files.close()


def check_facts(model: Path, package: Path) -> None:
    """Raises ParityError if a package says something else of itself than the model it was made from."""
    with_model, with_package = open_side(model), open_side(package)
    with_model.open_files.close()
    if gaps := compare_facts(with_model, with_package):
        said = "; ".join(f"{gap.name}: {gap.a} in the model, {gap.b} in the package" for gap in gaps)
        raise ParityError(
            f"the package is not of this model: {said}",
            "apps would tokenise or compute otherwise: export the package again",
        )


def where_they_part(model: Path, package: Path) -> str:
    """For an error message: the first and the worst tensor, or the first layer, in which a package differs."""
    try:
        parts = diff(model, package).parts()
    except ModelError as error:
        return f"where they part is not known: {error}"
    found = [f"{what}: {line}" for what, lines in parts.items() for line in lines]
    return "\n  ".join(found) or "no tensor or layer differs by more than its type allows: the type is too narrow"


def compare_facts(a: Side, b: Side) -> list[FactGap]:
    """The settings that both state, and state differently."""
    pairs = {name: (value, b.facts[name]) for name, value in a.facts.items() if name in b.facts}
    return [FactGap(name, *_shown(*pair)) for name, pair in pairs.items() if not _same(*pair)]


def compare_tensors(a: Side, b: Side) -> list[TensorGap]:
    """Tensors that both hold, in the model's order."""
    gaps = []
    for name in sorted(set(a.tensors) | set(b.tensors), key=model_order):
        of_a, of_b = a.tensor(name), b.tensor(name)
        if of_a and of_b:
            kinds = of_a.kind if of_a.kind == of_b.kind else f"{of_a.kind}, {of_b.kind}"
            error = relative_error(of_a.read(), of_b.read())
            gaps.append(TensorGap(name, kinds, error, allowed_error(of_a, of_b)))
    return gaps


def relative_error(a: Floats, b: Floats) -> float:
    """Root mean square of a - b as a share of that of a; infinite if the shapes differ or a value is not finite."""
    if a.shape != b.shape:
        return math.inf
    with np.errstate(invalid="ignore", over="ignore"):
        gap, size = (float(np.sqrt(np.mean(np.square(x, dtype=np.float64)))) for x in (a - b, a))
    if not math.isfinite(gap) or not math.isfinite(size):
        return math.inf
    return gap / size if size else (math.inf if gap else 0.0)


def allowed_error(a: Tensor, b: Tensor) -> float:
    """The largest relative error that the types of both sides explain."""
    return _type_error(a.kind) + _type_error(b.kind)


def _type_error(kind: str) -> float:
    """Twice what normally distributed weights lose in blocks of 32 with so many bits.

    The largest of 32 is about 2 standard deviations out, so a step is 4.1 / (2^bits - 1) of one, and rounding to it
    makes an error of step / sqrt(12).
    """
    if kind in PLAIN:
        return PLAIN[kind]
    bits = int(found[0]) if (found := re.search(r"\d", kind)) else 4
    levels: float = 2**bits - 1
    return 2 * 4.1 / levels / math.sqrt(12)


def model_order(name: str) -> tuple[int, int, str]:
    """Sorts tensors as the model computes: embedding, layers, last norm, head."""
    layer = re.search(r"\.(\d+)\.", name)
    place = 1 if layer else 0 if "embed" in name else 3 if name == HEAD else 2
    return place, int(layer[1]) if layer else 0, name


def _first_and_worst(compared: Sequence[TensorGap | LayerGap]) -> list[str]:
    gaps = [gap for gap in compared if gap.parts]
    if not gaps:
        return []
    first, worst = gaps[0], max(gaps, key=lambda gap: gap.error / gap.allowed)
    lines = [f"{len(gaps)} differ, the first is {_gap(first)}"]
    return lines if worst is first else [*lines, f"the worst is {_gap(worst)}"]


def _gap(gap: TensorGap | LayerGap) -> str:
    kinds = f" ({gap.kinds})" if isinstance(gap, TensorGap) else ""
    return f"{gap.name}{kinds}: {gap.error:.3g} of its size, {gap.allowed:.2g} allowed"


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, float) or isinstance(b, float):
        return math.isclose(a, b, rel_tol=FLOAT_TOLERANCE)
    if isinstance(a, list) and isinstance(b, list):
        return _trimmed(a) == _trimmed(b)
    return bool(a == b)


def _trimmed(values: list[Any]) -> list[Any]:
    """Without what only fills the table up at its end."""
    end = next((i for i in range(len(values), 0, -1) if values[i - 1] is not None), 0)
    return values[:end]


def _shown(a: Any, b: Any) -> tuple[str, str]:
    """Both values; of long ones the place where they begin to differ."""
    if not isinstance(a, list | str):
        return f"{a:.6g}" if isinstance(a, float) else str(a), f"{b:.6g}" if isinstance(b, float) else str(b)
    shorter = min(len(a), len(b))
    at = next((i for i in range(shorter) if a[i] != b[i]), shorter)
    if isinstance(a, str):
        return tuple(repr(value[max(0, at - SHOWN // 2) : at + SHOWN // 2]) for value in (a, b))  # type: ignore[return-value]
    return tuple(f"{value[at]!r} at {at}" if at < len(value) else f"{len(value)} of them" for value in (a, b))  # type: ignore[return-value]
