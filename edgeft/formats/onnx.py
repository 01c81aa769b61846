"""ONNX packages: an fp32 graph by onnxruntime-genai's builder, and the model's own tokenizer files beside it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import onnx

from edgeft.errors import ModelError
from edgeft.formats.hf import write_json
from edgeft.text.chat import ChatTokenizer, read_json, read_template

GRAPH = "model.onnx"
WEIGHTS = "model.onnx_data"  # the name that transformers.js looks for
SETTINGS = "genai_config.json"
GENERATION = "generation_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MODEL_FILES = ("config.json", GENERATION, *TOKENIZER_FILES)


def build_onnx(model: Path, out: Path) -> None:
    """Write the Hugging Face model in folder `model` as an fp32 package into folder `out`.

    The graph takes input_ids, attention_mask and past keys and values, which it extends in place. The builder can
    succeed and leave a wrong graph: compare its logits. Raises ModelError with the builder's last words if it fails.
    """
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder"]
        command += ["-i", str(model), "-o", str(out), "-p", "fp32", "-e", "cpu", "-c", cache]
        offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    if done.returncode != 0 or not (out / GRAPH).is_file():
        said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-3:])[-400:]
        raise ModelError(
            f"onnxruntime-genai's builder cannot export {model} (exit code {done.returncode}): {said}",
            "choose an architecture that the builder knows or export to GGUF only",
        )
    copy_model_files(model, out)
    _set_stop_tokens(out)
    _finish_graph(out)
    repeat_template(out)


def save_graph(model: onnx.ModelProto, out: Path) -> None:
    """Write a graph and, beside it, its weights."""
    (out.parent / WEIGHTS).unlink(missing_ok=True)  # onnx would append to it
    onnx.save(model, out, save_as_external_data=True, all_tensors_to_one_file=True, location=WEIGHTS)


def copy_companions(source: Path, out: Path) -> None:
    """Copy everything but graph, weights and other forms of them from one ONNX package to another of the same model."""
    copy_files(source, out, (SETTINGS, *MODEL_FILES))


def copy_model_files(model: Path, out: Path) -> None:
    """Copy what stands beside a model's weights; generation_config.json then names every token that ends an answer.

    transformers.js stops at those alone, and a published model may leave the end of a turn out.
    """
    copy_files(model, out, tuple(name for name in MODEL_FILES if name != GENERATION))
    generation = read_json(model / GENERATION) if (model / GENERATION).is_file() else {}
    stops, named = sorted(ChatTokenizer.from_folder(model).stop_ids), generation.get("eos_token_id")
    if stops == (sorted(named) if isinstance(named, list) else [named]):
        shutil.copyfile(model / GENERATION, out / GENERATION)
    else:
        write_json(out / GENERATION, {**generation, "eos_token_id": stops})


def copy_files(source: Path, out: Path, names: tuple[str, ...]) -> None:
    """Copy the named files. Raises ModelError if one is missing."""
    for name in names:
        if not (source / name).is_file():
            raise ModelError(f"{source} has no {name}", "make the model again with `edgeft run`")
        shutil.copyfile(source / name, out / name)


def _set_stop_tokens(package: Path) -> None:
    """Let onnxruntime-genai stop where the chat template ends a turn; the builder knows only config.json."""
    path = package / SETTINGS
    settings = json.loads(path.read_text("utf-8"))
    settings["model"]["eos_token_id"] = sorted(ChatTokenizer.from_folder(package).stop_ids)
    path.write_text(json.dumps(settings, indent=4) + "\n", "utf-8")


def repeat_template(package: Path) -> None:
    """Put the chat template into tokenizer_config.json too: transformers.js looks for it nowhere else."""
    path = package / "tokenizer_config.json"
    settings = {**read_json(path), "chat_template": read_template(package)}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False, sort_keys=True) + "\n", "utf-8")


def _finish_graph(package: Path) -> None:
    """Fix the head size in the shapes of keys and values, and rename the weights: transformers.js needs both."""
    model = onnx.load(package / GRAPH, load_external_data=False)
    head_size = json.loads((package / SETTINGS).read_text("utf-8"))["model"]["decoder"]["head_size"]
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.shape.dim[3].dim_value = head_size
    written = {e.value for i in model.graph.initializer for e in i.external_data if e.key == "location"}
    for initializer in model.graph.initializer:
        for entry in initializer.external_data:
            if entry.key == "location":
                entry.value = WEIGHTS
    onnx.save(model, package / GRAPH)
    for name in written:
        (package / name).rename(package / WEIGHTS)
