from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from edgeft.bench.footprint import Footprint
from edgeft.bench.predict import calibration, memory_bytes, per_weight, predict
from edgeft.bench.predictor import load_predictor
from edgeft.bench.profiles import Profile, load_profiles
from edgeft.errors import ArtifactError

GGUF = Footprint(
    format="gguf",
    layers={"q4_0": 900_000_000, "q6_k": 100_000_000},
    head={"q6_k": 300_000_000},
    decode_bytes=834_375_000,
    resident_bytes=900_000_000,
    tied_head_bytes=246_093_750,
    cache_bytes_per_token=50_000,
    vocab=150_000,
    width=2000,
)
MODEL = load_predictor()
PHONES = load_profiles()


def test_the_decode_rate_of_a_new_device_is_bytes_over_bandwidth_plus_instructions_over_rate() -> None:
    profile = PHONES["galaxy-a54"]  # 4 fast cores at 2.4 GHz
    found = predict("galaxy-a54", profile, GGUF, 68, MODEL)
    pace, f = 4 * 2.4e9, MODEL.fitted
    read = 834_375_000 + 50_000 * 100  # 68 prompt tokens, and the middle of 64 generated ones
    work = 900e6 * MODEL.instructions_per_weight["q4_0"] + 400e6 * MODEL.instructions_per_weight["q6_k"]
    bandwidth = min(pace * f.bytes_per_cycle, 34.1e9 * f.bandwidth_share)
    assert found.decode_tps == pytest.approx(1 / (read / bandwidth + work / (pace * f.instructions_per_cycle)))
    assert (found.basis, found.threads) == ("new_device", 4)


def test_the_memory_bus_limits_a_device_with_many_fast_cores() -> None:
    profile = PHONES["galaxy-a54"]
    slow_bus = profile.bandwidth_gbps.model_copy(update={"value": 5.0})
    narrow = profile.model_copy(update={"bandwidth_gbps": slow_bus})
    found = predict("x", narrow, GGUF, 1, MODEL).decode_tps
    assert found < 5e9 / GGUF.decode_bytes
    assert found < predict("x", profile, GGUF, 1, MODEL).decode_tps / 2


def test_a_measured_memory_rate_stands_in_for_a_share_of_the_peak() -> None:
    profile = PHONES["raspberry-pi-5"]
    assert profile.achievable_gbps is not None
    less = profile.achievable_gbps.model_copy(update={"value": profile.achievable_gbps.value / 4})
    slower = profile.model_copy(update={"achievable_gbps": less})
    assert predict("x", slower, GGUF, 1, MODEL).decode_tps < 0.5 * predict("x", profile, GGUF, 1, MODEL).decode_tps


def test_a_fitted_phone_is_predicted_by_its_own_rates_with_a_narrower_band() -> None:
    fitted = predict("galaxy-s23", PHONES["galaxy-s23"], GGUF, 128, MODEL)
    unknown = predict("some-phone", PHONES["galaxy-s23"], GGUF, 128, MODEL)
    assert (fitted.basis, unknown.basis) == ("known_device", "new_device")

    def width(low: float, high: float) -> float:
        return math.log(high / low)

    own = width(fitted.decode_tps_low, fitted.decode_tps_high)
    assert own < width(unknown.decode_tps_low, unknown.decode_tps_high)


def test_one_run_on_the_device_corrects_every_package() -> None:
    profile = PHONES["pixel-8"]
    before = predict("pixel-8", profile, GGUF, 128, MODEL)
    scale = calibration("pixel-8", profile, GGUF, 0.8 * before.decode_tps, MODEL)
    after = predict("pixel-8", profile, GGUF, 128, MODEL, scale)
    assert after.basis == "calibrated"
    assert after.decode_tps == pytest.approx(0.8 * before.decode_tps)
    assert after.ttft_s == pytest.approx(before.ttft_s / 0.8)
    other = replace(GGUF, layers={"q8_0": 500_000_000}, decode_bytes=700_000_000)
    changed = predict("pixel-8", profile, other, 128, MODEL, scale).decode_tps
    assert changed == pytest.approx(0.8 * predict("pixel-8", profile, other, 128, MODEL).decode_tps)


def test_a_longer_prompt_takes_longer_and_needs_more_memory() -> None:
    short, long = (predict("pixel-8", PHONES["pixel-8"], GGUF, n, MODEL) for n in (128, 1024))
    assert 7 < long.ttft_s / short.ttft_s < 8  # the head is computed once
    assert long.memory_bytes > short.memory_bytes + 50_000 * 896 - 1
    assert long.decode_tps < short.decode_tps


def test_a_cpu_without_dot_products_is_slower_at_prompts_than_at_answers() -> None:
    pi = PHONES["raspberry-pi-4"]
    with_dots = pi.model_copy(update={"cpu": pi.cpu.model_copy(update={"isa": "dotprod"})})
    old, new = (predict("x", p, GGUF, 128, MODEL) for p in (pi, with_dots))
    assert old.ttft_s > 2 * new.ttft_s
    assert new.decode_tps > old.decode_tps > new.decode_tps / 3


def test_what_needs_more_than_an_app_gets_does_not_fit() -> None:
    phone = PHONES["redmi-12-5g"]
    big = replace(GGUF, resident_bytes=phone.usable_bytes)
    assert not predict("redmi-12-5g", phone, big, 128, MODEL).fits
    assert predict("redmi-12-5g", phone, GGUF, 128, MODEL).fits


def test_a_tied_head_is_in_memory_twice_where_llama_cpp_reorders_weights() -> None:
    once, twice = (memory_bytes(GGUF, 100, repacking) for repacking in (False, True))
    assert twice == once + GGUF.tied_head_bytes
    plain = replace(GGUF, head={"f16": 300_000_000})
    assert memory_bytes(plain, 100, True) == memory_bytes(plain, 100, False)


def test_beyond_tested_ground_a_prediction_says_so() -> None:
    tiny = replace(GGUF, layers={"q8_0": 70_000_000}, head={"q8_0": 9_000_000}, decode_bytes=84_000_000)
    assert predict("pixel-8", PHONES["pixel-8"], GGUF, 128, MODEL).notes == ()
    for name, package, prompt, said in (
        ("pixel-8", tiny, 128, ["billion weights"]),
        ("pixel-8", replace(GGUF, format="onnx"), 128, ["onnxruntime"]),
        ("pixel-8", GGUF, 8000, ["attention"]),
        ("pixel-6a", GGUF, 128, ["what dotprod costs"]),
        ("raspberry-pi-5", GGUF, 128, ["what dotprod costs", "boards and laptops"]),
    ):
        notes = predict(name, PHONES[name], package, prompt, MODEL).notes
        assert len(notes) == len(said) and all(map(str.__contains__, notes, said)), (name, notes)


def test_every_figure_of_a_prediction_stands_under_the_key_predicted() -> None:
    found = predict("pixel-8", PHONES["pixel-8"], GGUF, 128, MODEL).as_json()
    assert set(found) == {"device", "predicted", "tested", "notes"}
    assert found["tested"] is True


def test_a_type_without_figures_takes_those_of_its_like_and_an_unknown_one_is_an_error() -> None:
    table = {"q8_0": 0.2, "q4_0": 0.3}
    assert per_weight("int4", table) == 0.3
    assert per_weight("f16", table) == pytest.approx(0.4)
    assert per_weight("f32", table) == pytest.approx(0.8)
    with pytest.raises(ArtifactError, match="iq1_s"):
        per_weight("iq1_s", table)


@pytest.mark.parametrize(
    ("fmt", "resident_mb", "vocab", "cache", "measured_mb"),
    [
        ("gguf", 269.1, 49152, 23040, 360),
        ("gguf", 143.0, 49152, 23040, 234),
        ("gguf", 160.5, 16384, 15360, 237),
        ("gguf", 59.3, 16384, 15360, 142),
        ("onnx", 153.5, 49152, 46080, 372),
        ("onnx", 58.2, 16384, 30720, 204),
    ],
)
def test_predicted_memory_is_within_a_tenth_of_what_the_bench_measured(
    fmt: str, resident_mb: float, vocab: int, cache: int, measured_mb: float
) -> None:
    """Peak RSS of six packages in the README's table, in a context of 512 tokens."""
    package = Footprint(fmt, {}, {}, 0, int(resident_mb * 1e6), 0, cache, vocab, 576)
    assert memory_bytes(package, 512, repacking=False) == pytest.approx(measured_mb * 1e6, rel=0.1)


def test_the_stated_errors_are_those_of_runs_left_out() -> None:
    for basis in (MODEL.new_device, MODEL.known_device, MODEL.calibrated):
        for part in (basis.decode, basis.prefill):
            assert part.low < 1 < part.high
            assert 0 < part.median < part.p90 < 0.5
            assert part.rows >= MODEL.num_rows >= 12
    assert MODEL.known_device.decode.median < MODEL.calibrated.decode.median < MODEL.new_device.decode.median


@pytest.mark.slow
def test_a_fit_on_the_published_runs_gives_the_constants_that_ship(real_data: Path) -> None:
    path = real_data / "phones" / "phone_measurements.csv"
    if not path.is_file():
        pytest.skip("the published phone runs are not here")
    from benchmarks.targets.fit import fit, read_runs

    assert type(MODEL).model_validate(fit(read_runs(path))) == MODEL


def profile_names() -> list[str]:
    return list(PHONES)


@pytest.mark.parametrize("name", profile_names())
def test_every_profile_gives_a_prediction_between_its_bounds(name: str) -> None:
    profile: Profile = PHONES[name]
    found = predict(name, profile, GGUF, 128, MODEL)
    assert found.decode_tps_low < found.decode_tps < found.decode_tps_high
    assert found.ttft_s_low < found.ttft_s < found.ttft_s_high
    assert 0.5 < found.decode_tps < profile.bandwidth_gbps.value * 1e9 / GGUF.decode_bytes
