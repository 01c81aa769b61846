"""The constants of the predictor: counted instructions, rates fitted on published phone runs, and their errors."""

from __future__ import annotations

from functools import cache
from importlib import resources

import yaml
from pydantic import BaseModel, ConfigDict, Field

PREDICTOR = "predictor.yaml"


class _Typed(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Errors(_Typed):
    """Errors on rows that the fit has not seen: |predicted / measured - 1|, and the band measured / predicted."""

    median: float
    p90: float
    low: float = Field(description="5% of the measured figures lie below this share of the predicted one.")
    high: float = Field(description="5% lie above this.")
    rows: int


class Basis(_Typed):
    """Errors of one kind of prediction: of decode and of prefill."""

    decode: Errors
    prefill: Errors


class Rates(_Typed):
    """What one device does, fitted on its own runs."""

    bytes_per_s: float
    instructions_per_s: float
    prefill_speed: float = Field(description="Prefill rate against what the constants for any device give.")
    threads: int


class Fitted(_Typed):
    """Constants for a device that was never measured. `pace` is cycles per second; see Profile.pace."""

    bytes_per_cycle: float
    instructions_per_cycle: float
    bandwidth_share: float = Field(description="Largest share of the memory bus's peak that a phone reached.")
    prefill_cycles_per_weight: dict[str, float]


class Predictor(_Typed):
    """Everything in predictor.yaml; benchmarks/targets/fit.py writes it."""

    source: str
    num_phones: int
    num_rows: int
    num_models: int
    smallest_weights: int
    largest_weights: int
    instructions_per_weight: dict[str, float]
    fitted: Fitted
    devices: dict[str, Rates]
    new_device: Basis
    known_device: Basis
    calibrated: Basis


@cache
def load_predictor() -> Predictor:
    """The constants that came with this version."""
    text = resources.files("edgeft.bench").joinpath(PREDICTOR).read_text("utf-8")
    return Predictor.model_validate(yaml.safe_load(text))
