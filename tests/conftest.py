"""What all tests share: few threads, no network, the real small model and the optional real data sets."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Set before torch or a runtime is imported: busy-waiting threads of several libraries slow one another down.
side_by_side = "PYTEST_XDIST_WORKER" in os.environ
for name, value in {
    "OMP_NUM_THREADS": "1" if side_by_side else str(min(2, os.cpu_count() or 1)),
    "OMP_WAIT_POLICY": "passive",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}.items():
    os.environ.setdefault(name, value)
os.environ.pop("EDGEFT_RUNS", None)  # tests name their own folder
# A script's background ignores interrupts, and so would every child that a test interrupts.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import hypothesis  # noqa: E402
import pytest  # noqa: E402

hypothesis.settings.register_profile("edgeft", database=None, deadline=None)  # leaves no folder behind
hypothesis.settings.load_profile("edgeft")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face folder, made once; read only. Skips without its package."""
    from tests.real_model import smollm2_checkpoint

    return smollm2_checkpoint(tmp_path_factory)


@pytest.fixture
def fake_stages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The stages of `fakes.py` in place of the real ones; returns the list of those that ran."""
    from tests import fakes

    fakes.install(monkeypatch.setattr)
    fakes.CALLS.clear()
    return fakes.CALLS


@pytest.fixture(scope="session")
def real_data() -> Path:
    """An optional folder of real data sets: EDGEFT_TEST_DATA, or shared/data beside the repository."""
    folder = Path(os.environ.get("EDGEFT_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("no real data sets here; name their folder in EDGEFT_TEST_DATA")
    return folder
