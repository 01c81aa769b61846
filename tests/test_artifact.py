"""Artifacts: manifests that come back as written, digests that mean content, and damage that is found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft.artifact import MANIFEST, Artifact, Manifest, digest_of, open_artifact, scan_files, verify, write_manifest
from edgeft.errors import ArtifactError


def make(folder: Path, log: str = "1 s", content: str = "weights", **changes: object) -> Artifact:
    (folder / "log").mkdir(parents=True)
    (folder / "log" / "time.txt").write_text(log)
    (folder / "sub").mkdir()
    (folder / "sub" / "model.bin").write_text(content)
    fields = {
        "kind": "model", "stage": "merge", "key": "abc", "config": {"into": "original"}, "inputs": {"model": "0" * 64},
        "files": scan_files(folder), "metrics": {"loss": 0.5}, "made_by": {"seconds": 3.0},
    }  # fmt: skip
    write_manifest(folder, Manifest(**{**fields, **changes}))  # type: ignore[arg-type]
    return open_artifact(folder)


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    written = make(tmp_path / "a").manifest
    assert open_artifact(tmp_path / "a").manifest == written
    assert sorted(written.files) == ["log/time.txt", "sub/model.bin"]
    assert written.config == {"into": "original"} and written.metrics == {"loss": 0.5}


def test_the_digest_depends_on_content_only(tmp_path: Path) -> None:
    first = make(tmp_path / "a", log="1 s", made_by={"seconds": 1.0}, key="abc")
    second = make(tmp_path / "b", log="2 s", made_by={"seconds": 2.0}, key="def")
    assert first.digest == second.digest


def test_the_digest_changes_with_content_name_and_kind(tmp_path: Path) -> None:
    first = make(tmp_path / "a")
    assert make(tmp_path / "b", content="other").digest != first.digest
    assert make(tmp_path / "c", kind="adapter").digest != first.digest
    renamed = {"sub/other.bin": first.manifest.files["sub/model.bin"]}
    assert make(tmp_path / "d", files=renamed).digest != first.digest


def test_a_digest_does_not_depend_on_the_order_of_keys() -> None:
    assert digest_of({"a": 1, "b": [2, 3]}) == digest_of({"b": [2, 3], "a": 1})
    assert digest_of([1, 2]) != digest_of([2, 1])


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = make(tmp_path / "a").path / MANIFEST
    raw = json.loads(path.read_text())
    raw["files"]["sub/model.bin"]["sha256"] = "f" * 64
    path.write_text(json.dumps(raw))
    with pytest.raises(ArtifactError, match="was edited"):
        open_artifact(tmp_path / "a")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"kind": "model"}', '{"files": 3}'])
def test_a_damaged_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(ArtifactError, match="damaged"):
        open_artifact(tmp_path)


def test_a_manifest_of_another_schema_is_refused(tmp_path: Path) -> None:
    make(tmp_path / "a")
    path = tmp_path / "a" / MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema": 99}))
    with pytest.raises(ArtifactError, match="schema 99"):
        open_artifact(tmp_path / "a")


def test_a_folder_without_manifest_is_no_artifact(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no finished artifact"):
        open_artifact(tmp_path)


def test_an_intact_artifact_verifies(tmp_path: Path) -> None:
    assert verify(make(tmp_path / "a")) == []


def test_verify_names_changed_missing_and_extra_files(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a")
    (artifact.path / "log" / "time.txt").unlink()
    (artifact.path / "sub" / "model.bin").write_text("WEIGHTS")  # same size, other bytes
    (artifact.path / "extra.txt").write_text("")
    problems = verify(artifact)
    assert len(problems) == 3
    assert "log/time.txt: missing" in problems
    assert "extra.txt: not in the manifest" in problems
    assert any(p.startswith("sub/model.bin: sha256") for p in problems)


def test_verify_names_the_size_of_a_truncated_file(tmp_path: Path) -> None:
    artifact = make(tmp_path / "a")
    (artifact.path / "sub" / "model.bin").write_text("wei")
    assert verify(artifact) == ["sub/model.bin: 3 bytes, the manifest says 7"]


def test_asking_for_a_file_that_is_not_listed_names_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="sub/model.bin"):
        make(tmp_path / "a").file("model.gguf")
