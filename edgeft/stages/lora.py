"""lora: the adapter as it was trained, unmerged, as a file that llama.cpp puts on the base model's GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.artifact import Artifact
from edgeft.formats.gguf_lora import write_lora
from edgeft.learning_settings import TrainSettings
from edgeft.progress import Reporter

if TYPE_CHECKING:
    from edgeft.plan import LoraNode

FILE = "adapter.gguf"


def run(cfg: LoraNode, inputs: dict[str, Artifact], out: Path, report: Reporter) -> dict[str, Any]:
    """Inputs: model (the base), adapter. Writes `adapter.gguf`, float32."""
    base, learned = inputs["model"], inputs["adapter"]
    scale = TrainSettings.model_validate(learned.config).scale
    adapter = learned.file("adapter_model.safetensors")
    matrices = write_lora(adapter, scale, base.path, out / FILE, base.metrics["source"])
    report.note(f"{matrices} matrices: llama-cli -m BASE.gguf --lora {FILE}")
    return {"matrices": matrices, "scale": scale, "bytes": (out / FILE).stat().st_size}
