"""Every way to break an export is caught, by the gate that should and in words that name it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export.sabotage import Sabotage, World, attempt, ways
from tests.formats.tiny_model import tiny_onnx


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"))
    (world.folder / "onnx").symlink_to(tiny_onnx(tmp_path_factory)[1])  # built once for all tests
    world.__dict__["onnx"] = world.folder / "onnx"
    return world


def test_sound_packages_pass(world: World) -> None:
    world.check(world.gguf)
    world.check(world.onnx, "fp32")


@pytest.mark.parametrize("sabotage", ways(), ids=lambda sabotage: sabotage.name)
def test_it_is_caught_by_name(sabotage: Sabotage, world: World, tmp_path: Path) -> None:
    assert attempt(sabotage, world, tmp_path), f"{sabotage.gate} did not catch it"


def test_there_are_many_and_no_two_of_one_name() -> None:
    names = [sabotage.name for sabotage in ways()]
    assert len(names) == len(set(names)) >= 20
