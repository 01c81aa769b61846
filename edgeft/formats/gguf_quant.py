"""A GGUF file is quantised by llama.cpp, told which input channels matter and which tensors get another type."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

import gguf
import llama_cpp as lib
import numpy as np

from edgeft.errors import ModelError, RecipeError
from edgeft.formats.importance import HEAD, Importance

# llama.cpp's names of whole files' types -> its numbers; most are mixtures.
FILE_TYPES: dict[str, int] = {
    name.removeprefix("LLAMA_FTYPE_MOSTLY_").lower(): value
    for name, value in vars(lib).items()
    if name.startswith("LLAMA_FTYPE_MOSTLY_")
}
SILENT = lib.llama_log_callback(lambda level, text, user: None)  # must live as long as the library
HEAD_TENSOR, EMBEDDING_TENSOR = "output.weight", "token_embd.weight"


def quantize(
    source: Path,
    out: Path,
    quant: str,
    threads: int,
    importance: Importance | None = None,
    types: Mapping[str, str] | None = None,
) -> None:
    """Quantise an f32, f16 or bf16 file. Raises ModelError with the library's last words.

    `importance`: {tensor of the file: float32 [in_features]}; `types`: {tensor of the file: type}.
    """
    log: list[str] = []

    def keep(level: int, text: bytes, user: object) -> None:
        log.append(text.decode("utf-8", "replace"))

    params = lib.llama_model_quantize_default_params()
    params.ftype, params.nthread = FILE_TYPES[quant], threads
    kept = _set_importance(params, importance or {}), _set_types(params, types or {})
    callback = lib.llama_log_callback(keep)
    lib.llama_log_set(callback, ctypes.c_void_p(0))
    try:
        status = lib.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    finally:
        lib.llama_log_set(SILENT, ctypes.c_void_p(0))
    del kept  # what the parameters point into
    if status != 0 or not out.is_file():
        said = " ".join("".join(log).split())[-300:]
        raise ModelError(f"llama.cpp cannot quantise {source} to {quant}: {said}", "check the source file and the disk")


def rename_importance(importance: Importance, names: Mapping[str, str]) -> Importance:
    """The importance under the names of the file: {tensor of the folder: tensor of the file} are `names`.

    A head that is the embedding's weight is quantised as the head it is. Raises ModelError if the model has a matrix
    that the importance does not know, or one of another width.
    """
    renamed = {names.get(name, EMBEDDING_TENSOR if name == HEAD else ""): mean for name, mean in importance.items()}
    matrices = {
        target for target in names.values() if re.fullmatch(r"blk\.\d+\.(attn|ffn)_(?!.*norm)\w+\.weight", target)
    }
    if missing := sorted(matrices ^ (set(renamed) - {HEAD_TENSOR, EMBEDDING_TENSOR})):
        raise ModelError(
            f"the importance was measured on another model: {len(missing)} matrices differ, such as {missing[0]}",
            "measure it on the model that is exported",
        )
    return renamed


def types_by_tensor(rules: Mapping[str, str], tensors: Iterable[str]) -> dict[str, str]:
    """{matrix: type} by the first rule that fits; matrices that no rule fits are left out.

    A rule's name is a part of the model (head, embedding, attn_q, attn_k, attn_v, attn_output, ffn_gate, ffn_up,
    ffn_down) or a pattern over tensor names such as blk.0.*; the head of a model that has no own is its embedding.
    Raises RecipeError if a rule fits no matrix.
    """
    matrices = [name for name in tensors if name.endswith(".weight") and "norm" not in name and "rope" not in name]
    head = HEAD_TENSOR if HEAD_TENSOR in matrices else EMBEDDING_TENSOR
    patterns = {"head": head, "embedding": EMBEDDING_TENSOR}
    chosen: dict[str, str] = {}
    for rule, kind in rules.items():
        pattern = patterns.get(rule, f"blk.*.{rule}.weight" if re.fullmatch(r"(attn|ffn)_\w+", rule) else rule)
        fitting = [name for name in matrices if fnmatchcase(name, pattern)]
        if not fitting:
            parts = sorted({match[1] for name in matrices if (match := re.search(r"blk\.\d+\.(\w+)\.", name))})
            raise RecipeError(
                f"export.tensor_types: {rule!r} fits no matrix of the model",
                f"name a part (head, embedding, {', '.join(parts)}) or a pattern over tensor names such as blk.0.*",
            )
        chosen |= {name: kind for name in fitting if name not in chosen}
    return chosen


def _set_importance(params: lib.llama_model_quantize_params, importance: Importance) -> object:
    """Point the parameters at the importance; the result must live as long as they are used."""
    if not importance:
        return None
    array = (lib.llama_model_imatrix_data * (len(importance) + 1))()  # the last entry, without a name, ends it
    kept = [np.ascontiguousarray(mean, np.float32) for mean in importance.values()]
    for entry, name, mean in zip(array, importance, kept, strict=False):
        entry.name, entry.size = name.encode(), mean.size
        entry.data = mean.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    params.imatrix = ctypes.cast(array, ctypes.POINTER(lib.llama_model_imatrix_data))
    return array, kept


def _set_types(params: lib.llama_model_quantize_params, types: Mapping[str, str]) -> object:
    if not types:
        return None
    array = (lib.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, kind) in zip(array, types.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), gguf.GGMLQuantizationType[kind.upper()]
    params.tt_overrides = ctypes.cast(array, ctypes.POINTER(lib.llama_model_tensor_override))
    return array
