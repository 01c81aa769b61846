"""A sound merge passes, whatever it is merged into; how it fails is in tests/sabotage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.export.sabotage import World
from benchmarks.export.ways_merge import adapter_of
from edgeft.errors import ParityError
from edgeft.formats.hf import load_model, save_model
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import encode_row
from edgeft.tune.fold_check import FOLD_KL, check_fold
from edgeft.tune.methods import merge_learned


@pytest.mark.parametrize(
    "settings",
    [{"method": "lora"}, {"method": "qlora"}, {"method": "lora", "dora": True}, {"method": "lora", "init": "pissa"}],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_a_sound_merge_is_the_adapter_beside_the_weights(settings: dict[str, object], tmp_path: Path) -> None:
    world = World(tmp_path)
    learned = adapter_of(world, tmp_path, **settings)
    model = load_model(world.model, torch.float32)
    merge_learned(model, learned, "dequantized")
    save_model(model, tmp_path / "merged", world.model)
    chat = ChatTokenizer.from_folder(world.model)
    turns = [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here it is."}]
    rows = [encode_row(chat, turns, 256, "row")]
    found = check_fold(world.model, learned, "dequantized", tmp_path / "merged", rows, max_kl=1e-3)
    assert found["fold_kl_mean"] < FOLD_KL
    assert found["validation"]["kl_max"] < 1e-3 and found["general"]["kl_max"] < 1e-3
    untouched = check_fold(world.model, learned, "dequantized", world.model, rows, max_kl=100)
    assert untouched["validation"]["kl_mean"] > 0.1
    limit = 0.99 * untouched["validation"]["kl_mean"]
    with pytest.raises(ParityError, match=r"worst row validation:1\n  \d+ tensors: \d+ differ, the first is model"):
        check_fold(world.model, learned, "dequantized", world.model, rows, max_kl=limit)
