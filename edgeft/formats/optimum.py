"""ONNX graphs by optimum's exporter: a second route, for architectures that onnxruntime-genai's builder does not know.

Its pins exclude transformers 5, so it runs in an environment of its own (`make optimum`), driven as a process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx

from edgeft.errors import ModelError
from edgeft.formats.hf import read_config, write_json
from edgeft.formats.onnx import GRAPH, SETTINGS, copy_model_files, repeat_template, save_graph
from edgeft.text.chat import ChatTokenizer

PYTHON = "EDGEFT_OPTIMUM"  # environment variable: the Python that has optimum's exporter
DRIVER = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], sys.argv[2], task="text-generation-with-past", device="cpu", dtype="fp32",
            do_validation=False, local_files_only=True, trust_remote_code=False)
"""


def build_with_optimum(model: Path, out: Path) -> None:
    """Write the Hugging Face model in folder `model` as an fp32 package into folder `out`.

    The graph takes input_ids, attention_mask, position_ids and past keys and values, and gives keys and values that are
    longer by the new tokens. Raises ModelError if there is no optimum, or with its last words.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(optimum_python()), "-c", DRIVER, str(model.resolve()), folder]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(command, env=environment | offline, capture_output=True, text=True, check=False)
        if done.returncode != 0 or not (Path(folder) / GRAPH).is_file():
            said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])[-400:]
            raise ModelError(
                f"optimum cannot export {model} (exit code {done.returncode}): {said}",
                "choose an architecture that optimum knows or export to GGUF only",
            )
        save_graph(onnx.load(Path(folder) / GRAPH), out / GRAPH)
    copy_model_files(model, out)
    write_json(out / SETTINGS, _settings(model))
    repeat_template(out)


def optimum_python() -> Path:
    """The Python of optimum's environment. Raises ModelError if there is none."""
    path = Path(os.environ.get(PYTHON, Path(sys.prefix) / "optimum" / "bin" / "python"))
    if not path.is_file():
        raise ModelError(
            f"export.exporter is optimum, and there is no {path}",
            f"run `make optimum`, or name the Python of an environment with optimum-onnx in {PYTHON}",
        )
    return path


def _settings(model: Path) -> dict[str, Any]:
    """The facts that onnxruntime-genai's builder would write, in its layout, and how this graph differs."""
    config, chat = read_config(model), ChatTokenizer.from_folder(model)
    heads = config["num_attention_heads"]
    decoder = {
        "filename": GRAPH,
        "head_size": config.get("head_dim") or config["hidden_size"] // heads,
        "hidden_size": config["hidden_size"],
        "num_attention_heads": heads,
        "num_hidden_layers": config["num_hidden_layers"],
        "num_key_value_heads": config.get("num_key_value_heads") or heads,
    }
    facts = {
        "context_length": config["max_position_embeddings"],
        "decoder": decoder,
        "eos_token_id": sorted(chat.stop_ids),
        "type": config["model_type"],
        "vocab_size": config["vocab_size"],
    }
    return {"model": facts, "search": {"past_present_share_buffer": False}}
