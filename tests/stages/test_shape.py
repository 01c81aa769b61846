"""Shapes on the clock: random packages that llama.cpp runs, and on a real model the shape that is fast enough."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import gguf
import pytest

from edgeft.artifact import Artifact, Manifest
from edgeft.bench.race import decode_speedup
from edgeft.formats.hf import read_config
from edgeft.plan import ShapeNode
from edgeft.progress import Reporter
from edgeft.shrink.shape import Shape
from edgeft.shrink.vocabulary import choose_tokens
from edgeft.stages import shape as stage
from edgeft.text.chat import read_json
from tests.formats.tiny_model import write_tiny_llama
from tests.stages.bench_artifacts import write_artifact


def test_a_random_package_has_the_shape_and_decodes(tmp_path: Path) -> None:
    teacher = write_tiny_llama(tmp_path / "teacher")
    kept = choose_tokens(read_json(teacher / "tokenizer.json"), (), 280)
    asked = replace(Shape.of(read_config(teacher)), layers=2, ffn=64, vocabulary=len(kept))
    package = stage.random_package(asked, teacher, tmp_path / "student", "q8_0", kept)
    sizes = {tensor.name: tuple(map(int, tensor.shape)) for tensor in gguf.GGUFReader(package).tensors}
    assert sizes["token_embd.weight"] == (64, 280)
    assert sizes["blk.1.ffn_up.weight"] == (64, 64) and "blk.2.ffn_up.weight" not in sizes
    assert decode_speedup(package, package, threads=1) > 0


@pytest.mark.slow
def test_the_chosen_shape_of_a_real_model_is_as_fast_as_asked(smollm2: Path, tmp_path: Path) -> None:
    teacher = Artifact(smollm2, Manifest(kind="model", stage="merge", key="", config={}, inputs={}, files={}))
    row = {"messages": [{"role": "user", "content": "Where is it?"}, {"role": "assistant", "content": "Here."}]}
    dataset = write_artifact(tmp_path / "data", "dataset", {"train.jsonl": json.dumps(row) + "\n"})
    cfg = ShapeNode(
        decode_speedup=2.0,
        vocabulary=16384,
        hidden=512,
        kv_heads=2,
        max_tokens=256,
        quant="q8_0",
        threads=1,
        timed_on=None,
    )
    found = stage.run(cfg, {"model": teacher, "dataset": dataset}, tmp_path, Reporter("shape"))
    assert found["chosen"]["speedup"] >= 2.0
    width = {"hidden": 512, "kv_heads": 2, "heads": 6, "head_dim": 64, "vocabulary": 16384}
    assert width.items() <= found["chosen"].items()
    assert found["chosen"]["layers"] < 30
    assert found["chosen"]["parameters"] == max(t["parameters"] for t in found["timed"] if t["speedup"] >= 2.0)
