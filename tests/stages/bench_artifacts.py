"""Small finished artifacts for the tests of the measuring stages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from edgeft.artifact import Artifact, Manifest, open_artifact, scan_files, write_manifest

LABELS = ("track", "cancel", "return")


def write_artifact(folder: Path, kind: str, files: dict[str, str], **more: Any) -> Artifact:
    """An artifact with these text files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    folder.mkdir(parents=True, exist_ok=True)
    write_manifest(folder, Manifest(kind, kind, "0" * 16, {}, {}, scan_files(folder), **more))
    return open_artifact(folder)


def row(label: str, thing: str, **fields: str) -> dict[str, Any]:
    answer = json.dumps({"intent": label, "entities": fields}) + "\nOn it."
    messages = [{"role": "user", "content": f"please {label} my {thing}"}, {"role": "assistant", "content": answer}]
    return {"messages": messages, "meta": {"id": f"{label}-{thing}"}}


def dataset(folder: Path) -> Artifact:
    """Nine train rows and six test rows over three labels."""
    splits = {"train": ("lamp", "cup", "box"), "validation": ("mug",), "test": ("kettle", "scale")}
    files = {
        f"{split}.jsonl": "".join(json.dumps(row(label, thing)) + "\n" for label in LABELS for thing in things)
        for split, things in splits.items()
    }
    return write_artifact(folder, "dataset", {**files, "data_report.json": '{"splits": {"train": {"kept": 9}}}'})
