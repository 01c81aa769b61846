"""What `edgeft bench --runtime` measures of a run: which folders, in which runtimes, under which names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from edgeft import naming
from edgeft.artifact import Artifact
from edgeft.errors import ArtifactError
from tests.stages.bench_artifacts import write_artifact

FILES = {
    "merge-1": {"config.json": "{}", "model.safetensors": ""},
    "export-1": {"model.gguf": ""},
    "export-2": {"model.onnx": "", "genai_config.json": "{}", "config.json": "{}"},
}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The packages of a recipe, with the model that they were exported from beside them."""
    made: list[Artifact] = []
    for name, files in FILES.items():
        node = "merge" if name == "merge-1" else f"teacher-{name}"
        made.append(write_artifact(tmp_path / name, "package" if made else "model", files, made_by={"node": node}))
        if len(made) > 1:
            manifest = json.loads((made[-1].path / "manifest.json").read_text())
            manifest["inputs"] = {"model": made[0].digest}
            (made[-1].path / "manifest.json").write_text(json.dumps(manifest))
    packages = [artifact.path for artifact in made[1:]]
    monkeypatch.setattr(naming, "package_folders", lambda name, runs: list(packages))
    return packages


@pytest.mark.parametrize(
    ("runtime", "expected"),
    [
        (None, [("export-1", "llama.cpp"), ("export-2", "onnxruntime")]),
        ("genai", [("export-2", "genai")]),
        ("torch", [("merge-1", "torch")]),
        ("all", [("merge-1", "torch"), ("export-1", "llama.cpp"), ("export-2", "onnxruntime"), ("export-2", "genai")]),
    ],
)
def test_each_folder_meets_the_runtimes_that_can_run_it(
    folders: list[Path], tmp_path: Path, runtime: str | None, expected: list[tuple[str, str]]
) -> None:
    found = naming.to_measure("desk", tmp_path, runtime)
    assert [(folder.name, name) for folder, name in found] == expected


def test_a_runtime_that_is_unknown_is_named_with_those_there_are(folders: list[Path], tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no runtime is called 'jax'") as caught:
        naming.to_measure("desk", tmp_path, "jax")
    assert "llama.cpp, onnxruntime, genai, torch" in caught.value.hint


def test_rows_are_named_as_in_the_run(folders: list[Path], tmp_path: Path) -> None:
    assert naming.name_in_run(tmp_path / "merge-1") == "teacher"
    assert naming.name_in_run(folders[0]) == "teacher-export-1"
    (tmp_path / "elsewhere").mkdir()
    assert naming.name_in_run(tmp_path / "elsewhere") == "elsewhere"
