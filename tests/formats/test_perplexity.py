"""Perplexity through edgeft is what llama.cpp's own tool says, on the same file and tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.export.run import llama_perplexity, own_perplexity
from edgeft.formats.gguf import write_gguf
from edgeft.text.chat import ChatTokenizer
from tests.formats.llama_cpp_converter import llama_cpp_folder


@pytest.mark.slow
def test_perplexity_agrees_with_llama_perplexity(smollm2: Path, tmp_path: Path) -> None:
    tool = llama_cpp_folder() / "build/bin/llama-perplexity"
    if not tool.is_file():
        pytest.skip(f"{tool} is not built: `make peers`")
    write_gguf(smollm2, tmp_path / "model.gguf", "f16")
    ours = own_perplexity(tmp_path / "model.gguf", ChatTokenizer.from_folder(smollm2))
    assert ours == pytest.approx(llama_perplexity(tool, tmp_path / "model.gguf"), rel=0.01)
