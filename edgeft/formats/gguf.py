"""GGUF files: a Hugging Face folder is written as one, with tokenizer and chat template.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from edgeft.errors import ModelError
from edgeft.formats.gguf_arch import Architecture, add_shape, architecture, rope_factors
from edgeft.formats.gguf_reader import Reader
from edgeft.formats.gguf_vocab import add_tokenizer
from edgeft.formats.hf import count_parameters, read_config
from edgeft.formats.weights import open_weights

FLOATS: dict[str, tuple[Any, gguf.GGMLQuantizationType, gguf.LlamaFileType]] = {
    "f32": (np.float32, gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (np.float16, gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (ml_dtypes.bfloat16, gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
ROPE_FACTORS = "rope_freqs.weight"


def write_gguf(model: Path, out: Path, dtype: str, name: str | None = None) -> None:
    """Write the model in folder `model`, with tokenizer and chat template, as `out`; vectors stay in f32.

    `dtype` is a key of FLOATS. `name` is what apps show; None takes the folder's.
    Raises ModelError, naming it, for an architecture, rope scaling or tokenizer that llama.cpp would compute otherwise.
    """
    config = read_config(model)
    row = architecture(model, config)
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[row.arch])
    writer.add_type("model")
    writer.add_name(name or model.resolve().name)
    writer.add_size_label(gguf.size_label(count_parameters(model), 0, 0, 0))
    add_shape(writer, config, row)
    writer.add_file_type(FLOATS[dtype][2])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    add_tokenizer(writer, model, config["vocab_size"])
    with open_weights(model) as weights:
        names = tensor_names(model)
        factors = rope_factors(config)
        if factors is not None:
            writer.add_tensor_info(ROPE_FACTORS, factors.shape, factors.dtype, factors.nbytes)
        for name, target in names.items():
            shape = weights.shapes[name]
            kind, stored, _ = FLOATS[dtype if len(shape) > 1 else "f32"]
            size = int(np.prod(shape)) * np.dtype(kind).itemsize
            writer.add_tensor_info(target, shape, np.dtype(kind), size, stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for name in names:
            writer.write_tensor_data(_stored(name, weights[name], config, row, dtype, model))
    writer.close()


def tensor_names(model: Path) -> dict[str, str]:
    """{tensor of a Hugging Face folder: its name in the GGUF file}, in the file's order.

    Raises ModelError, naming it, for a tensor that the architecture has no place for.
    """
    config = read_config(model)
    row = architecture(model, config)
    known = gguf.get_tensor_name_map(row.arch, config["num_hidden_layers"])
    names = {}
    with open_weights(model) as weights:
        for name in weights.shapes:
            if name.endswith("rotary_emb.inv_freq"):
                continue  # derived from rope_theta
            target = known.get_name(name, try_suffixes=(".weight", ".bias"))
            if target is None or (name.startswith("lm_head") and not row.head):
                raise ModelError(f"{model}: unknown tensor {name}", "only plain models can be written as GGUF")
            names[name] = target
    return names


def tensor_types(path: Path) -> dict[str, int]:
    """How many tensors of a file have which type: k-quants fall back where a width is no multiple of 256."""
    return dict(sorted(Counter(t.tensor_type.name for t in Reader(path).tensors).items()))


def pair_heads(name: str, tensor: NDArray[np.float32], config: dict[str, Any]) -> NDArray[np.float32]:
    """Rows of a query or key projection, from a head's two halves to neighbouring pairs; others as they are."""
    heads = config["num_attention_heads"]
    if re.search(r"\.k_proj\.", name):
        heads = config.get("num_key_value_heads") or heads
    elif not re.search(r"\.q_proj\.", name):
        return tensor
    rest = tensor.shape[1:]
    return tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *rest).swapaxes(1, 2).reshape(tensor.shape)


def _stored(
    name: str, tensor: NDArray[np.float32], config: dict[str, Any], row: Architecture, dtype: str, model: Path
) -> NDArray[Any]:
    """The tensor as the file holds it. Raises ModelError, naming it, if it has values beyond the type."""
    if row.paired:
        tensor = pair_heads(name, tensor, config)
    if name.endswith("norm.weight"):
        tensor = tensor + np.float32(row.norm_offset)
    with np.errstate(over="ignore"):  # infinity is reported below, with the tensor's name
        stored: NDArray[Any] = tensor.astype(FLOATS[dtype if tensor.ndim > 1 else "f32"][0])
    if not np.isfinite(stored).all():
        raise ModelError(f"{model}: {name} has values beyond {dtype}", "train again with a lower learning rate")
    return stored
