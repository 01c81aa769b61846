from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from edgeft.bench.profiles import USABLE_SHARE, find_profile, load_profiles
from edgeft.errors import EdgeftError

PHONE = {
    "title": "A phone",
    "family": "phone",
    "soc": "Chip",
    "cpu": {
        "clusters": [
            {"count": 1, "core": "big", "ghz": 3.0},
            {"count": 3, "core": "mid", "ghz": 2.0},
            {"count": 4, "core": "little", "ghz": 1.9, "fast": False},
        ],
        "isa": "dotprod",
        "kind": "spec",
        "source": "https://example.com/chip",
    },
    "ram_gb": {"value": 6, "kind": "spec", "source": "maker"},
    "bandwidth_gbps": {"value": 34.1, "kind": "derived", "source": "maker"},
}


def write(path: Path, device: dict[str, object]) -> Path:
    path.write_text(yaml.safe_dump({"sources": {"maker": "https://example.com"}, "devices": {"mine": device}}))
    return path


def test_there_are_a_dozen_profiles_of_phones_boards_and_laptops_each_figure_with_an_address() -> None:
    profiles = load_profiles()
    assert len(profiles) >= 12
    assert {p.family for p in profiles.values()} == {"phone", "board", "laptop"}
    for profile in profiles.values():
        figures = [profile.cpu, profile.ram_gb, profile.bandwidth_gbps, profile.achievable_gbps]
        assert all(figure.source.startswith(("https://", "http://")) for figure in figures if figure)


def test_your_own_file_adds_profiles_and_its_source_names_become_addresses(tmp_path: Path) -> None:
    profiles = load_profiles(write(tmp_path / "own.yaml", PHONE))
    assert "pixel-6a" in profiles
    assert profiles["mine"].ram_gb.source == "https://example.com"
    assert profiles["mine"].usable_bytes == int(6e9 * USABLE_SHARE["phone"])


def test_the_pace_is_that_of_the_slowest_core_and_slow_cores_get_no_thread(tmp_path: Path) -> None:
    mine = load_profiles(write(tmp_path / "own.yaml", PHONE))["mine"]
    assert (mine.pace(1), mine.pace(4), mine.pace(5)) == (3e9, 8e9, 5 * 1.9e9)
    assert mine.threads == 4


def test_every_mistake_of_a_profile_file_is_named(tmp_path: Path) -> None:
    wrong = {**PHONE, "ram_gb": {"value": -1, "kind": "guess", "source": "maker"}, "colour": "blue"}
    with pytest.raises(EdgeftError) as caught:
        load_profiles(write(tmp_path / "own.yaml", wrong))
    for name in ("mine.ram_gb.value", "mine.ram_gb.kind", "mine.colour"):
        assert name in caught.value.message


def test_a_figure_without_a_source_is_refused(tmp_path: Path) -> None:
    uncited = {**PHONE, "bandwidth_gbps": {"value": 34.1, "kind": "spec", "source": "somewhere"}}
    with pytest.raises(EdgeftError, match="'somewhere' is neither an address nor one of `sources`"):
        load_profiles(write(tmp_path / "own.yaml", uncited))


def test_an_unknown_device_names_the_nearest_ones() -> None:
    with pytest.raises(EdgeftError, match="did you mean pixel-6a"):
        find_profile("pixel6a", load_profiles())


def test_every_figure_from_a_source_that_was_not_read_says_so() -> None:
    unread = ("Google_Tensor", "Redmi_12", "frame.work", "amd.com")
    for name, profile in load_profiles().items():
        for figure in (profile.cpu, profile.ram_gb, profile.bandwidth_gbps):
            assert (figure.kind == "unverified") == any(part in figure.source for part in unread), name
