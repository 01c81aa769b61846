"""Write what is generated: recipes/schema.json and the marked blocks of README.md; with --check only compare."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULT_COLUMNS = (
    "size MB", "decode tok/s", "TTFT ms", "peak RSS MB", "joint exact %", "intent %", "perplexity", "KL",
)  # fmt: skip
RUNTIMES = ROOT / "runs" / "runtimes.json"  # what make bench measured last
RUNTIME_COLUMNS = ("TTFT ms", "prefill tok/s", "decode tok/s", "p99 ms", "bandwidth %", "peak RSS MB")


def main() -> int:
    check = "--check" in sys.argv[1:]
    readme = (ROOT / "README.md").read_text("utf-8")
    blocks = {"help": _help(), "settings": _settings()}
    if not check and (table := _results()):
        blocks["table"] = table
    if not check and RUNTIMES.is_file():
        blocks["runtimes"] = _table(json.loads(RUNTIMES.read_text("utf-8")), RUNTIME_COLUMNS)
    for name, text in blocks.items():
        readme = _fill(readme, name, text)
    wanted = {"recipes/schema.json": _schema(), "README.md": readme}
    stale = [name for name, text in wanted.items() if _read(ROOT / name) != text]
    if check and stale:
        print(f"out of date: {', '.join(stale)}; run make docs", file=sys.stderr)
        return 1
    for name in stale:
        (ROOT / name).write_text(wanted[name], "utf-8")
        print(f"wrote {name}")
    return 0


def _fill(text: str, name: str, block: str) -> str:
    """Put `block` between <!-- name --> and <!-- /name -->; both must be there once."""
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda found: f"{found[1]}{block}\n{found[2]}", text)
    if count != 1:
        raise SystemExit(f"README.md has {count} blocks named {name}; expected one")
    return filled


def _edgeft(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeft", *args], cwd=ROOT, capture_output=True, text=True, check=False
    )


def _help() -> str:
    return f"```\n{_edgeft('--help').stdout.rstrip()}\n```"


def _schema() -> str:
    from edgeft.recipe import json_schema

    return json.dumps(json_schema(), indent=1) + "\n"


def _settings() -> str:
    """One table of all settings: name, default and meaning, from the models' own docstrings."""
    from edgeft.recipe import Recipe

    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for section, value in Recipe.model_fields.items():
        model = next((a for a in (value.annotation, *_args(value.annotation)) if hasattr(a, "model_fields")), None)
        for name, field in model.model_fields.items() if model else [("", value)]:
            full = f"{section}.{name}" if name else section
            default = "required" if field.is_required() else _default(value, name, field)
            meaning = " ".join((field.description or "").split()).replace("|", "\\|")
            lines.append(f"| `{full}` | {default} | {meaning} |")
    return "\n".join(lines)


def _default(section: Any, name: str, field: Any) -> str:
    """What a recipe that says nothing gets: a section's own default may differ from its model's."""
    whole = None if section.is_required() else section.default
    value = getattr(whole, name) if whole is not None and name else field.default
    if isinstance(value, dict):
        return ", ".join(f"{k} {v:g}" for k, v in value.items())
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _args(annotation: Any) -> tuple[Any, ...]:
    return getattr(annotation, "__args__", ())


def _results() -> str | None:
    """The finished support-bot run as a table; None (said on stderr) if there is none."""
    shown = _edgeft("show", "support-bot", "--json")
    if shown.returncode:
        print(f"the result table stays as it is: {shown.stderr.strip()}", file=sys.stderr)
        return None
    return _table(json.loads(shown.stdout), RESULT_COLUMNS)


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    from edgeft.bench.table import COLUMNS, text_table

    fields = [field for header, field, *_ in COLUMNS if header in columns]
    headers, body = text_table(rows, fields)
    rule = ["---", "---", *("--:" for _ in headers[2:])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [headers, rule, *body])


def _read(path: Path) -> str:
    return path.read_text("utf-8") if path.is_file() else ""


if __name__ == "__main__":
    sys.exit(main())
