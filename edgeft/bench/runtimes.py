"""Which runtimes there are, and what each can run. Adding one is a row here and a file with its session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgeft.errors import ArtifactError


@dataclass(frozen=True)
class Runtime:
    """What a folder must hold to be run: `file`, by which it is opened, and what else (patterns)."""

    format: str
    file: str
    session: str  # module:what opens one
    others: tuple[str, ...] = ()


# A folder that several can run is run by the first of them unless another is asked for.
RUNTIMES: Mapping[str, Runtime] = {
    "llama.cpp": Runtime("gguf", "model.gguf", "edgeft.bench.llamacpp:LlamaCppSession"),
    "onnxruntime": Runtime("onnx", "model.onnx", "edgeft.bench.ort:open_graph"),
    "genai": Runtime("onnx", "model.onnx", "edgeft.bench.genai:GenaiSession", ("genai_config.json",)),
    "torch": Runtime("hf", "config.json", "edgeft.bench.torch_ref:TorchSession", ("*.safetensors",)),
}
ALL = "all"


def runtimes_of(folder: Path) -> list[str]:
    """Names of the runtimes that can run what is in `folder`; none if it holds no model."""
    return [
        name
        for name, runtime in RUNTIMES.items()
        if all(next(folder.glob(pattern), None) is not None for pattern in (runtime.file, *runtime.others))
    ]


def runtime_of(folder: Path, wanted: str | None = None) -> str:
    """The runtime for `folder`: the wanted one, or the first that can run it.

    Raises ArtifactError if there is none, or the wanted one cannot.
    """
    known = runtimes_of(folder)
    if wanted is not None and wanted not in RUNTIMES:
        raise ArtifactError(f"no runtime is called {wanted!r}", f"known are {', '.join(RUNTIMES)}")
    if not known:
        raise ArtifactError(
            f"{folder} holds none of model.gguf, model.onnx, *.safetensors",
            "name the folder of an exported package, or of a model",
        )
    if wanted is not None and wanted not in known:
        raise ArtifactError(f"{wanted} cannot run {folder}", f"it runs in {' or '.join(known)}")
    return wanted or known[0]
