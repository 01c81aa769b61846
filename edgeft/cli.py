"""The command line; it, `cli_bench` and `terminal` are the only modules that print results or exit."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from edgeft import __version__, cli_bench, cli_device
from edgeft.errors import EdgeftError
from edgeft.terminal import print_results, print_table

# Everything heavier than this is imported inside the commands, so that --help answers at once.

app = typer.Typer(
    help="Turn a language model and your own examples into a small, measured expert.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

RecipeArg = Annotated[str, typer.Argument(metavar="RECIPE", help="Recipe file, or the bare name of one in recipes/.")]
SetOpt = Annotated[
    list[str] | None, typer.Option("--set", metavar="A.B=VALUE", help="Override a setting; may be repeated.")
]
RunsOpt = Annotated[Path, typer.Option("--runs", envvar="EDGEFT_RUNS", help="Folder of all artifacts.")]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default: physical cores.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
RUNS = Path("runs")


@app.callback(invoke_without_command=True)
def _options(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def run(
    recipe: RecipeArg,
    to: Annotated[str | None, typer.Option(metavar="STAGE", help="Stop after this stage.")] = None,
    set_: SetOpt = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would run, and run nothing.")] = False,
    runs: RunsOpt = RUNS,
) -> None:
    """Make what a recipe describes and is not made yet."""
    from edgeft import commands, naming, preflight
    from edgeft.processes import is_helper

    pipeline = naming.open_run(recipe, set_ or (), runs, sys.stderr)
    if dry_run:
        print_table(["stage", "state", "folder"], commands.plan_rows(pipeline, to))
        return
    commands.quiet_libraries()
    with commands.disk_errors(runs):
        preflight.check_student(pipeline, to)
        made = pipeline.run(to)
    if is_helper():
        return
    _remember(runs)
    if "report" in made:
        print_results(commands.result_rows(pipeline), made["report"].path)
        return
    for name, artifact in made.items():
        if to in (name, pipeline.nodes[name].stage):
            print(f"{name}: {artifact.path}")


@app.command()
def validate(recipe: RecipeArg, set_: SetOpt = None, runs: RunsOpt = RUNS) -> None:
    """Check a recipe, its rows and its base model."""
    from edgeft import naming, preflight

    pipeline = naming.open_run(recipe, set_ or (), runs)
    for line in preflight.check_inputs(pipeline):
        print(line)
    print(f"{pipeline.recipe.name}: {len(pipeline.nodes)} stages, no problem found")


@app.command()
def show(
    subject: Annotated[str, typer.Argument(metavar="RUN_OR_ARTIFACT", help="A recipe, or an artifact's folder.")],
    set_: SetOpt = None,
    as_json: JsonOpt = False,
    verify: Annotated[bool, typer.Option("--verify", help="Compare every file with the manifest.")] = False,
    runs: RunsOpt = RUNS,
) -> None:
    """Show the results of a run, or one artifact."""
    from edgeft import commands, naming

    artifact = naming.find_artifact(subject, runs)
    pipeline = None if artifact else naming.open_run(subject, set_ or (), runs)
    if verify:
        found = [artifact] if artifact else [a for n in pipeline.nodes if (a := pipeline.find(n))] if pipeline else []
        _print_verdict(commands.damages(found), len(found))
    elif artifact:
        facts = commands.artifact_facts(artifact)
        print(json.dumps(facts, indent=1) if as_json else _yaml(facts))
    elif pipeline:
        rows = commands.result_rows(pipeline)
        report = pipeline.find("report")
        print(json.dumps(rows, indent=1)) if as_json else print_results(rows, report.path if report else None)


@app.command("ls")
def list_(runs: RunsOpt = RUNS) -> None:
    """List artifacts and unfinished work, newest first."""
    from edgeft import commands

    print_table(["folder", "kind", "stage", "size", "age", "digest"], commands.list_runs(runs))


app.command()(cli_bench.bench)
app.command()(cli_bench.compare)
app.command()(cli_bench.history)
app.command()(cli_bench.devices)
app.add_typer(cli_device.app, name="device")


@app.command()
def diff(
    a: Annotated[str, typer.Argument(metavar="A", help="A model: its folder, a package's, or a .gguf file.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another, in any format.")],
    row: Annotated[
        str | None, typer.Option(metavar="FILE:NUMBER", help="Show what both answer to this row of a dataset, too.")
    ] = None,
    runs: RunsOpt = RUNS,
) -> None:
    """Find where two models part: settings, tokens, tensors, layers.

    The exit code is 0 if they are equal within what their types allow, 1 if not."""
    from edgeft import commands, naming

    commands.quiet_libraries()
    sides = naming.find_model(a, runs), naming.find_model(b, runs)
    equal, rows = commands.diff_rows(*sides)
    print_table(["compared", "found"], rows)
    for name, text in commands.answers_to_row(*sides, row) if row else ():
        print(f"\n{name}: {text}")
    if not equal:
        raise typer.Exit(1)


@app.command("lr-find")
def lr_find(
    recipe: RecipeArg,
    low: Annotated[float, typer.Option(help="First learning rate.")] = 1e-5,
    high: Annotated[float, typer.Option(help="Last learning rate.")] = 3e-2,
    steps: Annotated[int, typer.Option(help="Optimiser steps, one for each rate.")] = 80,
    set_: SetOpt = None,
    as_json: JsonOpt = False,
    runs: RunsOpt = RUNS,
) -> None:
    """Try learning rates for a recipe's training, in one short run.

    The rate grows from step to step; the loss falls faster and faster, then runs away. Nothing is kept."""
    from edgeft import commands, naming

    pipeline = naming.open_run(recipe, set_ or (), runs, sys.stderr)
    commands.quiet_libraries()
    with commands.disk_errors(runs):
        points, suggested = commands.learning_rates(pipeline, low, high, steps)
    if as_json:
        found = {"points": [{"lr": point.lr, "loss": point.loss} for point in points], "suggested_lr": suggested}
        print(json.dumps(found, indent=1))
        return
    shown = points[:: max(1, len(points) // 20)]
    print_table(["lr", "loss"], [[f"{point.lr:.2e}", f"{point.loss:.4f}"] for point in shown])
    print(f"suggested peak: --set train.lr={suggested:.1e} (half of the rate where the smoothed loss is lowest)")


@app.command()
def chat(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's folder.")],
    system: Annotated[str | None, typer.Option(help="System message; default: the one it was trained with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    threads: ThreadsOpt = None,
    runs: RunsOpt = RUNS,
) -> None:
    """Talk to a package.

    /reset starts a new conversation, /quit ends. Piped lines are answered one by one."""
    from edgeft import commands, naming
    from edgeft.bench.host import physical_cores
    from edgeft.bench.session import open_session

    context = 2048
    folder = next((p for p in (Path(package), runs / package) if p.is_dir()), Path(package))
    session = open_session(folder, threads or physical_cores(), context)
    system = naming.system_message(folder) if system is None else system
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    for line in _typed_lines():
        if line == "/reset":
            messages = list(start)
            continue
        asked = [*messages, {"role": "user", "content": line}]
        said = ""
        try:
            for piece in commands.answer(session, asked, max_new_tokens, context):
                said += piece
                print(piece, end="", flush=True)
        except EdgeftError as error:
            print(error, file=sys.stderr)
            continue
        print(flush=True)
        messages = [*asked, {"role": "assistant", "content": said}]


@app.command()
def schema(
    write: Annotated[bool, typer.Option("--write", help="Write recipes/schema.json instead of printing.")] = False,
) -> None:
    """Print the JSON Schema of recipes, with every setting."""
    from edgeft import naming
    from edgeft.recipe import json_schema

    text = json.dumps(json_schema(), indent=1)
    if write:
        (naming.RECIPES / "schema.json").write_text(text + "\n", "utf-8")
    else:
        print(text)


def main(args: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit.

    0 done, 1 a limit of `compare` is not kept, 2 a problem that the user can solve, 130 interrupted.
    """
    try:
        app(args=args, prog_name="edgeft")
    except EdgeftError as error:
        _fail(str(error), 2)
    except PermissionError as error:
        _fail(f"no permission: {error.filename or error}\n  -> correct the rights, or name another folder", 2)
    except SystemExit as stop:
        if stop.code == 130:
            _fail("interrupted; run the same command to go on", 130)
        raise
    sys.exit(0)


def _remember(runs: Path) -> None:
    from edgeft.bench.history import record

    record(runs)


def _fail(text: str, code: int) -> NoReturn:
    from rich.console import Console

    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] {_escaped(text)}")
    sys.exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def _typed_lines() -> Iterator[str]:
    """Lines until /quit or the end of the input; with a prompt on a terminal."""
    while True:
        try:
            line = input("> ") if sys.stdin.isatty() else input()
        except EOFError:
            return
        if line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _print_verdict(problems: list[str], count: int) -> None:
    if not count:
        raise EdgeftError("nothing is finished yet, so there is nothing to verify", "`edgeft ls` lists what there is")
    if problems:
        raise EdgeftError(
            "\n  ".join(["files do not match their manifests", *problems]), "delete these folders; run again"
        )
    print(f"{count} artifact{'s' if count != 1 else ''}: every file matches its manifest")


def _yaml(value: Any) -> str:
    import yaml

    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=120).rstrip()
