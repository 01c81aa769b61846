"""What a recipe says about learning: the teacher's adapter, its merge, the student, its targets and its healing."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from edgeft.settings import Fraction, Positive, Settings

Precision = Literal["auto", "bf16", "fp32"]
LoopPrecision = Precision | Literal["int8"]
WIDTH_UNIT = 32  # weights of a row that every quantised package takes together
Width = Annotated[int, Field(gt=0, multiple_of=WIDTH_UNIT)]


class LoopSettings(Settings):
    """Settings of one training run."""

    epochs: Annotated[float, Field(gt=0)] = 2.0
    """Passes over the training rows."""
    lr: Annotated[float, Field(gt=0)] = 5e-4
    """Peak learning rate of AdamW."""
    batch_rows: Positive = 16
    """Rows per optimiser step."""
    micro_rows: Positive | None = None
    """Rows computed at once, to save memory: gradients are summed until batch_rows are done; null takes all at once."""
    memory_limit: Annotated[float, Field(gt=0)] | None = None
    """Gigabytes that training may take; fewer rows at once, then computing layers twice, keep it under that."""
    max_tokens: Positive = 512
    """Longest row in tokens; a longer one is an error that names the row."""
    warmup: Fraction = 0.05
    """Share of the steps in which the learning rate rises."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How it goes on: in a straight line or along a cosine to zero, or unchanged."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW weight decay (matrices only)."""
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    """Largest gradient norm."""
    evaluations: Positive = 6
    """Looks at the validation rows per run, evenly spaced; each may become the kept checkpoint."""
    choose_by: Literal["loss", "exact_match"] = "loss"
    """What makes a checkpoint the best: validation loss, or the share of validation rows with the right first line."""
    patience: Positive = 3
    """Stop after this many evaluations without a better one."""
    checkpoint_minutes: Annotated[float, Field(ge=0)] = 1.0
    """Minutes between checkpoints to resume from."""
    precision: LoopPrecision = "auto"
    """Arithmetic of the products with weights; auto measures: bf16 or fp32, for frozen weights on a CPU int8 too."""
    seed: int = 0
    """Seed of initialisation and data order."""


class TrainSettings(LoopSettings):
    """What of the base model learns, and how; the default is QLoRA (Dettmers et al. 2023)."""

    method: Literal["qlora", "lora", "full"] = "qlora"
    """qlora: a low-rank adapter over the base in 4 bits; lora: over the base as it is; full: the weights themselves."""
    last_layers: Positive | None = None
    """Train only in the last so many decoder layers; null: in all, and with full the embedding, head and norms too."""
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    """Linear layers that get an adapter: their names, or patterns over the dotted path such as *.mlp.*."""
    rank: Positive = 16
    """Rank of the adapter."""
    alpha: Positive = 32
    """Scale of the adapter: its update is multiplied by alpha / rank."""
    rslora: bool = False
    """Multiply it by alpha / sqrt(rank) instead, so that high ranks keep learning (Kalajdzievski 2023)."""
    dora: bool = False
    """Learn the length of each row of a weight apart from its direction (DoRA, Liu et al. 2024)."""
    init: Literal["lora", "pissa", "loftq"] = "lora"
    """How the adapter starts: from nothing, from the base's largest directions, or from what 4 bits lose."""
    dropout: Fraction = 0.0
    """Dropout on the adapter's input."""
    quant: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit type of qlora's base."""
    double_quant: bool = True
    """Quantise its scales too."""

    @model_validator(mode="after")
    def _consistent(self) -> TrainSettings:
        if self.init == "loftq" and self.method != "qlora":
            raise ValueError("init: loftq starts from what 4 bits lose, so it needs method: qlora")
        if self.precision == "int8" and self.method != "full" and not self.adapter_is_plain:
            raise ValueError("precision: int8 is for adapters without dora and dropout; leave it at auto")
        return self

    @property
    def adapter_is_plain(self) -> bool:
        """Whether it only adds its update, so that edgeft computes it in place of PEFT."""
        return not self.dora and not self.dropout

    @property
    def base_is_frozen(self) -> bool:
        """Whether every product is with a weight that stays as it is, or with the adapter beside it."""
        return self.method in ("qlora", "lora") and self.adapter_is_plain

    @property
    def scale(self) -> float:
        """Factor of the adapter's update."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class OtherAdapter(Settings):
    """An adapter trained on the same base, by edgeft or PEFT."""

    adapter: str
    """Its folder, with adapter_config.json and adapter_model.safetensors."""
    weight: float = 1.0
    """What its update is multiplied by."""


class MergeSettings(Settings):
    """Folding the adapter into weights."""

    into: Literal["auto", "dequantized", "original", "per_layer"] = "auto"
    """What qlora's adapter is added to: the 4-bit base it was trained against, the original, or either by layer."""
    strength: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = "auto"
    """How much of what was learned is added: 1 is all, less forgets less; auto measures on the validation rows."""
    adapters: tuple[OtherAdapter, ...] = ()
    """Other adapters of the same base that are merged with the trained one, whose weight is 1."""
    combine: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear"
    """linear adds them up; ties keeps what is large and agrees in sign; dare drops entries by chance."""
    density: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of each update's entries that ties and dare keep."""


class StudentSettings(Settings):
    """The student: a shape cut from the merged teacher, or a ready-made model."""

    model: str | None = None
    """A pretrained student in place of a cut one, named as base.model is; then nothing below is set but its pins."""
    revision: str | None = None
    """Commit of its hub id."""
    sha256: str | None = None
    """sha256 of its .gguf file; checked when given."""
    decode_speedup: Annotated[float, Field(gt=1)] | None = None
    """How many times as fast as the teacher it decodes: layers and ffn are then chosen, by timing shapes."""
    timed_on: str | None = Field(default=None, exclude=True)  # from keys: a student depends on its shape alone
    """Where: a target as of `edgeft bench --target`, such as ssh:pi@board or android:SERIAL; null: this machine."""
    layers: Positive | None = 15
    """Layers kept; null keeps all."""
    layer_choice: Literal["loss", "influence", "block"] = "loss"
    """Which layers go: one by one by the loss on your rows; or those, or the block, that change states least."""
    ffn: Width | None = None
    """Feed-forward channels kept in each layer: those that add most on your rows. A multiple of 32; null keeps all."""
    hidden: Width | None = None
    """Channels of the hidden state kept, likewise. Multiples of 256 are best for GGUF's k-quants; null keeps all."""
    kv_heads: Positive | None = None
    """Key-value heads kept in each layer with their query heads, likewise; null keeps all."""
    vocabulary: Positive | None = None
    """Tokens kept: those your training rows need, however many, all bytes, and the commonest others; null keeps all."""
    steps: Positive = 1
    """Cuts until that shape is reached, equal ones; each is healed with an equal share of distill.epochs."""

    @model_validator(mode="after")
    def _one_way_to_a_shape(self) -> StudentSettings:
        pins = {"revision", "sha256"}
        if self.model and (cuts := sorted(self.model_fields_set - pins - {"model"})):
            raise ValueError(f"a ready-made student.model is taken as it is; leave out {', '.join(cuts)}, or the model")
        if not self.model and (lone := sorted(self.model_fields_set & pins)):
            raise ValueError(f"{', '.join(lone)} belongs to student.model, which is not set")
        if self.timed_on and not self.decode_speedup:
            raise ValueError("timed_on says where shapes are timed for decode_speedup, which is not set")
        if given := self.model_fields_set & {"layers", "ffn"} if self.decode_speedup else None:
            raise ValueError(f"decode_speedup chooses {' and '.join(sorted(given))}: give one or the other")
        return self


class TargetSettings(Settings):
    """What the student learns from, made once by the teacher: its probabilities, or answers of its own."""

    kind: Literal["tokens", "answers"] = "tokens"
    """tokens: its probabilities of each token of your answers; answers: its own, which suit any student's tokenizer."""
    keep: Literal["all", "agreeing"] = "all"
    """Which of these answers are learned: all, or those whose first line says what your row's says."""
    top_k: Annotated[int, Field(ge=1, le=256)] = 16
    """Tokens kept per position, of kind tokens."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Of kind tokens: what the teacher's logits are divided by, and the student's when it learns; above 1 is softer."""
    shard_rows: Positive = 256
    """Rows per shard, the unit of resume."""
    max_tokens: Positive = 512
    """Longest row in tokens; an answer of the teacher that does not end by then is left out."""
    precision: Precision = "auto"
    """Arithmetic of the teacher; auto measures which is faster on this machine."""

    @model_validator(mode="after")
    def _consistent(self) -> TargetSettings:
        if self.keep == "agreeing" and self.kind != "answers":
            raise ValueError("keep: agreeing chooses among the teacher's own answers, so it needs kind: answers")
        return self


class DistillSettings(LoopSettings):
    """Healing the student on the teacher's probabilities and the labels; its embedding and head stay the teacher's."""

    teacher_weight: Fraction = 0.5
    """Share of the loss that comes from the teacher, its probabilities or answers; the rest comes from the labels."""
    divergence: Literal["forward_kl", "reverse_kl", "js", "skewed_kl"] = "forward_kl"
    """Of kind tokens: KL(teacher || student), KL(student || teacher), Jensen-Shannon, or KL(teacher || a mixture)."""
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """The teacher's share in skewed_kl's mixture."""
    hidden_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the squared distance of all layers' outputs from the teacher's; the teacher is then in memory."""
    attention_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the divergence of the last layer's query, key and value relations; the teacher is then in memory."""
    on_policy: Fraction = 0.0
    """Share of steps in which the student answers and the teacher, then in memory, scores it (Agarwal et al. 2023)."""

    @property
    def matches_inside(self) -> bool:
        """Whether hidden states or attention are matched."""
        return bool(self.hidden_weight or self.attention_weight)

    @property
    def needs_teacher(self) -> bool:
        """Whether the teacher itself is needed, and not only its targets."""
        return self.matches_inside or self.on_policy > 0
