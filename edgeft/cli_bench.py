"""The commands that measure and compare; `cli` registers them."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from edgeft.errors import EdgeftError
from edgeft.terminal import print_results, print_table

# Everything heavier is imported inside the commands, so that --help answers at once.

RunsOpt = Annotated[Path, typer.Option("--runs", envvar="EDGEFT_RUNS", help="Folder of all artifacts.")]
ThreadsOpt = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; default: physical cores.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
StrictOpt = Annotated[bool, typer.Option("--strict", help="Refuse to measure on a busy or throttling machine.")]
ProfilesOpt = Annotated[Path | None, typer.Option(help="YAML file with device profiles of your own.")]
RUNS = Path("runs")
REGRESSION = 1
EXCLUDES = {  # options of bench that do not go with another
    "--sweep": ("--data", "--choices", "--grammar", "--like", "--target"),
    "--target": ("--like", "--choices", "--grammar", "--runtime"),
    "--like": ("--choices", "--grammar", "--strict"),
}


def bench(
    package: Annotated[str, typer.Argument(metavar="PACKAGE", help="A package's folder, or a recipe: all of its.")],
    data: Annotated[
        Path | None, typer.Option(help="Dataset rows to score answers on (runs/data-.../test.jsonl).")
    ] = None,
    rows: Annotated[
        int | None, typer.Option("--rows", min=1, metavar="N", help="With --data: only N of its rows, drawn from all.")
    ] = None,
    choices: Annotated[
        Path | None, typer.Option(help='Multiple choice: lines of {"query", "choices", "gold"}.')
    ] = None,
    grammar: Annotated[
        Path | None, typer.Option(help="Training rows: hold 50 answers to a grammar made of them (GGUF only).")
    ] = None,
    threads: ThreadsOpt = None,
    like: Annotated[
        str | None, typer.Option(metavar="DEVICE", help="Give it a device's memory and threads; see `edgeft devices`.")
    ] = None,
    profiles: ProfilesOpt = None,
    target: Annotated[
        list[str] | None,
        typer.Option(metavar="TARGET", help="Measure there: local, ssh:USER@HOST, android:SERIAL, browser, arm64."),
    ] = None,
    cpus: Annotated[str | None, typer.Option(help="With --target: stay on these cores, like 4-7, or big.")] = None,
    html: Annotated[Path | None, typer.Option(help="With --target: write the table there as a page, too.")] = None,
    runtime: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="llama.cpp, onnxruntime, genai, torch (a model folder), or all that can."),
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Speed alone, at several lengths and thread counts.")] = False,
    strict: StrictOpt = False,
    as_json: JsonOpt = False,
    runs: RunsOpt = RUNS,
) -> None:
    """Measure packages: speed, memory; with --data accuracy.

    --target may be repeated: targets on different machines are measured together. Exit code 1 if one failed."""
    from edgeft import commands, naming
    from edgeft.bench.choices import load_choices
    from edgeft.bench.constrained import bench_like
    from edgeft.bench.devices.measure import Choice
    from edgeft.bench.profiles import find_profile, load_profiles
    from edgeft.bench.run import Extras, bench_package
    from edgeft.progress import Reporter
    from edgeft.text.split import sample

    given = {
        "--data": data, "--choices": choices, "--grammar": grammar, "--like": like, "--target": target,
        "--runtime": runtime, "--strict": strict, "--sweep": sweep, "--rows": rows,
        "--cpus": cpus, "--html": html,
    }  # fmt: skip
    refuse_together({name for name, value in given.items() if value})
    profile = find_profile(like, load_profiles(profiles)) if like else None
    settings, task = _settings_of(package, runs, threads)
    test_rows = sample(commands.read_test_rows(data), rows, seed=0) if data else None
    if target:
        choice = Choice(runs, cpus, strict)
        _bench_targets(target, naming.package_folders(package, runs), test_rows, settings, task, choice, html, as_json)
        return
    packages = naming.to_measure(package, runs, runtime)
    if sweep:
        _sweep(packages, settings, strict, as_json)
        return
    extras = Extras(
        questions=load_choices(choices) if choices else (),
        grammar=commands.grammar_from(grammar, task) if grammar and data else None,
    )
    found = []
    for folder, chosen in packages:
        report = Reporter(folder.name, stream=sys.stderr)
        if like and profile:
            row = bench_like(like, profile, folder, test_rows, settings, task, report, chosen)
        else:
            result = bench_package(
                folder, test_rows, settings, task, None, report, strict=strict, extras=extras, runtime=chosen
            )
            row = _recorded(result, folder, runs, report)
        found.append({**row, "name": row["name"] or naming.name_in_run(folder), "path": str(folder)})
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        _print_measured(found)


def _recorded(result: dict[str, Any], folder: Path, runs: Path, report: Any) -> dict[str, Any]:
    """The row of what was measured, with what lies under it; the history gets it too, if it can."""
    from edgeft import naming
    from edgeft.bench import history
    from edgeft.bench.table import package_label

    row = {**result["row"], "name": result["row"]["name"] or naming.name_in_run(folder)}
    try:
        history.add(runs, f"{row['name']}-{package_label(row).replace(' ', '-', 1)}", row, result["host"])
    except EdgeftError as error:  # it must not cost what was just measured
        report.note(f"not in the history: {error}")
    under = {part: result[part] for part in ("choices", "details", "samples", "host")}
    return {**row, "held_to_grammar": result["details"].get("held_to_grammar"), **under}


def refuse_together(given: set[str]) -> None:
    """Raises EdgeftError for options of bench that would be passed over."""
    for option in sorted(EXCLUDES.keys() & given):
        if others := [other for other in EXCLUDES[option] if other in given]:
            raise EdgeftError(f"{', '.join(others)} does not go with {option}", "leave one of the two out")
    if "--rows" in given and "--data" not in given:
        raise EdgeftError("--rows says how many rows of --data to score", "name the rows: --data FILE")
    if (alone := sorted({"--cpus", "--html"} & given)) and "--target" not in given:
        raise EdgeftError(f"{', '.join(alone)} is for targets", "name one: --target local, or ssh:USER@HOST")


def _settings_of(package: str, runs: Path, threads: int | None) -> tuple[Any, Any]:
    """How to measure, and what the rows ask: a recipe's own, the defaults for a package."""
    from edgeft import naming
    from edgeft.settings import BenchSettings, TaskSettings

    settings, task = BenchSettings(), TaskSettings()
    if not naming.find_artifact(package, runs):
        recipe = naming.open_run(package, (), runs).recipe
        settings, task = recipe.bench, recipe.task
    return settings.model_copy(update={"threads": threads or settings.threads}), task


def _sweep(folders: Any, settings: Any, strict: bool, as_json: bool) -> None:
    """One table for each package, or all points as JSON."""
    from edgeft.bench import sweep
    from edgeft.progress import Reporter

    found = []
    for folder, runtime in folders:
        points = sweep.sweep(folder, settings, Reporter(folder.name, stream=sys.stderr), runtime, strict)
        found.append({"path": str(folder), "points": points})
        if not as_json:
            print(folder.name)
            print_table(sweep.HEADERS, list(sweep.lines(points)), right_from=0)
            print("\n".join(sweep.remarks(points)))
    if as_json:
        print(json.dumps(found, indent=1))


def _bench_targets(
    targets: list[str], folders: list[Path], rows: Any, settings: Any, task: Any, choice: Any, html: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Each package on all targets: one table for each, or all rows as JSON."""
    from edgeft.bench.devices.fleet import bench_fleet
    from edgeft.bench.devices.side_by_side import page, remarks, target_table
    from edgeft.bench.devices.work import prepare

    if html and len(folders) > 1:
        raise EdgeftError(f"--html writes one package's page, found {len(folders)}", "name one package's folder")
    if html and not html.parent.is_dir():
        raise EdgeftError(f"--html {html}: there is no folder {html.parent}", "make it first, or name another")
    found: list[dict[str, Any]] = []
    for folder in folders:
        measured = bench_fleet(targets, prepare(folder, rows, settings, task), choice, sys.stderr)
        measured = [{**row, "name": row["name"] or folder.name, "path": str(folder)} for row in measured]
        found += measured
        if not as_json:
            print(f"{folder.name}: {measured[0]['format']} {measured[0]['quant'] or ''}")
            print_table(*target_table(measured), right_from=1)
            print("\n".join(remarks(measured)))
        if html:
            html.write_text(page(measured), "utf-8")
    if as_json:
        print(json.dumps(found, indent=1))
    if any(row["error"] for row in found):
        raise typer.Exit(REGRESSION)


def _print_measured(rows: list[dict[str, Any]]) -> None:
    from edgeft.bench.constrained import said

    print_results(rows)
    for row in rows:
        _print_held(row["package"], row.get("held_to_grammar"))
        _print_choices(row["package"], row.get("choices"))
        if "like" in row:
            print("\n" + "\n".join(said(row["like"])))


def _print_held(name: str, found: dict[str, Any] | None) -> None:
    if found:
        print(f"\n{name}, {found.get('n', 0)} answers held to the grammar: {found.get('absent') or ''}")
    for figure, sides in (found or {}).items():
        if isinstance(sides, dict):
            free, held = (100 * sides[side][0] for side in ("free", "held"))
            print(f"  {figure}: free {free:.1f}%, held {held:.1f}%, p = {sides['p']:.2g}")


def _print_choices(name: str, found: dict[str, Any] | None) -> None:
    if found:
        plain, by_length = (
            f"{100 * share:.1f}% ({100 * low:.1f}-{100 * high:.1f})"
            for share, low, high in (found["accuracy"], found["accuracy_by_length"])
        )
        print(f"\n{name}: multiple choice {plain}, by length {by_length}", end="; ")
        print(f"n = {found['n']}, guessing {100 * found['chance']:.1f}%")


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help="The old one: a measurement's folder, or a package's.")],
    second: Annotated[str, typer.Argument(metavar="B", help="The new one.")],
    gate: Annotated[Path | None, typer.Option(help="YAML file of limits; exit code 1 if one is not kept.")] = None,
    rounds: Annotated[int, typer.Option(min=0, help="Fresh processes of each, in turns, for speed; 0: none.")] = 5,
    threads: ThreadsOpt = None,
    strict: StrictOpt = False,
    as_json: JsonOpt = False,
    runs: RunsOpt = RUNS,
) -> None:
    """Compare two packages: accuracy, speed, limits for CI.

    Exit code 1 if a limit of --gate is not kept.
    Shares: McNemar's exact test; scores and speeds: 95% bootstrap intervals of the change from A to B."""
    from edgeft import measuring
    from edgeft.bench.compare import as_cells
    from edgeft.bench.gates import read_gates
    from edgeft.progress import Reporter
    from edgeft.settings import BenchSettings

    if gate:
        read_gates(gate)  # a mistake in it is said before anything is timed
    old, new = (measuring.find_subject(name, runs) for name in (first, second))
    settings = BenchSettings(threads=threads)
    report = Reporter("compare", stream=sys.stderr)
    found = measuring.compare(old, new, settings, rounds, report, strict)
    verdicts = measuring.check_gates(gate, found) if gate else []
    if as_json:
        told = {"figures": [asdict(one) for one in found], "gates": [asdict(one) for one in verdicts]}
        print(json.dumps(told, indent=1))
    else:
        print_table(["figure", "A", "B", "change", "p", "from"], [as_cells(one) for one in found])
        for verdict in verdicts:
            kept = "kept" if verdict.kept else "NOT KEPT"
            print(f"{verdict.figure} {verdict.limit} {verdict.bound:g}: {kept} (found {verdict.found:.4g})")
    if not all(verdict.kept for verdict in verdicts):
        raise typer.Exit(REGRESSION)


def history(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Part of a name: student-gguf-q8_0.")] = None,
    runs: RunsOpt = RUNS,
) -> None:
    """List all measurements and plot them."""
    from edgeft import measuring

    table, page = measuring.history(runs, name)
    headers = ["finished", "name", "package", "cpu", "size MB", "decode tok/s", "TTFT ms", "joint exact %",
               "perplexity"]  # fmt: skip
    print_table(headers, table, right_from=4)
    print(f"\nplot: {page}")


def devices(
    packages: Annotated[
        list[str] | None, typer.Argument(metavar="[PACKAGE]...", help="Packages, or a recipe: all of its.")
    ] = None,
    device: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this device; may be repeated.")] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of the prompt.")] = 128,
    profiles: ProfilesOpt = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="TOKENS_PER_S|FILE", help="One run on the device: its rate, or bench --json.")
    ] = None,
    as_json: JsonOpt = False,
    runs: RunsOpt = RUNS,
) -> None:
    """List device profiles; with packages, predict speed, memory and fit.

    `edgeft devices scan` lists what `edgeft bench --target` could use now."""
    if packages == ["scan"]:
        from edgeft.bench.devices.scan import scan

        found = scan()
        if as_json:
            print(json.dumps([dict(zip(("target", "state", "what"), line, strict=True)) for line in found], indent=1))
        else:
            print_table(["target", "state", "what"], [list(line) for line in found])
        return
    from edgeft import naming
    from edgeft.bench import forecast
    from edgeft.bench.profiles import find_profile, load_profiles

    known = load_profiles(profiles)
    chosen = {name: find_profile(name, known) for name in device} if device else known
    if not packages:
        if as_json:
            print(json.dumps({name: profile.model_dump() for name, profile in chosen.items()}, indent=1))
        else:
            print_table(forecast.DEVICE_HEADERS, forecast.device_rows(chosen), right_from=4)
            print("\n" + "\n".join(forecast.device_remarks(chosen)))
        return
    opened = [forecast.open_package(path) for name in packages for path in naming.package_folders(name, runs)]
    rows = forecast.forecast(opened, chosen, prompt_tokens, calibrate)
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    print_table(forecast.FORECAST_HEADERS, forecast.forecast_rows(rows), right_from=2)
    print("\n" + "\n".join(forecast.remarks(rows, prompt_tokens)))
