"""The packages in onnxruntime-genai itself."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime_genai as genai
import pytest

from edgeft.bench.engines import with_genai
from edgeft.bench.golden import greedy
from edgeft.bench.session import open_session
from edgeft.formats.onnx import copy_companions
from edgeft.formats.onnx_blocks import Scheme
from edgeft.formats.onnx_half import halve_graph
from edgeft.formats.onnx_quant import quantize_graph
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import TEXTS, tiny_onnx


def generate(model: genai.Model, prompt_ids: Sequence[int], max_new_tokens: int) -> list[int]:
    """What onnxruntime-genai answers by itself, with the package's own settings; without the stop token."""
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(max_length=len(prompt_ids) + max_new_tokens)
    generator = genai.Generator(model, parameters)
    generator.append_tokens(np.array([prompt_ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(i) for i in generator.get_sequence(0)[len(prompt_ids) :]]


@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4"])
def test_it_answers_what_the_plain_runtime_answers(
    quant: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    package = tiny_onnx(tmp_path_factory)[1]
    if quant != "fp32":
        copy_companions(package, tmp_path)
        source, out = package / "model.onnx", tmp_path / "model.onnx"
        if quant == "fp16":
            halve_graph(source, out)
        else:
            quantize_graph(source, out, Scheme(8) if quant == "int8" else Scheme(4, 32, True))
        package = tmp_path
    _compare(package, TEXTS, 24)


@pytest.mark.slow
def test_it_answers_what_the_plain_runtime_answers_with_the_real_model(smollm2: Path, tmp_path: Path) -> None:
    from edgeft.formats.onnx import build_onnx

    build_onnx(smollm2, tmp_path / "fp32")
    (tmp_path / "int4").mkdir()
    copy_companions(tmp_path / "fp32", tmp_path / "int4")
    quantize_graph(tmp_path / "fp32/model.onnx", tmp_path / "int4/model.onnx", Scheme(4, 32, True))
    for name in ("fp32", "int4"):
        _compare(tmp_path / name, ["What is the capital of France?", "Name three colours."], 32)


def _compare(package: Path, questions: list[str], max_new_tokens: int) -> None:
    chat, model = ChatTokenizer.from_folder(package), genai.Model(str(package))
    session, encode = open_session(package, threads=1, context=256), with_genai(package)
    for question in questions:
        messages = [{"role": "user", "content": question}]
        prompt_ids = chat.prompt_ids(messages)
        assert encode(messages) == prompt_ids
        found = generate(model, prompt_ids, max_new_tokens)
        ended = found[-1] in session.stop_ids
        assert (found[:-1] if ended else found) == greedy(session, prompt_ids, max_new_tokens)[0]
    session.close()


def test_its_settings_name_the_stops_the_context_and_the_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    model, package = tiny_onnx(tmp_path_factory)
    settings = json.loads((package / "genai_config.json").read_text())["model"]
    assert set(settings["eos_token_id"]) == ChatTokenizer.from_folder(model).stop_ids
    assert settings["context_length"] == json.loads((model / "config.json").read_text())["max_position_embeddings"]
    assert (package / settings["decoder"]["filename"]).is_file()
