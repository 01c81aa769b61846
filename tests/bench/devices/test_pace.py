"""How fast shapes decode on a target: over a real sshd, and what an emulated one is refused with."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.targets.sshd import Sshd
from edgeft.artifact import Artifact, Manifest
from edgeft.bench.devices import pace
from edgeft.bench.devices.device import DeviceError
from edgeft.bench.devices.local import LocalDevice
from edgeft.bench.devices.native import LEVELS
from edgeft.plan import ShapeNode
from edgeft.progress import Reporter
from edgeft.stages import shape
from tests.bench.devices.built import built_runner
from tests.formats.tiny_model import write_tiny_llama

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}


@pytest.mark.parametrize("kind", ["local", "ssh"])
def test_a_shape_is_found_by_timing_packages_on_a_target(kind: str, sshd: Sshd, tmp_path: Path) -> None:
    if kind == "ssh":  # where a GGUF needs the runner
        built_runner("x86_64", LEVELS["x86_64"][0])
    target = sshd.target() if kind == "ssh" else kind
    teacher = write_tiny_llama(tmp_path / "teacher", network=WIDE)
    inputs = {
        name: Artifact(teacher, Manifest(kind="model", stage="merge", key="", config={}, inputs={}, files={}))
        for name in ("model", "dataset")
    }
    cfg = ShapeNode(
        decode_speedup=1.5, vocabulary=None, hidden=None, kv_heads=None, max_tokens=64, quant="q8_0", threads=1,
        timed_on=target,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    found = shape.run(cfg, inputs, tmp_path / "out", Reporter("shape"))
    assert found["target"] == target and found["threads"] == 1
    assert found["chosen"]["speedup"] >= 1.5 and found["chosen"]["layers"] < 8


def test_what_is_emulated_tells_no_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(LocalDevice, "emulated", True)
    with pytest.raises(DeviceError, match="emulated"), pace.pace("local", 1, tmp_path / "x", Reporter("shape")):
        pass


@pytest.mark.parametrize(("last", "said"), [(95.0, None), (80.0, "ssh:pi decoded at 100.0 tokens/s at first")])
def test_a_target_that_slows_down_is_doubted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, last: float, said: str | None
) -> None:
    rates = iter([100.0, 250.0, last])
    monkeypatch.setattr(pace.Pace, "rate_of", lambda self, package: next(rates))
    there = pace.Pace(SimpleNamespace(name="ssh:pi"), 1, tmp_path / "teacher", tmp_path)  # type: ignore[arg-type]
    assert there.speedup_of(tmp_path / "student") == 2.5
    doubt = there.drift()
    assert doubt is None if said is None else said in str(doubt)
