"""llama.cpp's own converter, from its source, as an independent oracle; run by a Python of its own.

Replaced are its names of pre-tokenizers, which it finds by a hash of what a published tokenizer makes of a text, and
its reading of Gemma's tokenizer, which it wants as a SentencePiece file: a tiny model has neither.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

DRIVER = """
import json, sys, types
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, source)
import convert_hf_to_gguf
from conversion.base import TextModel
from conversion.gemma import Gemma2Model, Gemma3Model
sys.modules["sentencepiece"] = types.SimpleNamespace(SentencePieceProcessor=None)  # imported before it looks for a file
for model, out, dtype, pre in jobs:
    TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
    if pre == "default":
        Gemma2Model.set_vocab = Gemma3Model.set_vocab = lambda self: None
    sys.argv = ["convert_hf_to_gguf.py", model, "--outfile", out, "--outtype", dtype]
    convert_hf_to_gguf.main()
"""


def llama_cpp_folder() -> Path:
    """llama.cpp's source with its tools built in `build`; skips the test where `make peers` has not been run."""
    folder = Path(os.environ.get("EDGEFT_LLAMA_CPP", Path(sys.prefix) / "peers-llama" / "llama.cpp"))
    if not (folder / "convert_hf_to_gguf.py").is_file():
        pytest.skip("needs llama.cpp's source: `make peers`, or its folder in EDGEFT_LLAMA_CPP")
    return folder


def convert(jobs: Iterable[tuple[Path, Path, str, str]]) -> None:
    """Let llama.cpp's converter write, for every (model, out, dtype, pre-tokenizer), the folder `model` as `out`."""
    listed = json.dumps([[str(part) for part in job] for job in jobs])
    ran = subprocess.run(
        [sys.executable, "-c", DRIVER, str(llama_cpp_folder()), listed], capture_output=True, text=True, timeout=3600
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
