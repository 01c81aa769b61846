"""Ways to break a package: in its metadata, its tokens, its tensors, its cache, its file."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gguf as gguf_file
import numpy as np
import onnx
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from benchmarks.export.sabotage import World, copied, way
from edgeft.artifact import Manifest, open_artifact, scan_files, verify, write_manifest
from edgeft.bench.llamacpp import LlamaCppSession
from edgeft.bench.ort import OrtSession
from edgeft.bench.session import Logits
from edgeft.errors import ArtifactError
from edgeft.formats import gguf, gguf_quant
from edgeft.formats.onnx import SETTINGS, WEIGHTS
from tests.formats.tiny_model import HEADS, KV_HEADS, TEXTS, make_probe, write_tiny_llama

PROMPT = r"the prompt of .* differs"
Weights = dict[str, NDArray[np.float32]]


def reader(package: Path) -> Any:
    """The GGUF file of a package; what is written into its arrays is written into the file."""
    return gguf_file.GGUFReader(package / "model.gguf", "r+")


def set_scalar(package: Path, key: str, value: float, at: int = 0) -> None:
    field = reader(package).get_field(key)
    field.parts[field.data[at]][0] = value


def tensors(package: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: tensor.data for tensor in reader(package).tensors}


def rewritten(
    world: World,
    out: Path,
    files: dict[str, Callable[[str], str]] | None = None,
    weights: Callable[[Weights], None] | None = None,
) -> Path:
    """A GGUF package of a copy of the model in which files or weights were changed."""
    model = copied(world.model, out)
    for name, change in (files or {}).items():
        (model / name).write_text(change((model / name).read_text("utf-8")), "utf-8")
    if weights:
        values = load_file(model / "model.safetensors")
        weights(values)
        save_file(values, model / "model.safetensors", metadata={"format": "pt"})
    package = out / "package"
    package.mkdir()
    gguf.write_gguf(model, package / "model.gguf", "f16")
    return package


def in_json(change: Callable[[Any], None]) -> Callable[[str], str]:
    def edit(text: str) -> str:
        value = json.loads(text)
        change(value)
        return json.dumps(value)

    return edit


# Settings


@way("rope theta", "settings", r"rope theta: 5000 in the model, 10000 in the package")
def rope_theta(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    set_scalar(package, "llama.rope.freq_base", 10000.0)
    world.check(package)


@way("norm epsilon", "settings", r"norm epsilon: 1e-06 in the model, 1e-05 in the package")
def norm_epsilon(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    set_scalar(package, "llama.attention.layer_norm_rms_epsilon", 1e-5)
    world.check(package)


@way("missing end of turn", "settings", r"end of turn: 2 in the model, 0 in the package")
def end_of_turn(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    set_scalar(package, "tokenizer.ggml.eos_token_id", 0)
    world.check(package)


@way("missing end of turn for onnxruntime-genai", "prompt contract", r"does not stop at the end of a turn \(token 2\)")
def genai_end_of_turn(world: World, out: Path) -> None:
    package = copied(world.onnx, out)
    settings = json.loads((package / SETTINGS).read_text("utf-8"))
    settings["model"]["eos_token_id"] = 0
    (package / SETTINGS).write_text(json.dumps(settings), "utf-8")
    world.check(package, "fp32")


@way("BOS added by the runtime as well", "settings", r"BOS added: False in the model, True in the package")
def bos_added(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    set_scalar(package, "tokenizer.ggml.add_bos_token", 1)
    world.check(package)


@way("wrong pre-tokenizer", "settings", r"pre-tokenizer: '?smollm.* in the model, '?gpt-2")
def pre_tokenizer(world: World, out: Path) -> None:
    def drop_digits(raw: Any) -> None:
        raw["pre_tokenizer"]["pretokenizers"].pop(0)

    world.check(rewritten(world, out, {"tokenizer.json": in_json(drop_digits)}))


# Prompts


@way("doubled BOS", "prompt contract", PROMPT)
def doubled_bos(world: World, out: Path) -> None:
    world.check(rewritten(world, out, {"chat_template.jinja": lambda text: "{{ bos_token }}" + text}))


@way("wrong chat template", "prompt contract", PROMPT)
def template(world: World, out: Path) -> None:
    world.check(rewritten(world, out, {"chat_template.jinja": lambda text: text.replace("assistant", "bot")}))


@way("control token as plain text", "prompt contract", PROMPT)
def control_token(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    set_scalar(package, "tokenizer.ggml.token_type", 1, at=1)
    world.check(package)


@way("exchanged tokens", "prompt contract", PROMPT)
def exchanged_tokens(world: World, out: Path) -> None:
    def exchange(raw: Any) -> None:
        vocab = raw["model"]["vocab"]
        vocab["e"], vocab["r"] = vocab["r"], vocab["e"]

    world.check(rewritten(world, out, {"tokenizer.json": in_json(exchange)}))


@way("lost merges", "prompt contract", PROMPT)
def merges(world: World, out: Path) -> None:
    def drop_last(raw: Any) -> None:
        raw["model"]["merges"].pop()

    world.check(rewritten(world, out, {"tokenizer.json": in_json(drop_last)}))


# Tensors


def parity(name: str, tensor: str) -> Callable[..., Any]:
    return way(name, "parity", rf"does not agree with the torch model(.|\n)*tensors: .*first is {re_escape(tensor)}")


def re_escape(name: str) -> str:
    return name.replace(".", r"\.")


@parity("queries and keys not permuted", "model.layers.0.self_attn.k_proj.weight")
def not_permuted(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    for name, values in tensors(package).items():
        if "attn_q" in name or "attn_k" in name:
            heads = HEADS if "attn_q" in name else KV_HEADS
            values[:] = values.reshape(heads, -1, 2, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
    world.check(package)


@parity("untied head", "lm_head.weight")
def untied_head(world: World, out: Path) -> None:
    def other_head(weights: Weights) -> None:
        embedding = weights["model.embed_tokens.weight"]
        weights["lm_head.weight"] = np.random.default_rng(0).normal(0, 0.15, embedding.shape).astype(np.float32)

    untie = in_json(lambda config: config.update(tie_word_embeddings=False))
    world.check(rewritten(world, out, {"config.json": untie}, other_head))


@parity("exchanged layers", "model.layers.1.")
def exchanged_layers(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    values = tensors(package)
    for name in [name for name in values if name.startswith("blk.1.")]:
        other = name.replace("blk.1.", "blk.2.")
        first = values[name].copy()
        values[name][:], values[other][:] = values[other].copy(), first
    world.check(package)


@parity("vocabulary off by one", "model.embed_tokens.weight")
def vocabulary(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    table = tensors(package)["token_embd.weight"]
    table[:] = np.roll(table, 1, axis=0)
    world.check(package)


@parity("zeroed layer", "model.layers.2.")
def zeroed_layer(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    for name, values in tensors(package).items():
        if name.startswith("blk.2.") and values.ndim == 2:
            values[:] = 0
    world.check(package)


@parity("transposed matrix", "model.layers.3.self_attn.o_proj.weight")
def transposed(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    values = tensors(package)["blk.3.attn_output.weight"]
    values[:] = values.T.copy()
    world.check(package)


@way("bytes in the wrong order", "parity", r"not finite|does not agree with the torch model")
def byte_order(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    values = tensors(package)["blk.0.ffn_up.weight"]
    values[:] = values.copy().byteswap()
    world.check(package)


@way("a weight that is not a number", "parity", r"not finite")
def not_a_number(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    tensors(package)["blk.1.ffn_down.weight"][3, 5] = np.nan
    world.check(package)


@way("4 bits on a head with outliers", "parity", r"q4_0 package .* does not agree with the torch model")
def head_with_outliers(world: World, out: Path) -> None:
    model = write_tiny_llama(out / "model", tie=False)
    weights = load_file(model / "model.safetensors")
    head = weights["lm_head.weight"]
    head *= 4
    head[:, ::32] = np.sign(head[:, ::32]) * 60  # one value in every block of 32 takes all of the range
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    package = out / "package"
    package.mkdir()
    gguf.write_gguf(model, package / "model.gguf", "f16")
    table = tensors(package)["output.weight"]
    four_bits = gguf_file.GGMLQuantizationType.Q4_0
    table[:] = gguf_file.dequantize(gguf_file.quantize(table.astype(np.float32), four_bits), four_bits)
    world.check(package, "q4_0", model, make_probe(model, TEXTS))


@way("stale cache: quantised from an older model's file", "parity", r"does not agree with the torch model")
def stale_cache(world: World, out: Path) -> None:
    older = write_tiny_llama(out / "older", seed=1)
    package = out / "package"
    package.mkdir()
    gguf.write_gguf(older, out / "older.gguf", "f16")
    gguf_quant.quantize(out / "older.gguf", package / "model.gguf", "q8_0", 1)
    world.check(package, "q8_0")


# Keys and values


@way("cache off by one", "steps", r"predicts otherwise token by token")
def cache_off_by_one(world: World, out: Path) -> None:
    real = LlamaCppSession.prefill

    def prefill(self: LlamaCppSession, ids: Sequence[int]) -> Logits:
        logits = real(self, ids)
        real(self, ids[:-1])  # what follows finds one token too few
        return logits

    with patch.object(LlamaCppSession, "prefill", prefill):
        world.check(world.gguf)


@way("cache off by one with several rows", "steps", r"predicts otherwise with several rows at once")
def cache_off_by_one_together(world: World, out: Path) -> None:
    real = OrtSession._step_all

    def step_all(self: OrtSession, cache: Any, tokens: list[int], lengths: list[int]) -> Logits:
        return real(self, cache, tokens, [length - 1 for length in lengths])

    with patch.object(OrtSession, "_step_all", step_all):
        world.check(world.onnx, "fp32")


# ONNX


def broken_graph(world: World, out: Path, change: Callable[[Any], None]) -> Path:
    package = copied(world.onnx, out)
    model = onnx.load(package / "model.onnx")
    change(model.graph)
    (package / WEIGHTS).unlink(missing_ok=True)
    onnx.save(model, package / "model.onnx", save_as_external_data=True, location=WEIGHTS)
    return package


def initializer(graph: Any, name: str) -> Any:
    return next(i for i in graph.initializer if i.name == name)


def set_values(graph: Any, name: str, values: NDArray[np.float32]) -> None:
    initializer(graph, name).CopyFrom(onnx.numpy_helper.from_array(np.ascontiguousarray(values), name))


@way("rotary table of another theta", "settings", r"rope theta: 5000 in the model, 10000 in the package")
def rotary_table(world: World, out: Path) -> None:
    def change(graph: Any) -> None:
        shape = initializer(graph, "cos_cache").dims
        angle = np.outer(np.arange(shape[0]), 10000.0 ** (-np.arange(shape[1]) / shape[1]))
        set_values(graph, "cos_cache", np.cos(angle).astype(np.float32))
        set_values(graph, "sin_cache", np.sin(angle).astype(np.float32))

    world.check(broken_graph(world, out, change), "fp32")


@way("norm epsilon of a graph", "settings", r"norm epsilon: 1e-06 in the model, 0\.001 in the package")
def graph_epsilon(world: World, out: Path) -> None:
    def change(graph: Any) -> None:
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.name == "epsilon":
                    attribute.f = 1e-3

    world.check(broken_graph(world, out, change), "fp32")


@parity("transposed matrix of a graph", "model.layers.1.self_attn.o_proj.weight")
def transposed_in_graph(world: World, out: Path) -> None:
    def change(graph: Any) -> None:
        name = "model.layers.1.attn.o_proj.MatMul.weight"
        set_values(graph, name, onnx.numpy_helper.to_array(initializer(graph, name)).T)

    world.check(broken_graph(world, out, change), "fp32")


@way("weights of a graph left behind", "loader", r"onnxruntime cannot load")
def no_data_file(world: World, out: Path) -> None:
    package = copied(world.onnx, out)
    (package / WEIGHTS).unlink()
    world.check(package, "fp32")


# Files


@way("truncated file", "loader", r"llama\.cpp cannot load")
def truncated(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    with (package / "model.gguf").open("r+b") as f:
        f.truncate((package / "model.gguf").stat().st_size * 9 // 10)
    world.check(package)


@way("missing tensor", "loader", r"llama\.cpp cannot load")
def missing_tensor(world: World, out: Path) -> None:
    world.check(rewritten(world, out, weights=lambda weights: drop(weights, "model.layers.1.mlp.up_proj.weight")))


def drop(weights: Weights, name: str) -> None:
    del weights[name]


def artifact_of(folder: Path) -> None:
    write_manifest(folder, Manifest("package", "export", "0" * 16, {}, {}, scan_files(folder)))


def verified(folder: Path) -> None:
    """What `edgeft show --verify` does."""
    if problems := verify(open_artifact(folder)):
        raise ArtifactError("; ".join(problems))


@way("flipped bit", "artifact", r"model\.gguf: sha256 .* the manifest says")
def flipped_bit(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    artifact_of(package)
    with (package / "model.gguf").open("r+b") as f:
        f.seek(-1000, 2)
        byte = f.read(1)[0]
        f.seek(-1000, 2)
        f.write(bytes([byte ^ 1]))
    verified(package)


@way("file of another export in its place", "artifact", r"model\.gguf: \d+ bytes, the manifest says \d+")
def replaced_file(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    artifact_of(package)
    gguf.write_gguf(world.model, package / "model.gguf", "f32")
    verified(package)


@way("manifest edited to match", "artifact", r"was edited: it says digest")
def edited_manifest(world: World, out: Path) -> None:
    package = copied(world.gguf, out)
    artifact_of(package)
    manifest = package / "manifest.json"
    raw = json.loads(manifest.read_text())
    gguf.write_gguf(world.model, package / "model.gguf", "f32")
    raw["files"] = {name: {"sha256": f.sha256, "size": f.size} for name, f in scan_files(package).items()}
    manifest.write_text(json.dumps(raw))
    verified(package)
