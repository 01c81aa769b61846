"""The shape that a student is cut to: the recipe's, or one on the way to it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from edgeft.errors import ModelError, RecipeError
from edgeft.learning_settings import WIDTH_UNIT, StudentSettings

K_QUANT_BLOCK = 256  # weights of a row that a k-quant of GGUF takes together
KINDS = ("llama", "mistral", "qwen2", "qwen3")  # model types that are cut in width
WIDTHS = ("ffn", "hidden", "kv_heads")
CONFIG = {
    "layers": "num_hidden_layers",
    "kv_heads": "num_key_value_heads",
    "ffn": "intermediate_size",
    "hidden": "hidden_size",
}


@dataclass(frozen=True)
class Goal:
    """A decoder's size; the names are those of the settings. A width that the model's config does not name is 0."""

    layers: int
    kv_heads: int
    ffn: int
    hidden: int

    def widths_off_k_quants(self) -> list[str]:
        """The widths that k-quants cannot take: tensors that wide become a larger type."""
        return [f"{name} {getattr(self, name)}" for name in ("ffn", "hidden") if getattr(self, name) % K_QUANT_BLOCK]


def goal_of(student: StudentSettings, config: Any, steps_left: int = 1) -> Goal:
    """What a model with this `config` is cut to now, with `steps_left` cuts to come, this one included.

    Each takes the same part of what is still too much; on the way widths stay multiples of WIDTH_UNIT above the last.
    Raises RecipeError with every setting that asks for more than there is, and as `check_kind` does.
    """
    now = {name: size_of(config, name) for name in CONFIG}
    asked = {name: getattr(student, name) for name in CONFIG}
    problems = [
        f"student.{name} is {value}; the model it is cut from has {now[name] or f'no {CONFIG[name]}'}"
        for name, value in asked.items()
        if value is not None and value > now[name]
    ]
    if problems:
        raise RecipeError("\n".join(problems), "choose no more than that, or null to keep all")
    if any(asked[name] is not None and asked[name] < now[name] for name in WIDTHS):
        check_kind(config)
    last = {name: now[name] if value is None else value for name, value in asked.items()}
    return Goal(**{f.name: _on_the_way(f.name, now[f.name], last[f.name], steps_left) for f in fields(Goal)})


def check_kind(config: Any) -> None:
    """Raises ModelError if a model with this config cannot be cut in width."""
    if config.model_type not in KINDS:
        raise ModelError(
            f"a model of type {config.model_type!r} cannot be cut in width; known: {', '.join(KINDS)}",
            "leave out student.ffn, student.hidden and student.kv_heads, or choose a base model of the llama family",
        )


def size_of(config: Any, name: str) -> int:
    """What a model's config says of a size; 0 if it does not name it."""
    return getattr(config, CONFIG[name], None) or 0


def _on_the_way(name: str, now: int, last: int, steps_left: int) -> int:
    unit = WIDTH_UNIT if name in ("ffn", "hidden") else 1
    return last + (now - last) * (steps_left - 1) // steps_left // unit * unit
