"""Every method trains what it says and nothing else, and merging gives the function that was trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from edgeft.artifact import Artifact, Manifest
from edgeft.errors import ModelError
from edgeft.learning_settings import TrainSettings
from edgeft.progress import Reporter
from edgeft.text.encode import Encoded
from edgeft.tune.batches import collate
from edgeft.tune.fit import fit
from edgeft.tune.losses import answer_logits, answer_loss
from edgeft.tune.methods import Learner, make_learner, merge_learned, save_learned
from edgeft.tune.precision import Compute
from edgeft.tune.qlora import FourBits, dequantized_base
from edgeft.tune.validation import Validation

CPU = Compute(torch.device("cpu"), torch.float32, {})
ROW = Encoded(tuple(range(1, 13)), tuple(i > 4 for i in range(12)))
BATCH = collate([ROW], 0)
LINEAR = r"(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.weight"
METHODS: dict[str, tuple[dict[str, Any], str]] = {  # settings, and which weights of the merged model may differ
    "qlora": ({}, LINEAR),
    "qlora fp4": ({"quant": "fp4"}, LINEAR),
    "qlora without double quantisation": ({"double_quant": False}, LINEAR),
    "qlora with dropout": ({"dropout": 0.2}, LINEAR),
    "lora": ({"method": "lora"}, LINEAR),
    "rslora": ({"method": "lora", "rslora": True}, LINEAR),
    "dora": ({"method": "lora", "dora": True}, LINEAR),
    "qlora, dora, rslora": ({"dora": True, "rslora": True}, LINEAR),
    "pissa": ({"init": "pissa"}, LINEAR),
    "pissa over lora": ({"method": "lora", "init": "pissa"}, LINEAR),
    "loftq": ({"init": "loftq"}, LINEAR),
    "one kind": ({"method": "lora", "target_modules": ("up_proj",)}, r"mlp\.up_proj\.weight"),
    "a pattern": ({"method": "lora", "target_modules": ("*.1.mlp.*",)}, r"layers\.1\.mlp\..*\.weight"),
    "the last layer": ({"method": "lora", "last_layers": 1}, r"layers\.2\..*" + LINEAR),
    "full": ({"method": "full"}, ".*"),
    "the last two layers in full": ({"method": "full", "last_layers": 2}, r"layers\.[12]\..*"),
}


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def base_of(cfg: TrainSettings) -> LlamaForCausalLM:
    """The model that a method starts from, as it is before anything is learned."""
    model = tiny()
    if cfg.method == "qlora":
        dequantized_base(model, FourBits(cfg.quant, cfg.double_quant))
    return model


def trained(cfg: TrainSettings, folder: Path) -> tuple[Learner, Artifact]:
    """Some steps of training; the artifact as the stage writes it."""
    learner = make_learner(tiny(), cfg, CPU, len(ROW.ids))

    def loss_of(numbers: object) -> tuple[torch.Tensor, int, int]:
        return answer_loss(answer_logits(learner.model, BATCH), BATCH.labels_N), len(BATCH.labels_N), BATCH.num_tokens

    weights, history = fit(
        learner.trained, [12] * 4, loss_of, lambda: Validation(1.0, 0.0), cfg, folder / "checkpoints", Reporter("t")
    )
    assert history.steps[-1]["loss"] < history.steps[0]["loss"] - 0.1, "it does not learn"
    with torch.no_grad():
        for name, value in learner.trained.named_parameters():
            if value.requires_grad:
                value.copy_(weights[name])  # the kept ones; here the first evaluation's
    out = folder / "learned"
    out.mkdir()
    save_learned(learner, cfg, weights, "sha256:0", out)
    files = dict.fromkeys((path.name for path in out.iterdir()), None)
    return learner, Artifact(out, Manifest("adapter", "train", "0", cfg.model_dump(), {}, files))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_what_it_says_and_merging_gives_the_function_that_was_trained(
    name: str, tmp_path: Path
) -> None:
    settings, may_differ = METHODS[name]
    cfg = TrainSettings(rank=4, alpha=8, lr=0.01, epochs=6, batch_rows=2, evaluations=1, precision="fp32", **settings)
    learner, artifact = trained(cfg, tmp_path)
    merged, before = tiny(), base_of(cfg).state_dict()
    report = merge_learned(merged, artifact, "dequantized")
    changed = {key for key, value in merged.state_dict().items() if not torch.allclose(value, before[key], atol=1e-4)}
    assert changed, "nothing was trained"
    assert not [key for key in changed if not re.search(may_differ, key)]
    missing = [key for key in before if re.search(rf"({may_differ})$", key) and key not in changed]
    assert not missing, "parts of what the method names were not trained"
    assert report["max_abs_update"] > 0
    learner.trained.eval()
    with torch.no_grad():
        expected = answer_logits(learner.model, BATCH)
        torch.testing.assert_close(answer_logits(merged, BATCH), expected, atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("name", ["qlora", "dora", "full"])
def test_half_of_the_strength_is_half_way_between_base_and_trained(name: str, tmp_path: Path) -> None:
    cfg = TrainSettings(
        rank=4, alpha=8, lr=0.01, epochs=6, batch_rows=2, evaluations=1, precision="fp32", **METHODS[name][0]
    )
    _, artifact = trained(cfg, tmp_path)
    half, whole, base = tiny(), tiny(), base_of(cfg).state_dict()
    reports = [
        merge_learned(model, artifact, "dequantized", strength) for model, strength in ((half, 0.5), (whole, 1.0))
    ]
    for key, value in half.state_dict().items():
        torch.testing.assert_close(value, (base[key] + whole.state_dict()[key]) / 2, atol=1e-5, rtol=1e-4)
    assert reports[0]["max_abs_update"] == pytest.approx(reports[1]["max_abs_update"] / 2)


def test_pissa_starts_from_the_base_itself() -> None:
    cfg = TrainSettings(method="lora", init="pissa", rank=4, alpha=8)
    learner = make_learner(tiny(), cfg, CPU, 12)
    with torch.no_grad():
        torch.testing.assert_close(
            answer_logits(learner.model, BATCH), answer_logits(tiny(), BATCH), atol=1e-4, rtol=1e-4
        )
    assert all(float(a.abs().max()) > 0 for pair in learner.subtracted.values() for a in pair)


def test_loftq_starts_nearer_to_the_unquantised_base_than_qlora() -> None:
    def distance(init: str) -> float:
        cfg = TrainSettings(init=init, rank=16, alpha=16)  # type: ignore[arg-type]
        with torch.no_grad():
            start = answer_logits(make_learner(tiny(), cfg, CPU, 12).model, BATCH)
            return float((start - answer_logits(tiny(), BATCH)).norm())

    assert distance("loftq") < 0.8 * distance("lora")


def test_two_adapters_trained_from_one_base_do_not_touch_it_or_each_other(tmp_path: Path) -> None:
    merged = []
    for seed in (1, 2):
        cfg = TrainSettings(
            method="lora", rank=4, alpha=8, lr=0.01, epochs=6, batch_rows=2, evaluations=1, precision="fp32", seed=seed
        )
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = tiny()
        merge_learned(model, trained(cfg, folder)[1], "original")
        merged.append(model.model.layers[0].mlp.up_proj.weight)
    assert not torch.allclose(merged[0], merged[1], atol=1e-4)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    cfg = TrainSettings(method="full", last_layers=1, lr=0.01, epochs=6, batch_rows=2, evaluations=1, precision="fp32")
    _, artifact = trained(cfg, tmp_path)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    )
    with pytest.raises(ModelError, match=r"do not fit the model: 'model\.layers\.2"):
        merge_learned(LlamaForCausalLM(config), artifact, "dequantized")
