"""A PEFT adapter becomes a GGUF adapter, which llama.cpp puts on the GGUF of the base model when it loads it.

Layout: general.type adapter, adapter.type lora, the base's name, and for each matrix NAME.lora_a [rank, in] and
NAME.lora_b [out, rank]; llama.cpp adds alpha / rank times their product.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from safetensors import safe_open

from edgeft.errors import ModelError
from edgeft.formats.gguf import pair_heads, tensor_names
from edgeft.formats.gguf_arch import architecture
from edgeft.formats.hf import read_config

PREFIX = "base_model.model."
SIDES = {".lora_A.weight": "lora_a", ".lora_B.weight": "lora_b"}


def write_lora(adapter: Path, scale: float, base: Path, out: Path, base_name: str | None = None) -> int:
    """Write the adapter_model.safetensors `adapter` for the model in folder `base`; its product counts `scale` times.

    `base_name` is what the file says it belongs to; None takes the folder's.
    Returns the number of matrices that it changes. Raises ModelError if it holds something other than pairs for
    matrices of the base.
    """
    config = read_config(base)
    row, names = architecture(base, config), tensor_names(base)
    pairs: dict[str, dict[str, np.ndarray[tuple[int, ...], np.dtype[np.float32]]]] = {}
    with safe_open(adapter, framework="numpy") as stored:
        for name in list(stored.keys()):
            side = next((side for side in SIDES if name.endswith(side)), "")
            matrix = f"{name.removeprefix(PREFIX).removesuffix(side)}.weight"
            if not side or matrix not in names:
                raise ModelError(
                    f"{adapter}: {name} has no place in a GGUF adapter of {base}",
                    "export only plain LoRA adapters, and only for the base they were trained on",
                )
            tensor = stored.get_tensor(name).astype(np.float32)
            if row.paired and SIDES[side] == "lora_b":
                tensor = pair_heads(matrix, tensor, config)
            pairs.setdefault(matrix, {})[SIDES[side]] = tensor
    ranks = {len(pair["lora_a"]) for pair in pairs.values() if len(pair) == 2}
    if len(ranks) != 1 or any(len(pair) != 2 for pair in pairs.values()):
        raise ModelError(
            f"{adapter}: expected pairs of one rank, found ranks {sorted(ranks)}", "train the adapter again"
        )
    writer = gguf.GGUFWriter(out, gguf.MODEL_ARCH_NAMES[row.arch])
    writer.add_type("adapter")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_name or base.resolve().name)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", scale * ranks.pop())
    for matrix, pair in sorted(pairs.items()):
        for side in SIDES.values():
            writer.add_tensor(f"{names[matrix]}.{side}", np.ascontiguousarray(pair[side]))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return len(pairs)
