"""What a recipe says about its packages: their types, and how far each may be from the model it came from."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from edgeft.settings import Settings

GgufQuant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs",
    "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0", "q1_0",
]  # fmt: skip
TensorType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k",
    "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0", "q1_0",
    "mxfp4", "nvfp4",
]  # fmt: skip
NEED_IMPORTANCE = {
    "q2_k_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
}  # fmt: skip # by llama.cpp's rule
OnnxQuant = Literal["fp32", "fp16", "int8", "int4"]
Rung = Literal["merged", "student"]  # what is compared before there is a package


class ExportSettings(Settings):
    """The packages that are written, each compared with the torch model it came from."""

    gguf: tuple[GgufQuant, ...] = ("f16", "q8_0", "q4_k_m")
    """GGUF types for llama.cpp: all that it can write."""
    importance: Literal["auto", "none"] = "auto"
    """auto: types below 8 bits keep exact what your training rows use most (llama.cpp's importance matrix)."""
    tensor_types: dict[str, TensorType] = {}
    """GGUF types of parts (head, embedding, attn_q, blk.0.*) in quantised files; the first rule that fits counts."""
    lora: bool = False
    """Also write the adapter unmerged, for llama.cpp to put on the base model's GGUF."""
    onnx: tuple[OnnxQuant, ...] = ("fp32", "int8", "int4")
    """ONNX precisions for onnxruntime; fp16 is stored in half precision and computed in single."""
    int4_blocks: Annotated[tuple[Literal[16, 32, 64, 128], ...], Field(min_length=1)] = (32,)
    """Weights per scale that are tried for int4, each with zero points and without; what uses its bits best is kept."""
    exporter: Literal["builder", "optimum"] = "builder"
    """Who writes ONNX graphs: onnxruntime-genai's builder, or optimum (fp32 and fp16 alone; `make optimum` first)."""
    onnx_alignment: Literal[4096, 16384, 65536] | None = None
    """Bytes at whose multiples large weights begin in model.onnx_data, for runtimes that map them into memory."""
    onnx_static: Annotated[int, Field(ge=16)] | None = None
    """Also write model.static.onnx: all shapes fixed, one token at a time, a cache of so many tokens."""
    onnx_ort: bool = False
    """Also write model.ort and the operators it needs, for reduced builds of onnxruntime."""
    probe_rows: Annotated[int, Field(ge=8)] = 64
    """Validation rows whose reference answers every package is compared on."""
    max_kl: dict[GgufQuant | OnnxQuant | Rung, Annotated[float, Field(gt=0)]] = {
        "merged": 0.5, "student": 1.0,
        "f32": 0.001, "f16": 0.001, "bf16": 0.02, "fp32": 0.0001, "fp16": 0.001, "q8_0": 0.02, "int8": 0.02,
        "q6_k": 0.05,
        "q5_k_m": 0.1, "q5_k_s": 0.1, "q5_1": 0.1, "q5_0": 0.15, "q4_k_m": 0.3, "q4_k_s": 0.4, "q4_1": 0.6, "q4_0": 0.8,
        "iq4_nl": 0.5, "iq4_xs": 0.5, "int4": 0.8, "q3_k_l": 0.8, "q3_k_m": 0.8, "q3_k_s": 1.0, "iq3_m": 0.8,
        "iq3_s": 1.0, "iq3_xs": 1.0, "iq3_xxs": 1.2, "q2_k": 1.5, "q2_k_s": 1.5, "iq2_m": 1.5, "iq2_s": 1.5,
        "iq2_xs": 1.5, "iq2_xxs": 1.5, "iq1_m": 2.0, "iq1_s": 2.0, "tq2_0": 2.0, "tq1_0": 2.0, "q1_0": 2.0,
    }  # fmt: skip
    """Largest mean KL divergence (nats): of `merged` from the model as trained, of `student` from its teacher, of a
    package from its torch model. What is above it fails."""
    max_tail: Annotated[float, Field(ge=1)] = 10.0
    """Largest 99th percentile of the KL divergence, in multiples of max_kl."""

    @model_validator(mode="after")
    def _importance_where_needed(self) -> ExportSettings:
        if self.importance == "none" and (lost := sorted(NEED_IMPORTANCE & set(self.gguf))):
            raise ValueError(f"{', '.join(lost)} cannot be made without knowing what matters: take importance: auto")
        return self

    @model_validator(mode="after")
    def _what_optimum_writes(self) -> ExportSettings:
        quantised = [quant for quant in self.onnx if quant in ("int8", "int4")]
        if self.exporter == "optimum" and (quantised or self.onnx_static):
            raise ValueError(
                f"exporter: optimum writes fp32 and fp16 alone; leave out {', '.join(quantised) or 'onnx_static'}"
            )
        return self

    @field_validator("max_kl")
    @classmethod
    def _fill(cls, given: dict[str, float]) -> dict[str, float]:
        return {**cls.model_fields["max_kl"].default, **given}
