"""Packages of the tiny model, rows for it, and a real sshd."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.targets.sshd import Sshd
from edgeft.artifact import Manifest, scan_files, write_manifest
from edgeft.errors import EdgeftError
from edgeft.formats.gguf import write_gguf
from tests.formats.tiny_model import TEXTS, tiny_onnx, write_tiny_llama

ROOT = Path(__file__).resolve().parents[3]
ANSWER = '{"intent": "greet", "entities": {}}\nHello.'


@pytest.fixture(scope="session")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package folder; read only."""
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(write_tiny_llama(tmp_path_factory.mktemp("model")), folder / "model.gguf", "f32")
    metrics = {"format": "gguf", "quant": "f32"}
    write_manifest(folder, Manifest("package", "export", "0" * 16, {}, {}, scan_files(folder), metrics))
    return folder


@pytest.fixture(scope="session")
def tiny_onnx_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package folder; read only."""
    return tiny_onnx(tmp_path_factory)[1]


@pytest.fixture(scope="session")
def rows() -> list[dict[str, Any]]:
    return [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}], "meta": {}}
        for text in (*TEXTS, "And my lamp?")
    ]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    try:
        server = Sshd(tmp_path_factory.mktemp("sshd"))
    except EdgeftError as error:
        pytest.skip(str(error))
    yield server
    server.close()


@pytest.fixture
def sshd(server: Sshd, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sshd]:
    """The server, with this Python as the one that has edgeft there; at the end nothing may be left."""
    python = server.keys / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" OMP_WAIT_POLICY=passive exec "{sys.executable}" "$@"\n')
    python.chmod(0o700)
    monkeypatch.setenv("EDGEFT_SSH_CONFIG", str(server.config))
    monkeypatch.setenv("EDGEFT_SSH_PYTHON", str(python))
    yield server
    assert server.left_behind() == []
