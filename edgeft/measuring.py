"""What `compare` and `history` do, without printing: names become measured packages, and these become verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeft.artifact import MANIFEST, Artifact, open_artifact
from edgeft.errors import ArtifactError, DataError, EdgeftError
from edgeft.naming import find_artifact

if TYPE_CHECKING:
    from edgeft.bench.compare import Compared
    from edgeft.bench.gates import Verdict
    from edgeft.progress import Reporter
    from edgeft.settings import BenchSettings

MIN_ROUNDS = 3
HISTORY_PAGE = "history.html"


@dataclass(frozen=True)
class Subject:
    """A package and what was measured on it, as far as either is there."""

    name: str
    package: Path | None
    row: dict[str, Any] | None  # of the table
    rows: list[dict[str, Any]] | None  # per test row
    cpu: str | None = None  # that it was measured on

    def circumstances(self) -> dict[str, Any]:
        """What a reading of speed or memory depends on beside the package."""
        told = (self.row or {}).get("conditions") or {}
        return {"CPU": self.cpu} | {name: told.get(name) for name in ("threads", "prompt_tokens", "decode_tokens")}


def find_subject(name: str, runs: Path) -> Subject:
    """A measurement (runs/bench-...) with its package, or a package (runs/export-...) with its newest measurement.

    Raises ArtifactError if `name` is neither.
    """
    artifact = find_artifact(name, runs)
    if artifact is None or not (artifact.kind == "package" or "result.json" in artifact.manifest.files):
        found = f"a {artifact.kind}" if artifact else "no artifact"
        raise ArtifactError(
            f"{name} is {found}; expected a measurement (runs/bench-...) or a package (runs/export-...)",
            "`edgeft ls` lists both",
        )
    beside = [open_artifact(path.parent) for path in sorted(artifact.path.parent.glob(f"*-*/{MANIFEST}"))]
    if artifact.kind == "package":
        measured = [a for a in beside if a.manifest.inputs.get("package") == artifact.digest and _plain(a)]
        newest = max(measured, key=lambda a: str(a.manifest.made_by.get("finished")), default=None)
        return _subject(name, artifact.path, newest)
    digest = artifact.manifest.inputs.get("package")
    package = next((a.path for a in beside if a.kind == "package" and a.digest == digest), None)
    return _subject(name, package, artifact)


def _plain(artifact: Artifact) -> bool:
    """Whether it is a measurement without examples in the prompt."""
    return artifact.manifest.stage == "bench" and not artifact.config.get("few_shot")


def _subject(name: str, package: Path | None, measured: Artifact | None) -> Subject:
    from edgeft.text.encode import read_rows

    if measured is None:
        return Subject(name, package, None, None)
    host = measured.read_json("log/host.json") if "log/host.json" in measured.manifest.files else {}
    rows = read_rows(measured.file("rows.jsonl"))
    return Subject(name, package, measured.read_json("result.json"), rows, host.get("cpu"))


def compare(
    first: Subject, second: Subject, settings: BenchSettings, rounds: int, report: Reporter, strict: bool
) -> list[Compared]:
    """Everything that can be compared: rows in pairs, speeds in `rounds` turns, single readings.

    Raises DataError if the test rows differ or nothing can be compared, EdgeftError for too few rounds.
    """
    from edgeft.bench import compare as by

    if 0 < rounds < MIN_ROUNDS:
        raise EdgeftError(f"{rounds} rounds give no interval", f"give --rounds {MIN_ROUNDS} or more, or 0 for no speed")
    found: list[Compared] = []
    if first.row is not None and second.row is not None:
        digests = [(subject.row["conditions"] or {}).get("test_rows") for subject in (first, second) if subject.row]
        if all(digests) and digests[0] != digests[1]:
            raise DataError("A and B were measured on different test rows", "measure both on the same test set")
        found += by.compare_rows(first.rows or [], second.rows or [])
    timed = rounds > 0 and first.package is not None and second.package is not None
    if timed:
        found += by.compare_speeds(_in_turns(first, second, settings, rounds, report, strict))
    if first.row is not None and second.row is not None:
        said = [one.figure for one in found]
        if apart := _apart(first, second):
            report.note(f"single readings of speed and memory are left out: {apart}")
            said += by.TIMED
        found += by.compare_plain(first.row, second.row, said)
    if not found:
        raise DataError(
            f"nothing to compare: {first.name} and {second.name} are not both measured, and speed was not asked for",
            "measure both first, or give --rounds 5 for packages",
        )
    return found


def _apart(first: Subject, second: Subject) -> str:
    """In what the circumstances of the two measurements differ, in words; empty if in nothing that is known."""
    old, new = first.circumstances(), second.circumstances()
    return ", ".join(f"{name} {old[name]} and {new[name]}" for name in old if old[name] != new[name])


def _in_turns(
    first: Subject, second: Subject, settings: BenchSettings, rounds: int, report: Reporter, strict: bool
) -> dict[str, list[dict[str, Any]]]:
    from edgeft.bench.compare import alternate
    from edgeft.bench.run import time_package

    packages = {"A": first.package, "B": second.package}
    with report.track("speed in turns", 2 * rounds) as task:

        def measure(side: str) -> dict[str, Any]:
            package = packages[side]
            assert package is not None
            figures = time_package(package, settings, strict)
            task.advance()
            return figures

        return alternate(measure, rounds)


def check_gates(path: Path, found: Sequence[Compared]) -> list[Verdict]:
    """Every limit of a gate file against what was compared. Raises RecipeError if the file is no gate file."""
    from edgeft.bench.gates import judge, load_gates

    figures = {one.figure: (one.first, one.second) for one in found}
    return judge(load_gates(path, set(figures)), figures)


def history(runs: Path, name: str | None) -> tuple[list[list[str]], Path]:
    """Recorded measurements as rows of a table, oldest first, and the page that was written."""
    from edgeft.bench import history as book
    from edgeft.bench.table import cell, marks_of

    book.record(runs)
    found = book.entries(runs, name)
    page = runs / HISTORY_PAGE
    page.write_text(book.page(found), "utf-8")
    table = []
    for entry in found:
        figures = (cell(entry.row, "bytes", 1e-6), cell(entry.row, "decode_tps"), cell(entry.row, "ttft_s", 1000, 0),
                   cell(entry.row, "joint_exact_match", 100), cell(entry.row, "perplexity", 1, 3))  # fmt: skip
        star = "*" if marks_of(entry.row) else ""
        table.append([entry.finished, entry.name + star, str(entry.package)[:12], entry.cpu or "", *figures])
    return table, page
