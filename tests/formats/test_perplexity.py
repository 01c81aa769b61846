"""Perplexity and divergence through edgeft are what llama.cpp's own tool says, on the same files and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export.oracle import llama_divergences, llama_perplexity, own_divergence, own_perplexity
from edgeft.formats.gguf import write_gguf
from edgeft.formats.gguf_quant import quantize
from edgeft.text.chat import ChatTokenizer
from tests.formats.llama_cpp_converter import llama_cpp_folder


@pytest.fixture(scope="module")
def tool() -> Path:
    path = llama_cpp_folder() / "build/bin/llama-perplexity"
    if not path.is_file():
        pytest.skip(f"{path} is not built: `make peers`")
    return path


@pytest.fixture(scope="module")
def full(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("full") / "model.gguf"
    write_gguf(smollm2, path, "f16")
    return path


@pytest.mark.slow
def test_perplexity_agrees_with_llama_perplexity(tool: Path, full: Path, smollm2: Path) -> None:
    ours = own_perplexity(full, ChatTokenizer.from_folder(smollm2))
    assert ours == pytest.approx(llama_perplexity(tool, full), rel=0.01)


@pytest.mark.slow
def test_divergence_is_within_what_llama_perplexity_says_by_its_own_settings(
    tool: Path, full: Path, smollm2: Path, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.gguf"
    quantize(full, cut, "q4_k_m", 2)
    theirs = llama_divergences(tool, full, cut, tmp_path).values()
    ours = own_divergence(full, cut, ChatTokenizer.from_folder(smollm2))
    assert max(theirs) < 1.05 * min(theirs)  # else the next line would say little
    assert 0.99 * min(theirs) <= ours <= 1.01 * max(theirs)
