"""The last finished run in a folder: the newest report's merge, probes and packages."""

from __future__ import annotations

from pathlib import Path

from edgeft.artifact import MANIFEST, Artifact, open_artifact
from edgeft.errors import EdgeftError
from edgeft.formats.probe import Probe


class Missing(Exception):
    """Why a figure cannot be had."""


class LastRun:
    """Raises EdgeftError if `runs` holds no finished report of the recipe."""

    def __init__(self, runs: Path, recipe: str = "support-bot") -> None:
        found = [open_artifact(path.parent) for path in runs.glob(f"*/{MANIFEST}")]
        self.all = sorted(found, key=lambda a: str(a.manifest.made_by.get("finished", "")))
        reports = [a for a in self.all if a.manifest.stage == "report" and a.config.get("name") == recipe]
        if not reports:
            raise EdgeftError(
                f"{runs} holds no finished run of {recipe}", f"run `make recipe-{recipe}` first, or name RUNS="
            )
        self.inputs = reports[-1].manifest.inputs
        self._by_digest = {a.digest: a for a in self.all}
        self.teacher = self._by_digest[self.inputs["merge"]]
        self.base = self._by_digest[self.teacher.manifest.inputs["model"]]
        self.dataset = self._by_digest[self.inputs["dataset"]]

    @property
    def probe(self) -> Probe:
        return Probe.load(self.made("probe", self.teacher).path)

    def of_report(self, name: str) -> Artifact | None:
        """What the report shows under this name."""
        return self._by_digest.get(self.inputs.get(name, ""))

    def made(self, stage: str, model: Artifact) -> Artifact:
        """The newest artifact that a stage made of a model. Raises Missing."""
        found = [a for a in self.all if a.manifest.stage == stage and a.manifest.inputs.get("model") == model.digest]
        if not found:
            raise Missing(f"the run has no {stage} of {model.manifest.made_by.get('node', model.path.name)}")
        return found[-1]

    def packages(self) -> dict[str, Artifact]:
        """The measured packages of teacher and student, by the name of their node."""
        found = {}
        for name, digest in self.inputs.items():
            bench = self._by_digest.get(digest)
            if not name.startswith("bench-") or bench is None or "package" not in bench.manifest.inputs:
                continue
            package = self._by_digest.get(bench.manifest.inputs["package"])
            if package is not None and package.manifest.inputs["model"] != self.base.digest:
                found[name.removeprefix("bench-")] = package
        return found

    def package(self, name: str) -> Artifact:
        """Raises Missing if the run has not made it."""
        if name not in (found := self.packages()):
            raise Missing(f"the run has no package {name}")
        return found[name]
