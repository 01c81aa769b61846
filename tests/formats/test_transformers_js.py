"""The packages in transformers.js, in Node; name a folder with its node_modules in EDGEFT_TEST_NODE."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from edgeft.bench.golden import greedy
from edgeft.bench.session import open_session
from edgeft.formats.onnx import copy_companions
from edgeft.formats.onnx_blocks import Scheme
from edgeft.formats.onnx_half import halve_graph
from edgeft.formats.onnx_quant import quantize_graph
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_model import tiny_onnx

SCRIPT = Path(__file__).with_name("transformers_js.mjs")
QUESTION = "Where is my order 12345?"


@pytest.fixture(scope="module")
def modules() -> str:
    folder = os.environ.get("EDGEFT_TEST_NODE", "")
    if not shutil.which("node") or not (Path(folder) / "node_modules/@huggingface/transformers").is_dir():
        pytest.skip("needs node, and EDGEFT_TEST_NODE naming a folder with @huggingface/transformers in node_modules")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp32", "fp16", "int8", "int4"])
def test_it_answers_what_the_plain_runtime_answers(
    quant: str, modules: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
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
    command = ["node", str(SCRIPT), modules, str(package), "8", QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=200)
    said = json.loads(done.stdout.splitlines()[-1])
    prompt_ids = ChatTokenizer.from_folder(package).prompt_ids([{"role": "user", "content": QUESTION}])
    session = open_session(package, threads=1, context=128)
    assert said["prompt"] == prompt_ids
    assert said["all"] == prompt_ids + greedy(session, prompt_ids, 8)[0]
    session.close()
