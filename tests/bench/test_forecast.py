from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft import cli
from edgeft.bench.footprint import Footprint
from edgeft.bench.forecast import (
    DEVICE_HEADERS,
    FORECAST_HEADERS,
    Package,
    device_remarks,
    device_rows,
    forecast,
    forecast_rows,
    remarks,
)
from edgeft.bench.profiles import load_profiles
from edgeft.errors import EdgeftError
from tests.bench.test_footprint import write_gguf

BIG = Footprint("gguf", {"q8_0": 1_400_000_000}, {"q8_0": 200_000_000}, 1_700_000_000, 1_750_000_000, 0, 1000, 100, 64)
SMALL = Footprint("gguf", {"q4_0": 900_000_000}, {"q6_k": 150_000_000}, 630_000_000, 630_000_000, 0, 1000, 100, 64)
PACKAGES = [Package("big", Path("a"), "d1", BIG), Package("small", Path("b"), "d2", SMALL)]
PHONES = {name: load_profiles()[name] for name in ("pixel-8", "redmi-12-5g")}
Captured = pytest.CaptureFixture[str]


def edgeft(*args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    return int(stop.value.code or 0)


def test_every_device_lists_its_packages_fastest_first_and_every_number_is_labelled_predicted() -> None:
    rows = forecast(PACKAGES, PHONES, 128)
    assert [(r["device"], r["package"]) for r in rows] == [(d, p) for d in PHONES for p in ("small", "big")]
    for row in rows:
        assert not any(isinstance(value, float) for key, value in row.items() if key != "predicted")
    assert FORECAST_HEADERS[:2] == ["device", "package"]
    assert all(header.startswith("predicted ") for header in FORECAST_HEADERS[2:])
    assert all(len(cells) == len(FORECAST_HEADERS) for cells in forecast_rows(rows))


def test_the_band_of_the_time_to_first_token_stands_beside_it_in_brackets_where_untested() -> None:
    tiny = Package("tiny", Path("c"), None, Footprint("onnx", {"int4": 9**7}, {"int8": 9**6}, 9**7, 9**7, 0, 1, 1, 1))
    at = FORECAST_HEADERS.index("predicted TTFT ms, 90%")
    for package, untested in ((PACKAGES[0], False), (tiny, True)):
        [row] = forecast([package], {"pixel-8": PHONES["pixel-8"]}, 128)
        band = forecast_rows([row])[0][at]
        low, high = (1000 * row["predicted"][f"ttft_s_{end}"] for end in ("low", "high"))
        assert band == (f"({low:,.0f}-{high:,.0f})" if untested else f"{low:,.0f}-{high:,.0f}")


def test_figures_that_nobody_checked_are_marked_in_the_list_of_devices() -> None:
    known = load_profiles()
    row = dict(zip(DEVICE_HEADERS, device_rows({"pixel-8": known["pixel-8"]})[0], strict=True))
    assert row["peak GB/s"] == "51.2?" and row["RAM GB"] == "8" and not row["fast cores"].endswith("?")
    told = device_remarks({name: known[name] for name in ("pixel-8", "galaxy-s23")})
    assert told[0].startswith("? unverified") and told[0].endswith(": pixel-8.")
    assert device_remarks({"galaxy-s23": known["galaxy-s23"]}) == told[1:]


def test_what_does_not_fit_says_no() -> None:
    cells = {(row[0], row[1]): row[-1] for row in forecast_rows(forecast(PACKAGES, PHONES, 128))}
    assert cells == {
        ("pixel-8", "small"): "yes",
        ("pixel-8", "big"): "yes",
        ("redmi-12-5g", "small"): "yes",
        ("redmi-12-5g", "big"): "no",
    }


def test_the_remarks_name_the_source_the_errors_and_what_was_not_tested() -> None:
    untested = [Package("tiny", Path("c"), None, Footprint("onnx", {"int4": 9}, {"int8": 9}, 18, 18, 0, 1, 1, 1))]
    said = "\n".join(remarks(forecast([*PACKAGES, *untested], PHONES, 128), 128))
    assert said.startswith("Predicted, not measured")
    assert "PocketPal" in said and "median error" in said
    assert "tiny: onnxruntime was not among the tested runs" in said and "big:" not in said
    brackets = [row[3].startswith("(") for row in forecast_rows(forecast([*PACKAGES, *untested], PHONES, 128))]
    assert brackets.count(True) == 4  # tiny on both devices, and all on the one without i8mm
    assert "redmi-12-5g: tested on CPUs with i8mm; what dotprod costs is reasoned, not fitted" in said


def test_one_run_on_the_device_may_come_from_a_bench_result(tmp_path: Path) -> None:
    result = tmp_path / "bench.json"
    threads = forecast(PACKAGES, {"pixel-8": PHONES["pixel-8"]}, 128)[0]["predicted"]["threads"]
    measured = {"digest": "d2", "decode_tps": 12.0, "conditions": {"prompt_tokens": 128, "threads": threads}}
    result.write_text(json.dumps([{"digest": "other", "decode_tps": 99.0}, measured]))
    [phone] = [{"pixel-8": PHONES["pixel-8"]}]
    by_file = forecast(PACKAGES, phone, 128, str(result))
    assert next(r for r in by_file if r["package"] == "small")["predicted"]["decode_tps"] == pytest.approx(12.0)
    by_number = forecast(PACKAGES[::-1], phone, 128, "12")
    assert [r["predicted"] for r in by_number] == [r["predicted"] for r in by_file]
    result.write_text(json.dumps([{**measured, "conditions": {"prompt_tokens": 128, "threads": threads + 1}}]))
    with pytest.raises(EdgeftError, match=f"measured on {threads + 1} threads, where {threads} are predicted"):
        forecast(PACKAGES, phone, 128, str(result))
    result.write_text(json.dumps([{**measured, "target": "local"}, {**measured, "target": "android:X"}]))
    with pytest.raises(EdgeftError, match=r"several targets \(android:X, local\)"):
        forecast(PACKAGES, phone, 128, str(result))


@pytest.mark.parametrize("value", ["-3", "fast", "nan"])
def test_a_rate_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(EdgeftError, match="neither a file nor a number"):
        forecast(PACKAGES, {"pixel-8": PHONES["pixel-8"]}, 128, value)


def test_a_run_corrects_one_device_only_and_only_with_a_package_that_is_here(tmp_path: Path) -> None:
    with pytest.raises(EdgeftError, match="one run tells about one device"):
        forecast(PACKAGES, PHONES, 128, "12")
    (tmp_path / "bench.json").write_text("[]")
    with pytest.raises(EdgeftError, match="no row measures"):
        forecast(PACKAGES, {"pixel-8": PHONES["pixel-8"]}, 128, str(tmp_path / "bench.json"))


def test_the_command_lists_devices_and_predicts_for_packages(tmp_path: Path, capsys: Captured) -> None:
    assert edgeft("devices") == 0
    listed = capsys.readouterr().out
    assert "pixel-6a" in listed and "edgeft devices PACKAGE" in listed
    write_gguf(tmp_path, tied=True)
    assert edgeft("devices", str(tmp_path), "--device", "pixel-6a", "--prompt-tokens", "64") == 0
    out = capsys.readouterr().out
    assert "predicted tok/s" in out and "Predicted, not measured: CPU, prompt of 64 tokens" in out
    assert edgeft("devices", str(tmp_path), "--device", "pixel-6a", "--json") == 0
    [row] = json.loads(capsys.readouterr().out)
    assert row["device"] == "pixel-6a" and row["predicted"]["fits"] is True
    assert edgeft("devices", "--device", "pixel-6a", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pixel-6a"]["ram_gb"]["kind"] == "spec"


def test_a_device_that_is_unknown_ends_the_command_with_2(tmp_path: Path, capsys: Captured) -> None:
    write_gguf(tmp_path, tied=True)
    for arguments in (("devices", "--device", "pixl-6a"), ("bench", str(tmp_path), "--like", "pixl-6a")):
        assert edgeft(*arguments) == 2
        assert "did you mean pixel-6a" in capsys.readouterr().err
