"""optimum's exporter as an independent oracle, and as the route for what onnxruntime-genai's builder does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from edgeft.artifact import Artifact, Manifest
from edgeft.bench.session import open_session
from edgeft.errors import ModelError
from edgeft.formats.onnx import build_onnx
from edgeft.formats.optimum import build_with_optimum, optimum_python
from edgeft.plan import ExportNode
from edgeft.progress import Reporter
from edgeft.stages import export
from tests.formats.tiny_model import TEXTS, make_probe, tiny_onnx, write_tiny_llama


@pytest.fixture
def exporter() -> None:
    try:
        optimum_python()
    except ModelError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_our_fp32_graph_predicts_what_optimums_does(
    exporter: None, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    build_with_optimum(model, tmp_path / "theirs")
    probe = make_probe(model, TEXTS)
    rows = list(zip(probe.rows, probe.positions, strict=True))
    ours, theirs, stepped = (
        np.concatenate(list(getattr(open_session(folder, 1, 256), how)(rows)))
        for folder, how in ((package, "score"), (tmp_path / "theirs", "score"), (tmp_path / "theirs", "replay"))
    )
    np.testing.assert_allclose(ours, theirs, atol=1e-3 * np.abs(ours).max())
    np.testing.assert_allclose(stepped, theirs, atol=1e-3 * np.abs(ours).max())
    answers = [open_session(folder, 1, 256).generate(probe.rows, 6) for folder in (package, tmp_path / "theirs")]
    assert answers[0] == answers[1]


def tiny_neox(folder: Path) -> Path:
    """An architecture that onnxruntime-genai's builder does not know, with the tiny model's tokenizer."""
    write_tiny_llama(folder)
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=320, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=512, initializer_range=0.15, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", "fp16"])
def test_an_architecture_that_the_builder_does_not_know_is_exported(quant: str, exporter: None, tmp_path: Path) -> None:
    model = tiny_neox(tmp_path / "model")
    with pytest.raises(ModelError, match="builder cannot export"):
        build_onnx(model, tmp_path / "builder")
    probe = make_probe(model, TEXTS)
    (tmp_path / "probe").mkdir()
    probe.save(tmp_path / "probe")
    inputs = {name: Artifact(tmp_path / name, Manifest("", "", "", {}, {}, {})) for name in ("model", "probe")}
    for made in ("fp32", quant)[: 1 + (quant != "fp32")]:
        out = tmp_path / made
        out.mkdir()
        cfg = ExportNode(format="onnx", quant=made, max_kl=1e-3, exporter="optimum")
        found = export.run(cfg, inputs, out, Reporter("export"))
        inputs["full"] = Artifact(out, Manifest("package", "", "", {}, {}, dict.fromkeys(["model.onnx"])))  # type: ignore[arg-type]
        assert found["kl_mean"] < 1e-3 and found["greedy"]["rows"] == len(probe.greedy)


def test_a_missing_exporter_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("EDGEFT_OPTIMUM", str(tmp_path / "python"))
    with pytest.raises(ModelError, match="make optimum"):
        build_with_optimum(tmp_path, tmp_path / "out")


def test_what_optimum_says_is_passed_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho 'no such architecture' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("EDGEFT_OPTIMUM", str(program))
    with pytest.raises(ModelError, match=r"exit code 3\): no such architecture"):
        build_with_optimum(tmp_path, tmp_path / "out")
