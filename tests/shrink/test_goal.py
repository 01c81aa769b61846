"""The shapes a student passes through, and what is refused."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from edgeft.errors import ModelError, RecipeError
from edgeft.learning_settings import StudentSettings
from edgeft.shrink.goal import Goal, goal_of

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_key_value_heads": 3,
}


def reached(student: StudentSettings, steps: int) -> list[Goal]:
    """The shapes after each step."""
    config, found = dict[str, Any](CONFIG), list[Goal]()
    for left in range(steps, 0, -1):
        goal = goal_of(student, SimpleNamespace(**config), left)
        found.append(goal)
        config |= {"num_hidden_layers": goal.layers, "hidden_size": goal.hidden, "intermediate_size": goal.ffn,
                   "num_key_value_heads": goal.kv_heads}  # fmt: skip
    return found


def test_null_keeps_all() -> None:
    assert reached(StudentSettings(layers=None), 1) == [Goal(layers=30, kv_heads=3, ffn=1536, hidden=576)]
    assert reached(StudentSettings(), 1) == [Goal(layers=15, kv_heads=3, ffn=1536, hidden=576)]


def test_steps_are_equal_and_the_last_is_the_recipes_shape() -> None:
    student = StudentSettings(layers=12, ffn=768, hidden=512, kv_heads=2)
    assert reached(student, 3) == [
        Goal(layers=24, kv_heads=2, ffn=1280, hidden=544),
        Goal(layers=18, kv_heads=2, ffn=1024, hidden=512),
        Goal(layers=12, kv_heads=2, ffn=768, hidden=512),
    ]


@pytest.mark.parametrize("steps", [1, 2, 5, 40])
def test_no_step_grows_and_widths_stay_in_blocks(steps: int) -> None:
    student = StudentSettings(layers=1, ffn=32, hidden=32, kv_heads=1)
    shapes = [Goal(30, 3, 1536, 576), *reached(student, steps)]
    for name in ("layers", "kv_heads", "ffn", "hidden"):
        sizes = [getattr(shape, name) for shape in shapes]
        assert sizes == sorted(sizes, reverse=True)
        assert name in ("layers", "kv_heads") or all(size % 32 == 0 for size in sizes)
    assert shapes[-1] == Goal(1, 1, 32, 32)


def test_everything_that_is_too_much_is_named_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        goal_of(StudentSettings(layers=40, ffn=2048, kv_heads=4), SimpleNamespace(**CONFIG))
    text = str(caught.value)
    for line in ("student.layers is 40", "student.ffn is 2048", "has 1536", "student.kv_heads is 4"):
        assert line in text
    assert "hidden" not in text


def test_a_model_that_names_no_widths_can_be_cut_in_depth_alone() -> None:
    other = SimpleNamespace(model_type="gpt_neox", num_hidden_layers=6, intermediate_size=512)
    assert goal_of(StudentSettings(layers=3), other) == Goal(layers=3, kv_heads=0, ffn=512, hidden=0)
    with pytest.raises(RecipeError, match="student.kv_heads is 2; .* has no num_key_value_heads"):
        goal_of(StudentSettings(layers=3, kv_heads=2), other)
    with pytest.raises(ModelError, match="'gpt_neox' cannot be cut in width"):
        goal_of(StudentSettings(layers=3, ffn=256), other)


@pytest.mark.parametrize("setting", [{"ffn": 1000}, {"hidden": 0}, {"kv_heads": 0}, {"steps": 0}])
def test_sizes_that_no_package_could_hold_are_refused_in_the_recipe(setting: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StudentSettings(**setting)


def test_widths_that_k_quants_cannot_take_are_named() -> None:
    assert Goal(1, 1, 1536, 512).widths_off_k_quants() == []
    assert Goal(1, 1, 1000, 576).widths_off_k_quants() == ["ffn 1000", "hidden 576"]
