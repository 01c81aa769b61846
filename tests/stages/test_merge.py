"""Where an adapter lands is measured; what is written is what was chosen."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.export.sabotage import World
from benchmarks.export.ways_merge import adapter_of
from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest
from edgeft.formats.hf import load_model
from edgeft.learning_settings import MergeSettings, TrainSettings
from edgeft.plan import MergeNode
from edgeft.progress import Reporter
from edgeft.stages import merge
from edgeft.text.chat import ChatTokenizer
from edgeft.text.encode import Encoded
from edgeft.tune.generate import greedy_answers
from edgeft.tune.landing import best_way, choose_into, cut_weights
from edgeft.tune.methods import ADAPTER, merge_learned
from edgeft.tune.precision import Compute
from edgeft.tune.qlora import FourBits, decoder_linears, dequantized_base

LIMIT = 10.0  # nats of a merge from the trained model: what is merged here is random
ORIGINAL_LAYERS = (2, 3)  # of the four of the tiny model, in the test's mixed model


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def base(world: World) -> Artifact:
    write_manifest(world.model, Manifest("model", "base", "0" * 16, {}, {}, scan_files(world.model)))
    return open_artifact(world.model)


@pytest.fixture(scope="module")
def inputs(world: World, base: Artifact, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """A qlora adapter that does next to nothing, and a few rows."""
    folder = tmp_path_factory.mktemp("inputs")
    learned = adapter_of(world, folder, method="qlora")
    values = {name: value * 1e-2 for name, value in load_file(learned.path / ADAPTER).items()}
    save_file(values, learned.path / ADAPTER, metadata={"format": "pt"})
    validation = {"loss": 1.0, "exact_match": 0.5}
    records = {"precision": "fp32", "validation": validation}
    config = TrainSettings(method="qlora", rank=4, alpha=12, choose_by="loss").model_dump(mode="json")
    made = Manifest("adapter", "train", "1" * 16, config, {"model": base.digest}, learned.manifest.files, records)
    return {
        "model": base,
        "adapter": Artifact(learned.path, made),
        "dataset": dataset(folder / "data"),
    }


def dataset(folder: Path) -> Artifact:
    folder.mkdir()
    draw = random.Random(0)
    rows = [
        [{"role": role, "content": "".join(draw.choices("abc def", k=12))} for role in ("user", "assistant")]
        for _ in range(12)
    ]
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in rows)
    (folder / "validation.jsonl").write_text(lines, "utf-8")
    write_manifest(folder, Manifest("dataset", "data", "2" * 16, {}, {}, scan_files(folder)))
    return open_artifact(folder)


def answered_by_the_mixed_model(model: Path) -> list[Encoded]:
    """Questions with the greedy answers of the model that has the other two layers in 4 bits."""
    mixed: Any = load_model(model, torch.float32)
    dequantized_base(mixed, FourBits(), [n for n in range(4) if n not in ORIGINAL_LAYERS])
    chat, draw = ChatTokenizer.from_folder(model), random.Random(0)
    texts = ["".join(draw.choices("abc def", k=12)) for _ in range(60)]
    prompts = [chat.prompt_ids([{"role": "user", "content": text}]) for text in texts]
    answers = greedy_answers(mixed, prompts, chat, 12)
    return [
        Encoded((*prompt, *answer), (*[False] * len(prompt), *[True] * len(answer)))
        for prompt, answer in zip(prompts, answers, strict=True)
        if answer
    ]


def run(inputs: dict[str, Artifact], out: Path, bits: int | None = None, **settings: Any) -> tuple[dict[str, Any], str]:
    out.mkdir()
    said = io.StringIO()
    cfg = MergeNode(merge=MergeSettings(strength=1.0, **settings), max_kl=LIMIT, bits=bits)  # type: ignore[arg-type]
    return merge.run(cfg, inputs, out, Reporter("merge", out, said)), said.getvalue()


def test_each_layer_takes_the_base_with_which_the_rows_are_likelier(
    inputs: dict[str, Artifact], base: Artifact
) -> None:
    compute = Compute(torch.device("cpu"), torch.float32, {})
    rows = answered_by_the_mixed_model(base.path)
    best, into, found = choose_into("auto", base.path, inputs["adapter"], rows, None, compute)
    assert found["original_layers"] == list(ORIGINAL_LAYERS)
    assert best == "per_layer" and list(into) == [
        "original" if n in ORIGINAL_LAYERS else "dequantized" for n in range(4)
    ]
    looks = {way: looks["as_is"] for way, looks in found["ways"].items()}
    assert looks["dequantized"]["kl_mean"] < 1e-6 < 1e-3 < looks["original"]["kl_mean"]
    assert looks["per_layer"]["loss"] < min(looks["dequantized"]["loss"], looks["original"]["loss"])


def test_what_is_written_is_what_was_chosen_and_measured_in_the_bits_of_the_packages(
    inputs: dict[str, Artifact], base: Artifact, tmp_path: Path
) -> None:
    found, said = run(inputs, tmp_path / "out", bits=4, into="per_layer")
    measured = found["into_measured"]
    assert found["into"] == "per_layer" and "in 4 bits" in said
    for looks in measured["ways"].values():
        assert looks["cut"]["kl_mean"] > looks["as_is"]["kl_mean"]
    expected: Any = load_model(base.path, torch.float32)
    into = ["original" if n in measured["original_layers"] else "dequantized" for n in range(4)]
    merge_learned(expected, inputs["adapter"], into)
    written = load_model(tmp_path / "out", torch.float32).state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(written[name], value, msg=name)


def test_a_named_way_is_taken_and_nothing_else_tried(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    found, _ = run(inputs, tmp_path / "out", into="original")
    assert (found["into"], found["into_measured"]) == ("original", None)
    assert found["from_trained"]["validation"]["kl_mean"] > 1e-3
    assert found["validation_as_trained"] == inputs["adapter"].metrics["validation"] and "combined" not in found


def test_several_adapters_are_merged_into_one_and_all_figures_are_of_that(
    inputs: dict[str, Artifact], base: Artifact, tmp_path: Path
) -> None:
    learned, times, weight = inputs["adapter"], -4000.0, 0.5
    other = scaled(learned, times, tmp_path / "other")
    found, said = run(
        inputs, tmp_path / "out", into="dequantized", adapters=({"adapter": str(other.path), "weight": weight},)
    )
    assert (found["combined"]["how"], found["combined"]["rank"]) == ("linear", 8)
    (conflict,) = found["combined"]["adapters"]
    assert (conflict["adapter"], conflict["weight"], conflict["opposed"]) == ("other", weight, 1.0)
    assert conflict["size"] == pytest.approx(-times, rel=1e-3) and conflict["cosine"] == pytest.approx(-1, rel=1e-3)
    assert conflict["most_opposed"].startswith("model.layers.") and "100.0% have opposite signs" in said

    expected: Any = load_model(base.path, torch.float32)
    merge_learned(expected, scaled(learned, 1 + weight * times, tmp_path / "sum"), "dequantized")
    written = load_model(tmp_path / "out", torch.float32).state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(written[name], value, msg=name, atol=1e-4, rtol=1e-4)

    alone, _ = run(inputs, tmp_path / "alone", into="dequantized")
    trained, merged = found["validation_as_trained"]["loss"], found["validation"]["loss"]
    assert trained == pytest.approx(merged, abs=1e-4)
    assert abs(merged - alone["validation"]["loss"]) > 0.01
    assert f"validation loss {trained:.4f} as trained" in said


def scaled(learned: Artifact, times: float, folder: Path) -> Artifact:
    """An adapter whose update is that of `learned` so many times."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text((learned.path / "adapter_config.json").read_text("utf-8"), "utf-8")
    values = load_file(learned.path / ADAPTER)
    changed = {name: value * times if "lora_B" in name else value for name, value in values.items()}
    save_file(changed, folder / ADAPTER, metadata={"format": "pt"})
    return Artifact(folder, replace(learned.manifest, files=scan_files(folder)))


def test_another_way_than_the_trained_one_must_be_better_for_certain() -> None:
    assert best_way({"dequantized": (0.0, 0.0), "original": (0.1, 0.06), "per_layer": (-0.2, 0.01)}) == "dequantized"
    assert best_way({"dequantized": (0.0, 0.0), "original": (0.1, 0.04), "per_layer": (0.12, 0.04)}) == "per_layer"


def test_cut_weights_have_as_many_values_in_a_block_as_the_bits_allow(world: World) -> None:
    model: Any = load_model(world.model, torch.float32)
    before = {name: linear.weight.clone() for name, linear in decoder_linears(model)}
    cut_weights(model, 4)
    for name, linear in decoder_linears(model):
        blocks, old = linear.weight.detach().reshape(-1, 32), before[name].detach().reshape(-1, 32)
        assert all(len(block.unique()) <= 16 for block in blocks[:20])
        step = (old.amax(1) - old.amin(1)) / 15
        assert ((blocks - old).abs().amax(1) <= step / 2 + 1e-6).all() and (blocks != old).any()
