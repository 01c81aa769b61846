"""The commands that get devices ready; `cli` registers them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

# Everything heavier is imported inside the commands, so that --help answers at once.

app = typer.Typer(help="Get phones, boards and browsers ready for `bench --target`.", no_args_is_help=True)


@app.callback()
def _device() -> None:
    """Get phones, boards and browsers ready for `bench --target`."""


@app.command("build-runner")
def build_runner(
    target: Annotated[
        str, typer.Option(help="aarch64 (phones, boards), x86_64, or native: this machine's processor alone.")
    ] = "aarch64",
    cpu: Annotated[
        list[str] | None, typer.Option(metavar="LEVEL", help="armv8.0, armv8.2 or armv9; default: each of them.")
    ] = None,
    source: Annotated[
        Path | None, typer.Option(help="llama.cpp's folder, instead of fetching llama-cpp-python's source package.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Build what is there already.")] = False,
) -> None:
    """Build the program that measures on a device, once.

    It is kept in the user's cache folder (EDGEFT_CACHE), and bench takes the one that fits the device's processor.
    About 6 minutes of CPU for each level; for other processors than this one `pip install 'edgeft[devices]'`."""
    from edgeft.bench.devices import build, native
    from edgeft.errors import EdgeftError
    from edgeft.progress import Reporter

    if target not in native.TARGETS:
        raise EdgeftError(f"no target is called {target!r}", f"there are {', '.join(native.TARGETS)}")
    levels = [native.level_called(target, name) for name in cpu] if cpu else build.levels_of(target)
    for level in levels:
        folder = build.build_runner(target, level, Reporter(level.name, stream=sys.stderr), source, again)
        record = json.loads((folder / native.RECORD).read_text("utf-8"))
        print(f"{level.name}: {folder / native.PROGRAM}, {record['bytes'] / 1e6:.1f} MB, sha256 {record['sha256']}")


@app.command("fetch-browser")
def fetch_browser(
    again: Annotated[bool, typer.Option("--again", help="Fetch what is there already.")] = False,
) -> None:
    """Fetch what runs packages in a browser, once: wllama and onnxruntime-web, by npm.

    The versions are pinned, the archives compared with their known sha512; they are kept in the user's cache folder
    (EDGEFT_CACHE). `bench --target browser` also takes a Chromium or Chrome and `pip install 'edgeft[browser]'`."""
    from edgeft.bench.devices.web_runtimes import fetch_all

    for folder in fetch_all(again):
        print(folder)
