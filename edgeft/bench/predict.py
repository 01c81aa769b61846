"""How fast a package will be on a device, and whether it fits: a first-order model, every figure of it *predicted*.

    seconds per generated token = bytes read / B + instructions / F
    seconds per prompt token    = sum over weight types of weights x cycles per weight / pace

B and F are rates of all threads together. For a device that was never measured both are proportional to its pace
(threads x clock of the slowest thread's core: after every matrix the fast ones wait), and B is at most a share of the
memory bus. A device among those the model was fitted on has B and F of its own; one run on a device corrects both.
The work of attention itself is left out: prompts are taken to be short.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from edgeft.bench.footprint import Footprint
from edgeft.bench.predictor import Basis, Fitted, Predictor, Rates
from edgeft.bench.profiles import Profile
from edgeft.errors import ArtifactError

UBATCH = 512  # prompt tokens that llama.cpp computes at once
TIMED_STEPS = 64  # generated tokens that the decode rate is an average over
# Resident memory beyond weights and cache that edgeft's own bench measured: interpreter, runtime, small buffers.
RUNTIME_BYTES = {"gguf": 80_000_000, "onnx": 95_000_000}
# CPUs for which llama.cpp keeps these types in another order: a tied head is then there twice, as embedding and head.
REPACKING = ("dotprod", "i8mm")
REPACKED = {"q4_0", "q4_k", "q5_k", "q6_k", "q8_0", "iq4_nl"}
TESTED_PROMPT, TESTED_ISA = 256, "i8mm"  # of the published runs that the model was fitted on
LONG = 4  # times as long a prompt: then attention is some percent of a small model's work
# Without these instructions a product takes more of others: smmla does the work of two sdot, sdot that of about four
# instructions before it, AVX2 registers hold twice as much. Reasoned, not fitted.
DECODE_WORK = {"armv8.0": 3.0, "dotprod": 1.0, "i8mm": 1.0, "avx2": 0.5}
PREFILL_WORK = {"armv8.0": 6.0, "dotprod": 2.0, "i8mm": 1.0, "avx2": 1.0}
# Types without figures of their own take those of the type whose kernel is most like theirs.
LIKE = {
    "f32": "f16", "bf16": "f16", "f16": "q8_0", "int8": "q8_0", "int4": "q4_0", "q5_1": "q5_0", "q4_1": "q5_0",
    "iq4_nl": "q4_0",
}  # fmt: skip
HEAVIER = {"f32": 2.0, "f16": 2.0}  # than that type: twice the bytes to move through the same kernel


@dataclass(frozen=True)
class Speed:
    """Rates of one device for one pace: bytes and instructions per second, and cycles for prefill."""

    bytes_per_s: float
    instructions_per_s: float
    prefill_cycles_per_s: float
    basis: str  # new_device, known_device or calibrated


@dataclass(frozen=True)
class Prediction:
    """All figures are predicted. `low` and `high` bound 90% of the measurements that the model was tested on."""

    device: str
    basis: str
    threads: int
    decode_tps: float
    decode_tps_low: float
    decode_tps_high: float
    prefill_tps: float
    ttft_s: float
    ttft_s_low: float
    ttft_s_high: float
    memory_bytes: int
    cache_bytes_per_1000: int
    usable_bytes: int
    fits: bool
    notes: tuple[str, ...] = field(default=())  # each takes this prediction beyond what was tested: the band is a guess

    def as_json(self) -> dict[str, Any]:
        """A dictionary in which every figure stands below the key `predicted`."""
        figures = {key: value for key, value in vars(self).items() if key not in ("device", "notes")}
        return {"device": self.device, "predicted": figures, "tested": not self.notes, "notes": list(self.notes)}


def predict(
    device: str, profile: Profile, package: Footprint, prompt_tokens: int, model: Predictor, scale: float = 1.0
) -> Prediction:
    """Speed and memory of `package` on a device. `scale`: measured over predicted speed, from `calibration`."""
    speed = speed_of(device, profile, model)
    if scale != 1.0:
        speed = calibrate(speed, scale)
    basis: Basis = getattr(model, speed.basis)
    decode_s = decode_seconds(package, speed, profile, model, context=prompt_tokens + TIMED_STEPS // 2)
    ttft_s = prompt_tokens * prefill_seconds(package, speed, profile, model.fitted) + head_seconds(
        package, speed, profile, model
    )
    memory = memory_bytes(package, prompt_tokens + TIMED_STEPS, profile.cpu.isa in REPACKING)
    return Prediction(
        device=device,
        basis=speed.basis,
        threads=_threads(device, profile, model),
        decode_tps=1 / decode_s,
        decode_tps_low=basis.decode.low / decode_s,
        decode_tps_high=basis.decode.high / decode_s,
        prefill_tps=1 / prefill_seconds(package, speed, profile, model.fitted),
        ttft_s=ttft_s,
        ttft_s_low=ttft_s / basis.prefill.high,
        ttft_s_high=ttft_s / basis.prefill.low,
        memory_bytes=memory,
        cache_bytes_per_1000=1000 * package.cache_bytes_per_token,
        usable_bytes=profile.usable_bytes,
        fits=memory <= profile.usable_bytes,
        notes=_notes(profile, package, prompt_tokens, model),
    )


def speed_of(device: str, profile: Profile, model: Predictor) -> Speed:
    """The device's own fitted rates if there are any, else those that follow from its profile."""
    own = model.devices.get(device)
    threads = _threads(device, profile, model)
    pace = profile.pace(threads)
    if own:
        return Speed(own.bytes_per_s, own.instructions_per_s, pace * own.prefill_speed, "known_device")
    return from_profile(profile, pace, model.fitted)


def from_profile(profile: Profile, pace: float, fitted: Fitted) -> Speed:
    """Rates of a device that was never measured."""
    peak = profile.bandwidth_gbps.value * fitted.bandwidth_share
    ceiling = (profile.achievable_gbps.value if profile.achievable_gbps else peak) * 1e9
    return Speed(min(pace * fitted.bytes_per_cycle, ceiling), pace * fitted.instructions_per_cycle, pace, "new_device")


def calibrate(speed: Speed, scale: float) -> Speed:
    """All rates times `scale`: what one run on the device told."""
    return replace(
        speed,
        bytes_per_s=speed.bytes_per_s * scale,
        instructions_per_s=speed.instructions_per_s * scale,
        prefill_cycles_per_s=speed.prefill_cycles_per_s * scale,
        basis="calibrated",
    )


def calibration(
    device: str, profile: Profile, package: Footprint, decode_tps: float, model: Predictor, prompt_tokens: int = 128
) -> float:
    """Measured over predicted decode rate of one package on the device."""
    predicted = predict(device, profile, package, prompt_tokens, model)
    return decode_tps / predicted.decode_tps


def decode_seconds(package: Footprint, speed: Speed, profile: Profile, model: Predictor, context: int) -> float:
    """Seconds for one token after `context` tokens: all weights and the cache are read once."""
    read = package.decode_bytes + package.cache_bytes_per_token * context
    work = instructions(package.weights, model.instructions_per_weight) * DECODE_WORK[profile.cpu.isa]
    return read / speed.bytes_per_s + work / speed.instructions_per_s


def prefill_seconds(package: Footprint, speed: Speed, profile: Profile, fitted: Fitted) -> float:
    """Seconds per prompt token; the head is computed once per prompt and not counted here."""
    cycles = sum(n * per_weight(kind, fitted.prefill_cycles_per_weight) for kind, n in package.layers.items())
    return cycles * PREFILL_WORK[profile.cpu.isa] / speed.prefill_cycles_per_s


def head_seconds(package: Footprint, speed: Speed, profile: Profile, model: Predictor) -> float:
    """Seconds for the logits after the last prompt token."""
    share = sum(package.head.values()) / sum(package.weights.values())
    work = instructions(package.head, model.instructions_per_weight) * DECODE_WORK[profile.cpu.isa]
    return package.decode_bytes * share / speed.bytes_per_s + work / speed.instructions_per_s


def instructions(weights: Mapping[str, int], per: Mapping[str, float]) -> float:
    """Instructions for one token."""
    return sum(count * per_weight(kind, per) for kind, count in weights.items())


def per_weight(kind: str, table: Mapping[str, float]) -> float:
    """The figure of a weight type, or of the one it is most like. Raises ArtifactError for a type that has neither."""
    if kind in table:
        return table[kind]
    if kind not in LIKE:
        raise ArtifactError(
            f"no speed can be predicted for weights of type {kind}", f"known are {', '.join([*table, *LIKE])}"
        )
    return HEAVIER.get(kind, 1.0) * per_weight(LIKE[kind], table)


def memory_bytes(package: Footprint, context: int, repacking: bool) -> int:
    """Resident memory of one process that runs the package with a context of so many tokens."""
    second_head = package.tied_head_bytes if repacking and set(package.head) <= REPACKED else 0
    batch = min(UBATCH, context) * 4 * package.width * 4  # activations: about four rows of floats per token
    table = package.vocab * package.width * 4 if package.format == "onnx" else 0  # onnxruntime unpacks the embedding
    cache = package.cache_bytes_per_token * context
    return package.resident_bytes + second_head + cache + batch + table + RUNTIME_BYTES[package.format]


def _threads(device: str, profile: Profile, model: Predictor) -> int:
    own: Rates | None = model.devices.get(device)
    return own.threads if own else profile.threads


def _notes(profile: Profile, package: Footprint, prompt_tokens: int, model: Predictor) -> tuple[str, ...]:
    """What takes this prediction beyond what was tested."""
    notes = []
    if package.format == "onnx":
        notes.append("onnxruntime was not among the tested runs: its kernels are taken to be as fast as llama.cpp's")
    weights = sum(package.weights.values())
    tested = f"tested on {model.smallest_weights / 1e9:.1f} to {model.largest_weights / 1e9:.1f} billion weights"
    if weights < model.smallest_weights:
        notes.append(
            f"{tested}, this has {weights / 1e9:.2f}: what a token costs beside its weights (threads that wait for one "
            "another) is not in the model, so the real rate is more likely below the predicted one"
        )
    if weights > model.largest_weights:
        notes.append(f"{tested}, this has {weights / 1e9:.1f}")
    if prompt_tokens > LONG * TESTED_PROMPT:
        notes.append(
            f"tested with prompts of {TESTED_PROMPT} tokens: attention, whose work grows with the prompt's square, is "
            "left out, so the real time to first token is more likely above the predicted one"
        )
    if profile.cpu.isa != TESTED_ISA:
        notes.append(f"tested on CPUs with {TESTED_ISA}; what {profile.cpu.isa} costs is reasoned, not fitted")
    if profile.family != "phone":
        notes.append("fitted on phones; see the check on boards and laptops in benchmarks/targets/table.md")
    if profile.soc.startswith("A1"):
        notes.append("no iPhone was among the tested runs, and apps there use the GPU, which is not predicted")
    return tuple(notes)
