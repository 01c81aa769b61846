"""Imports go one way, and what must stay light stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "edgeft"
# A layer imports only from layers further down, or from itself.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"cli_bench", "cli_device"},
    {"terminal", "measuring"},
    {"commands", "preflight", "naming"},
    {"pipeline"},
    {"stages"},
    {"text", "tune", "shrink", "formats", "bench"},
    {"plan"},
    {
        *("artifact", "recipe", "learning_settings", "export_settings", "settings", "progress", "events", "processes"),
        *("errors", ""),
    },
]
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate")
TORCH_OR_EXTRA = ("torch_ref", "lm_eval_bridge")  # the session that runs torch, and what needs an extra
MODULES = sorted(PACKAGE.rglob("*.py"))


def layer_of(part: str) -> int:
    return next(n for n, parts in enumerate(LAYERS) if part in parts)


def part_of(path: Path) -> str:
    """'bench' for edgeft/bench/run.py, 'cli' for edgeft/cli.py, '' for edgeft/__init__.py."""
    name = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if name == "__init__" else name


def imports(path: Path) -> set[str]:
    """Full names of all modules imported anywhere in a file, inside functions too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_down_the_layers(path: Path) -> None:
    own = layer_of(part_of(path))
    for name in imports(path):
        if name.split(".")[0] != "edgeft":
            continue
        part = name.split(".")[1] if len(name.split(".")) > 1 else ""
        target = layer_of(part) if any(part in parts for parts in LAYERS) else layer_of("")
        assert target >= own, f"{path.relative_to(ROOT)} imports {name}, which stands above it"


def test_stages_do_not_know_their_neighbours() -> None:
    for path in (PACKAGE / "stages").glob("*.py"):
        neighbours = {name for name in imports(path) if name.startswith("edgeft.stages")}
        assert not neighbours, f"{path.name} imports {neighbours}"


@pytest.mark.parametrize("folder", ["formats", "bench"])
def test_formats_and_bench_can_be_imported_without_torch(folder: str) -> None:
    ours = {path.stem for path in (PACKAGE / folder).glob("*.py")} - {"__init__", *TORCH_OR_EXTRA}
    names = [f"edgeft.{folder}.{stem}" for stem in sorted(ours)]
    assert names and not loaded_by(names, HEAVY)


def test_the_command_line_loads_nothing_heavy() -> None:
    assert not loaded_by(["edgeft.cli"], (*HEAVY, "numpy", "pydantic", "yaml", "rich"))


def test_the_commands_that_only_look_load_no_torch() -> None:
    assert not loaded_by(["edgeft.commands", "edgeft.pipeline", "edgeft.stages.data", "edgeft.stages.base"], HEAVY)


def loaded_by(modules: list[str], unwanted: tuple[str, ...]) -> list[str]:
    """Those of `unwanted` that are loaded after importing `modules` in a fresh process."""
    code = f"import sys, {', '.join(modules)}; print(*[m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_nothing_is_loaded_with_pickle_or_remote_code() -> None:
    for path in MODULES:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
        assert not {"pickle", "dill", "joblib", "marshal", "shelve"} & {n.split(".")[0] for n in imports(path)}, path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            given = {k.arg: getattr(k.value, "value", None) for k in call.keywords}
            assert given.get("trust_remote_code") in (None, False), f"{path}:{call.lineno}"
            assert not given.get("shell"), f"{path}:{call.lineno}"
            if ast.unparse(call.func) == "torch.load":
                assert given.get("weights_only") is True, f"{path}:{call.lineno}: torch.load without weights_only"
