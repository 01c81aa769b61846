"""What `make bench-targets` prints and writes, without a device."""

from __future__ import annotations

import pytest

from benchmarks.targets.fit import PROFILE_OF
from benchmarks.targets.published import footprint_of
from benchmarks.targets.tables import BOARDS, PHONES, check_rows, check_table
from edgeft.bench.predictor import load_predictor

MODEL = load_predictor()
MIB = 2**20


def test_rates_that_check_the_predictor_are_of_devices_outside_the_fit_and_name_their_source() -> None:
    for checks in (BOARDS, PHONES):
        rows = check_rows(checks, MODEL)
        assert not {row["device"] for row in rows} & {*MODEL.devices, *PROFILE_OF.values()}
        assert all(row["source"].startswith("https://") and row["predicted"] > 0 for row in rows)


@pytest.mark.parametrize(("model", "mib"), [("llama-3.2-1b", 2358), ("llama-3.2-3b", 6129)])
def test_the_footprint_of_a_published_file_has_the_size_that_was_published(model: str, mib: int) -> None:
    assert footprint_of(model, "f16").decode_bytes / MIB == pytest.approx(mib, rel=0.002)


def test_a_head_of_another_type_changes_the_head_alone() -> None:
    plain, other = footprint_of("llama-3.2-1b", "q4_0"), footprint_of("llama-3.2-1b", "q4_0", "q8_0")
    assert other.layers == plain.layers and list(other.head) == ["q8_0"]
    assert other.decode_bytes > plain.decode_bytes


def test_a_table_of_checks_counts_what_lies_in_the_band_and_tells_of_prompts_where_they_were_published() -> None:
    rows = check_rows(PHONES, MODEL)
    lines = check_table(rows)
    inside = sum(row["inside"] for row in rows)
    assert any(f"{inside} of {len(rows)} in the band" in line for line in lines)
    assert sum("prompt tok/s" in line for line in lines) == 1
    assert not any("prompt tok/s" in line for line in check_table(check_rows(BOARDS, MODEL)))
