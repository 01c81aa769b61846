"""What a name on the command line stands for: a recipe, an artifact of a run, a package or a model from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from edgeft.artifact import MANIFEST, Artifact, open_artifact
from edgeft.bench.runtimes import ALL, runtime_of, runtimes_of
from edgeft.errors import ArtifactError

if TYPE_CHECKING:
    from edgeft.pipeline import Pipeline

RECIPES = Path("recipes")
MODEL_NAMES = {"merge": "teacher", "distill": "student"}  # stages -> what the models that they make are called


def find_recipe(name: str) -> Path:
    """The file of a recipe given by path or by bare name (`support-bot` is recipes/support-bot.yaml)."""
    path = Path(name)
    return path if path.suffix in (".yaml", ".yml") or len(path.parts) > 1 else RECIPES / f"{name}.yaml"


def open_run(name: str, overrides: Sequence[str], runs: Path, stream: TextIO | None = None) -> Pipeline:
    """The pipeline of a recipe. Raises RecipeError with all of its problems."""
    from edgeft.pipeline import Pipeline
    from edgeft.recipe import load_recipe

    return Pipeline(load_recipe(find_recipe(name), tuple(overrides)), runs, stream)


def find_artifact(name: str, runs: Path) -> Artifact | None:
    """The artifact in folder `name`, or of that name below `runs`; None if `name` must be a recipe."""
    folders = [path for path in (Path(name), runs / name) if path.is_dir()]
    finished = [path for path in folders if (path / MANIFEST).is_file()]
    if folders and not finished and find_recipe(name).is_file():  # a folder that happens to be named like a recipe
        return None
    return open_artifact((finished or folders)[0]) if folders else None


def find_model(name: str, runs: Path) -> Path:
    """A model's file or folder, given by path or by its name below `runs`."""
    found = next((path for path in (Path(name), runs / name) if path.exists()), None)
    if found is None:
        raise ArtifactError(f"{name}: no such file or folder", "`edgeft ls` lists what there is")
    return found


def package_folders(name: str, runs: Path) -> list[Path]:
    """The folder of a package, or those of all finished packages of a recipe. Raises ArtifactError if there is none.

    A folder with a model and no manifest is one from elsewhere.
    """
    if runtimes_of(Path(name)) and not (Path(name) / MANIFEST).is_file():
        return [Path(name)]
    artifact = find_artifact(name, runs)
    if artifact:
        return [artifact.path]
    pipeline = open_run(name, (), runs)
    folders = [a.path for node in pipeline.nodes if (a := pipeline.find(node)) and a.kind == "package"]
    if not folders:
        raise ArtifactError(f"{name} has no finished package", f"make them first: edgeft run {name}")
    return folders


def to_measure(name: str, runs: Path, runtime: str | None) -> list[tuple[Path, str]]:
    """The folders of `package_folders`, each with the runtime to measure it in.

    That is the first that can run it, or `runtime`, or with "all" every one; the models that a recipe's packages were
    made from come in then too, for torch. Raises ArtifactError if there is no such folder or runtime.
    """
    folders = package_folders(name, runs)
    if runtime is None:
        return [(folder, runtime_of(folder)) for folder in folders]
    if len(folders) > 1:
        folders = [*_models_of(folders), *folders]
    found = [(folder, one) for folder in folders for one in runtimes_of(folder) if runtime in (ALL, one)]
    return found or [(folder, runtime_of(folder, runtime)) for folder in folders]  # which says what is wrong


def _models_of(packages: Sequence[Path]) -> list[Path]:
    """The model folders, beside them, that packages were exported from."""
    wanted = {open_artifact(path).manifest.inputs.get("model") for path in packages}
    beside = [open_artifact(path.parent) for path in sorted(packages[0].parent.glob(f"*-*/{MANIFEST}"))]
    return [a.path for a in beside if a.kind == "model" and a.digest in wanted]


def name_in_run(folder: Path) -> str:
    """'teacher' for a package or model that is one of a run; the folder's own name for any other."""
    if not (folder / MANIFEST).is_file():
        return folder.name
    artifact = open_artifact(folder)
    node = str(artifact.manifest.made_by.get("node") or folder.name)
    fmt, quant = (artifact.metrics.get(key) for key in ("format", "quant"))
    return MODEL_NAMES.get(node, node.removesuffix(f"-{fmt}-{quant}"))


def system_message(package: Path) -> str | None:
    """The system message a package was trained with, found through the artifacts beside it; None if unknown."""
    if not (package / MANIFEST).is_file():
        return None
    known = {
        a.digest: a for p in package.parent.glob(f"*/{MANIFEST}") if (a := open_artifact(p.parent)).kind != "report"
    }
    todo = list(open_artifact(package).manifest.inputs.values())
    while todo:
        artifact = known.get(todo.pop())
        if artifact is None:
            continue
        if artifact.kind == "dataset":
            system: str | None = artifact.config.get("system")
            return system
        todo += artifact.manifest.inputs.values()
    return None
