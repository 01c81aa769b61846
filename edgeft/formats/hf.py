"""Hugging Face model folders, written in one clean layout that old and new readers load alike."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from edgeft.errors import ModelError
from edgeft.text.chat import TEMPLATE_FILE, read_json, read_template

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS = "model.safetensors"
# What a reader of transformers 5 leaves in files and one of 4.x, or of another tool, trips over.
PRIVATE_CONFIG_KEYS = ("_name_or_path", "transformers_version", "quantization_config", "auto_map")
PRIVATE_TOKENIZER_KEYS = ("backend", "is_local", "local_files_only", "auto_map", "chat_template", "name_or_path")


def gguf_to_checkpoint(gguf_path: Path, out: Path) -> None:
    """Write a GGUF file as a plain float32 LlamaForCausalLM folder with tokenizer and chat template.

    float32, because it holds every dequantised value exactly. Raises ModelError (see gguf_read).
    """
    from safetensors.numpy import save_file

    from edgeft.formats.gguf_read import read_gguf

    model = read_gguf(gguf_path)
    out.mkdir(parents=True, exist_ok=True)
    save_file(model.weights, out / WEIGHTS, metadata={"format": "pt"})
    write_json(out / "config.json", model.config)
    ids = {f"{name}_token_id": model.special.get(name) for name in ("bos", "eos", "pad")}
    write_json(out / "generation_config.json", {k: v for k, v in ids.items() if v is not None})
    model.tokenizer.save(str(out / "tokenizer.json"))
    tokens = {f"{name}_token": model.tokenizer.id_to_token(i) for name, i in model.special.items()}
    settings = {
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.config["max_position_embeddings"],
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
    }
    write_json(out / "tokenizer_config.json", settings)
    (out / TEMPLATE_FILE).write_text(model.chat_template, "utf-8")


def load_model(folder: Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The causal language model of a folder, in `dtype` (None: as stored), in eval mode.

    Raises ModelError if it is no loadable safetensors checkpoint or lacks tensors that its config asks for.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    config = read_config(folder)
    if not list(folder.glob("*.safetensors")):
        pickles = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
        raise ModelError(
            f"{folder} has no .safetensors file" + (f", only pickle ({pickles})" if pickles else ""),
            "convert the model to safetensors first; edgeft never unpickles",
        )
    if "quantization_config" in config:
        raise ModelError(f"{folder} holds already quantised weights", "take the unquantised model")
    model: PreTrainedModel
    loading: dict[str, Any]
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(  # type: ignore[misc]  # a pair, by output_loading_info
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{folder} cannot be loaded: {error}", "check that the folder is complete") from error
    if lost := sorted({*loading["missing_keys"], *(str(k) for k in loading.get("mismatched_keys", ()))}):
        raise ModelError(
            f"{folder}: {len(lost)} tensors are missing or of another shape than config.json says, such as {lost[:3]}",
            "the folder is incomplete, or its config belongs to another model",
        )
    return model


def save_model(model: PreTrainedModel, folder: Path, tokenizer_from: Path) -> None:
    """Write `model` to `folder` as one plain checkpoint, with the tokenizer files of the folder `tokenizer_from`.

    Tied embeddings are stored once. Raises ModelError if adapters or quantised layers are still in it.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # the reporter speaks, libraries do not
    marks = ("lora_", ".base_layer.", ".absmax", ".quant_")
    leftovers = [name for name in model.state_dict() if any(mark in name for mark in marks)]
    if leftovers or getattr(model.config, "quantization_config", None) is not None:
        raise ModelError(
            f"the model is not plain: it still holds {leftovers[:3] or 'a quantisation config'}",
            "fold adapters and dequantise before saving",
        )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder, max_shard_size="1000GB")
    write_json(folder / "config.json", clean_config(read_config(folder)))
    _copy_generation_config(tokenizer_from, folder)
    copy_tokenizer(tokenizer_from, folder)


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy tokenizer.json, tokenizer_config.json and the chat template into `folder`, in the clean layout."""
    if not (source / "tokenizer.json").is_file():
        raise ModelError(f"{source} has no tokenizer.json", "save the model with its fast tokenizer")
    settings = read_json(source / "tokenizer_config.json")
    kept = {k: v for k, v in settings.items() if k not in PRIVATE_TOKENIZER_KEYS}
    template = read_template(source)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", {**kept, "tokenizer_class": "PreTrainedTokenizerFast"})
    (folder / TEMPLATE_FILE).write_text(template, "utf-8")


def clean_config(config: dict[str, Any]) -> dict[str, Any]:
    """config.json without private leftovers, with rope_theta where readers of either generation look for it."""
    clean = {k: v for k, v in config.items() if k not in PRIVATE_CONFIG_KEYS}
    rope = clean.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        clean["rope_theta"] = rope["rope_theta"]
        if rope.get("rope_type", "default") != "default":  # the older name of a scaled rope
            clean["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"}
    elif "rope_theta" in clean and not clean.get("rope_scaling"):
        clean["rope_parameters"] = {"rope_theta": clean["rope_theta"], "rope_type": "default"}
    return clean


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder. Raises ModelError if there is none."""
    return read_json(folder / "config.json")


def count_parameters(folder: Path) -> int:
    """Number of weights stored in the folder's safetensors files (tied ones once), read from their headers."""
    total = 0
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "np") as f:
            for name in f.keys():  # noqa: SIM118  (safe_open has no iterator)
                size = 1
                for extent in f.get_slice(name).get_shape():
                    size *= extent
                total += size
    return total


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON file with sorted keys, so that equal content is equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")


def _copy_generation_config(source: Path, folder: Path) -> None:
    path = source / "generation_config.json"
    if not path.is_file():
        config = read_config(folder)
        ids = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / path.name, {k: v for k, v in ids.items() if v is not None})
        return
    settings = read_json(path)
    write_json(folder / path.name, {k: v for k, v in settings.items() if k not in PRIVATE_CONFIG_KEYS})
