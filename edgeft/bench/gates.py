"""What a new package may lose against the old one: limits on figures, read from a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from edgeft.errors import RecipeError
from edgeft.settings import Settings

Limit = Annotated[float, Field(ge=0)]


class Gate(Settings):
    """Limits of one figure; at least one. A is the old package, B the new one."""

    max_drop: Limit | None = None
    """B - A may not be below minus this."""
    max_rise: Limit | None = None
    """B - A may not be above this."""
    min_ratio: Limit | None = None
    """B / A may not be below this."""
    max_ratio: Limit | None = None
    """B / A may not be above this."""
    minimum: float | None = None
    """B may not be below this."""
    maximum: float | None = None
    """B may not be above this."""

    @model_validator(mode="after")
    def _one_limit(self) -> Gate:
        if not self.model_fields_set:
            raise ValueError(f"names no limit; known: {', '.join(type(self).model_fields)}")
        return self


@dataclass(frozen=True)
class Verdict:
    """One limit and whether it is kept; `found` is the difference, ratio or value that it bounds."""

    figure: str
    limit: str
    bound: float
    found: float
    kept: bool


def read_gates(path: Path) -> dict[str, Gate]:
    """A gate file: {figure: limits}. Raises RecipeError with all unknown limits and wrong values."""
    if not path.is_file():
        raise RecipeError(f"{path}: no such file", "name a YAML file such as `joint_exact_match: {max_drop: 0.02}`")
    try:
        raw = yaml.safe_load(path.read_text("utf-8"))
        gates = TypeAdapter(dict[str, Gate]).validate_python(raw)
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML: {getattr(error, 'problem', error)}", "mend it") from None
    except ValidationError as error:
        problems = [f"  {'.'.join(str(part) for part in p['loc']) or path.name}: {p['msg']}" for p in error.errors()]
        raise RecipeError(
            f"{path}: not a gate file\n" + "\n".join(problems), "each line is FIGURE: {LIMIT: NUMBER}"
        ) from None
    return gates


def load_gates(path: Path, known: set[str]) -> dict[str, Gate]:
    """Likewise, for a comparison of the `known` figures. Raises RecipeError for others too."""
    gates = read_gates(path)
    unknown = sorted(set(gates) - known)
    if unknown or not gates:
        raise RecipeError(
            f"{path}: {'unknown figures ' + ', '.join(unknown) if unknown else 'no gate in it'}",
            f"figures of this comparison: {', '.join(sorted(known))}",
        )
    return gates


def judge(gates: dict[str, Gate], figures: dict[str, tuple[float, float]]) -> list[Verdict]:
    """Check every limit on the point values; `figures` holds (A, B) of every figure that a gate names."""
    verdicts = []
    for name, gate in gates.items():
        old, new = figures[name]
        ratio = new / old if old else float("inf") if new else 1.0
        checks: dict[str, tuple[float, bool]] = {  # limit -> (what it bounds, whether it is a lower bound)
            "max_drop": (old - new, False),
            "max_rise": (new - old, False),
            "min_ratio": (ratio, True),
            "max_ratio": (ratio, False),
            "minimum": (new, True),
            "maximum": (new, False),
        }
        for limit, (found, lower) in checks.items():
            bound: Any = getattr(gate, limit)
            if bound is not None:
                kept = found >= bound - ROUNDING if lower else found <= bound + ROUNDING
                verdicts.append(Verdict(name, limit, bound, found, kept))
    return verdicts


ROUNDING = 1e-12  # 0.92 - 0.90 is a little more than 0.02
