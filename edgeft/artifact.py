"""An artifact: a folder of files whose `manifest.json`, written last, says what they are and where they came from."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

from edgeft.errors import ArtifactError

SCHEMA = 1
MANIFEST = "manifest.json"
LOG_DIR = "log"  # records of how a run went (timings, curves): checked, but no part of the content digest
CHECKPOINT_DIR = "checkpoints"  # exists only inside a `.partial` folder


@dataclass(frozen=True)
class FileEntry:
    """One file of an artifact: its sha256 (hex) and its size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Manifest:
    """What stands in `manifest.json`. `metrics` and `made_by` are records and never hashed."""

    kind: str
    stage: str
    key: str
    config: dict[str, Any]
    inputs: dict[str, str]  # input name -> content digest
    files: dict[str, FileEntry]  # path below the folder, '/'-separated
    metrics: dict[str, Any] = field(default_factory=dict)
    made_by: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """sha256 over kind and content files: equal content means equal digest, whoever made it, and when."""
        content = {n: f.sha256 for n, f in self.files.items() if not n.startswith(LOG_DIR + "/")}
        return digest_of({"kind": self.kind, "files": content})


@dataclass(frozen=True)
class Artifact:
    """A finished artifact on disk."""

    path: Path
    manifest: Manifest

    @property
    def kind(self) -> str:
        return self.manifest.kind

    @property
    def digest(self) -> str:
        return self.manifest.digest

    @property
    def metrics(self) -> dict[str, Any]:
        return self.manifest.metrics

    @property
    def config(self) -> dict[str, Any]:
        return self.manifest.config

    def file(self, name: str) -> Path:
        """Path of one of its files. Raises ArtifactError if the manifest does not list it."""
        if name not in self.manifest.files:
            raise ArtifactError(
                f"{self.path} has no file {name!r}; it holds {sorted(self.manifest.files)}",
                "this artifact is of another kind or from another version; run its stage again",
            )
        return self.path / name

    def read_json(self, name: str) -> Any:
        return json.loads(self.file(name).read_text("utf-8"))


def digest_of(value: Any) -> str:
    """sha256 (hex) of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """sha256 (hex) of a file, streamed."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def scan_files(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` except the manifest, by '/'-separated relative path."""
    found: dict[str, FileEntry] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != MANIFEST:
            found[name] = FileEntry(file_sha256(path), path.stat().st_size)
    return found


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` and flush it to disk: from here on the folder is complete."""
    with (folder / MANIFEST).open("w", encoding="utf-8") as f:
        json.dump({**asdict(manifest), "digest": manifest.digest}, f, indent=1, sort_keys=True)
        f.write("\n")
        f.flush()
        os.fsync(f.fileno())


def open_artifact(path: Path) -> Artifact:
    """Read an artifact's manifest. Raises ArtifactError if there is none or it is of another schema."""
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        raise ArtifactError(
            f"{path} is no finished artifact: it has no {MANIFEST}",
            "name a folder below runs/ that `edgeft ls` lists",
        )
    try:
        raw = cast(dict[str, Any], json.loads(manifest_path.read_text("utf-8")))
        digest = raw.pop("digest", None)
        raw["files"] = {n: FileEntry(**f) for n, f in raw["files"].items()}
        manifest = Manifest(**raw)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{manifest_path} is damaged: {error}", "delete the folder and run its stage again"
        ) from error
    if manifest.schema != SCHEMA:
        raise ArtifactError(
            f"{manifest_path} has schema {manifest.schema}; this edgeft reads schema {SCHEMA}",
            "delete the folder and run its stage again",
        )
    if digest != manifest.digest:
        raise ArtifactError(
            f"{manifest_path} was edited: it says digest {digest}, its files give {manifest.digest}",
            "delete the folder and run its stage again",
        )
    return Artifact(path, manifest)


def verify(artifact: Artifact) -> list[str]:
    """Compare every file with the manifest; returns the problems found, empty if all is well."""
    problems: list[str] = []
    found = scan_files(artifact.path)
    for name, entry in artifact.manifest.files.items():
        if name not in found:
            problems.append(f"{name}: missing")
        elif found[name].size != entry.size:
            problems.append(f"{name}: {found[name].size} bytes, the manifest says {entry.size}")
        elif found[name].sha256 != entry.sha256:
            problems.append(f"{name}: sha256 {found[name].sha256[:12]}, the manifest says {entry.sha256[:12]}")
    problems += [f"{name}: not in the manifest" for name in found if name not in artifact.manifest.files]
    return problems
