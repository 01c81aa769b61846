"""The browser as a device: edgeft's page in headless Chromium, or in a phone's Chrome, driven by Playwright.

A target is `browser`, or `browser:` with options: `threads=1` instead of the job's, `cpu=4x` for a quarter of the CPU
time, `cdp=http://localhost:9222` for a browser that runs already (a phone's through `adb forward`), `port=8123` for the
page's port (which `adb reverse` brings to the phone). Nobody knows on which machine a browser behind `cdp=` computes:
it is measured while no other target is, and nothing is told of this machine's clock, heat and memory.

DevTools' own CPU throttling slows the page's main thread and not its workers, where models run: `cpu=` sets a quota on
all processes of the browser instead.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import psutil

from edgeft.bench.conditions import look
from edgeft.bench.devices.device import HERE, DeviceError, DeviceLost, OnLine
from edgeft.bench.devices.facts import FIELDS, make_facts
from edgeft.bench.devices.job import RUNNER, Job
from edgeft.bench.devices.throttle import enter, slowed
from edgeft.bench.devices.web_job import Ids, Texts, do_job
from edgeft.bench.devices.web_runtimes import find_runtime
from edgeft.bench.devices.web_server import served
from edgeft.bench.host import host_facts

PAGE = Path(__file__).parent / "web"
VIEWPORT = "Pixel 7"  # the phone that Playwright imitates: size, pixel ratio, touch, user agent
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")
FLAGS = (
    "--disable-gpu", "--disable-quic", "--disable-sync", "--disable-background-networking",
    "--disable-component-update", "--no-first-run", "--enable-blink-features=ForceEagerMeasureMemory",
)  # fmt: skip
OPTIONS = "threads=N, cpu=4x, cdp=URL, port=N"
START_S = 30.0
GONE = (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError)  # a process that has ended


@dataclass(frozen=True)
class Options:
    """What stands behind `browser:`. `slower`: by how much the CPU quota divides the cores that the threads use."""

    threads: int | None = None
    slower: float = 1.0
    cdp: str | None = None
    port: int = 0


def parse_options(address: str) -> Options:
    """Options from 'threads=1,cpu=4x'. Raises DeviceError for what is no option or no fitting value."""
    values: dict[str, Any] = {}
    for part in filter(None, address.split(",")):
        name, _, text = part.partition("=")
        try:
            if name == "threads" and int(text) > 0:
                values["threads"] = int(text)
            elif name == "cpu" and 1 <= float(text.removesuffix("x")) <= 100:
                values["slower"] = float(text.removesuffix("x"))
            elif name == "cdp" and text.startswith(("http://", "https://")):
                values["cdp"] = text
            elif name == "port" and 0 < int(text) < 65536:
                values["port"] = int(text)
            else:
                raise ValueError
        except ValueError:
            raise DeviceError(f"browser: {part!r} is no option", f"known are {OPTIONS}") from None
    options = Options(**values)
    if options.cdp and options.slower > 1:
        raise DeviceError("browser: cpu= slows a browser that edgeft starts, not one that runs already (cdp=)")
    return options


def open_browser(address: str) -> BrowserDevice:
    """The device of `browser:ADDRESS`. Raises DeviceError if Playwright or a Chromium is missing."""
    options = parse_options(address)
    try:
        import playwright.sync_api  # noqa: F401
    except ImportError:
        raise DeviceError(
            "Playwright is not installed; it drives the browser", "pip install 'edgeft[browser]'"
        ) from None
    return BrowserDevice(f"browser:{address}" if address else "browser", options)


def find_chromium() -> Path:
    """The system's Chromium or Chrome; EDGEFT_CHROMIUM names another. Raises DeviceError if there is none."""
    named = os.environ.get("EDGEFT_CHROMIUM")
    found = named or next(filter(None, map(shutil.which, NAMES)), None) or (str(MAC) if MAC.is_file() else None)
    if found is None or not Path(found).is_file():
        raise DeviceError(
            f"no Chromium at {named}" if named else "no Chromium is installed",
            "apt install chromium (or Google Chrome), or name the program in EDGEFT_CHROMIUM",
        )
    return Path(found)


class BrowserDevice:
    """`Device` over a page. Every job has a fresh browser; one that runs already gets a fresh page."""

    kind = "browser"
    emulated = False
    formats = frozenset({"gguf", "onnx"})

    def __init__(self, name: str, options: Options) -> None:
        self.name, self._options = name, options
        self.place = "" if options.cdp else HERE  # '': nobody knows
        self._chromium = None if options.cdp else find_chromium()
        self._files: dict[str, Path] = {}
        self._processes: list[psutil.Process] = []
        self._driver: psutil.Process | None = None  # what started the browser, if edgeft did
        self._stopped = False

    def probe(self) -> dict[str, Any]:
        """This machine's facts, as the browser computes on it; of a browser elsewhere only its version is known."""
        if self._options.cdp:
            values = {"versions": {"browser": _version_at(self._options.cdp)}, "machine": "wasm32"}
            return make_facts(values, {}, "the browser does not tell")
        host = host_facts()
        values = {key: value for key, value in host.items() if key in FIELDS and value is not None}
        model = f"{_version_of(self._chromium)}, headless, viewport of a {VIEWPORT}"
        return make_facts(
            {**values, "model": model, "machine": "wasm32"}, host["absent"], "not read for a browser on this machine"
        )

    def push(self, files: Mapping[str, Path]) -> None:
        """Nothing is copied: the page's server reads them where they are."""
        missing = [str(path) for path in files.values() if not path.is_file()]
        if missing:
            raise DeviceError(f"{self.name}: no such file: {missing[0]}")
        self._files = dict(files)

    def run(self, job: Job, scratch: Path, on_line: OnLine) -> dict[str, Any]:
        from playwright.sync_api import Error

        if job.cpus is not None:
            raise DeviceError(f"{self.name}: a browser cannot be kept to chosen cores", "leave --cpus out")
        self._stopped = False
        fmt = "gguf" if "model.gguf" in self._files else "onnx"
        runtime = find_runtime(fmt)
        files = {f"/package/{name}": path for name, path in self._files.items()}
        folders = {"/page/": PAGE, f"/npm/{runtime.name}/": runtime.folder}
        threads = self._options.threads or job.threads
        try:
            with served(files, folders, self._options.port) as port, self._page(threads) as (page, version):
                problems: list[str] = []
                page.on("pageerror", lambda error: problems.append(str(error)))
                page.goto(f"http://localhost:{port}/page/index.html")
                page.wait_for_function("() => window.edgeft", timeout=1000 * START_S)

                def call(name: str, *values: Any) -> Any:
                    return page.evaluate("([name, values]) => window.edgeft[name](...values)", [name, list(values)])

                about = call("about")
                loaded = call("load", fmt, {"files": list(self._files), "threads": threads, "context": job.context})
                before = self._moment()
                found = do_job(call, self._texts(fmt), job, scratch, on_line, self._peak)
                after = self._moment()
        except OSError as error:
            raise DeviceError(f"{self.name}: the page's server: {error}", "choose another port=") from error
        except Error as error:
            raise self._explained(error) from error
        build = (
            f"{runtime.package} {runtime.version} ({loaded['runtime']}, {loaded['version']}), {version}, "
            f"{loaded['threads']} thread(s), {'' if about['isolated'] else 'not '}cross-origin isolated, "
            f"CPU quota 1/{self._options.slower:g}"
        )
        return {
            "runner": RUNNER, "runtime": loaded["runtime"], "build": build, "load_s": loaded["load_s"],
            "threads": loaded["threads"], "agent": about["agent"], "before": before, "after": after, **found,
        }  # fmt: skip

    @contextmanager
    def _page(self, threads: int) -> Iterator[tuple[Any, str]]:
        """A fresh page and the browser's version."""
        from playwright.sync_api import sync_playwright

        with ExitStack() as stack:
            group = stack.enter_context(slowed(threads / self._options.slower)) if self._options.slower > 1 else None
            play = stack.enter_context(sync_playwright())
            if self._options.cdp:
                browser = play.chromium.connect_over_cdp(self._options.cdp)
                context = browser.contexts[0] if browser.contexts else browser.new_context()
                page = context.new_page()
                stack.callback(page.close)
            else:
                mark = f"--edgeft={secrets.token_hex(8)}"  # Chromium passes over it; it tells our browser from others
                flags = [*FLAGS, mark, *(["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else [])]
                browser = play.chromium.launch(executable_path=self._chromium, headless=True, args=flags)
                stack.callback(self.clean_up)
                stack.callback(browser.close)
                page = browser.new_context(**play.devices[VIEWPORT]).new_page()
                program = _started_with(mark)
                self._driver, self._processes = program.parent(), _tree(program)
                if group:
                    enter(group, [process.pid for process in self._processes])
            page.set_default_timeout(0)
            yield page, f"Chromium {browser.version}"

    def _texts(self, fmt: str) -> Texts:
        """How the page takes tokens: wllama wants their texts, onnxruntime-web the ids alone."""
        if fmt == "onnx":
            return Ids()
        from edgeft.bench.devices.web_text import Pieces

        return Pieces(self._files["model.gguf"])

    def stop(self) -> None:
        self._stopped = True
        self._kill()

    def clean_up(self) -> None:
        """End what is left of the browser."""
        self._kill()
        psutil.wait_procs(self._processes, timeout=5)
        self._processes = []

    def _kill(self) -> None:
        for process in self._processes:
            with suppress(*GONE):
                process.kill()

    def _moment(self) -> dict[str, Any]:
        """The machine now; `own_s` is the CPU time of the browser and of what drives it. Of a browser elsewhere nothing
        is known."""
        if self._options.cdp:
            return {}
        own = 0.0
        for process in [psutil.Process(), *_tree(self._driver)]:
            with suppress(*GONE):
                times = process.cpu_times()
                own += times.user + times.system
        return {**asdict(look()), "own_s": own}

    def _peak(self) -> tuple[int | None, str]:
        """Most resident memory of the process that holds the page, so far, or None with the reason."""
        found: list[int] = []
        for process in _tree(self._driver):
            with suppress(*GONE):
                status = Path(f"/proc/{process.pid}/status")
                if "--type=renderer" in " ".join(process.cmdline()) and status.is_file():
                    lines = status.read_text("ascii", errors="replace").splitlines()
                    found += [1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
        if not found:
            return None, "the memory of the browser's process for the page cannot be read from here"
        return max(found), "VmHWM of the browser's process for the page, after the speed part"

    def _explained(self, error: Exception) -> DeviceError:
        text = str(error).split("Call log:")[0].strip()
        if self._stopped:
            return DeviceError(f"{self.name}: stopped")
        if self._options.cdp and ("connect" in text.lower() or "closed" in text.lower()):
            return DeviceLost(f"{self.name}: {text}", "is the browser still open, and adb forward and reverse set?")
        if "crash" in text.lower() or "closed" in text.lower():
            return DeviceError(f"{self.name}: the page ended: {text}", "most often a lack of memory: a smaller type")
        return DeviceError(f"{self.name}: {text}", "open the page by hand to see more, or export the package again")


def _started_with(mark: str) -> psutil.Process:
    """The process below this one that has `mark` among its arguments. Raises DeviceError if it is gone."""
    for process in psutil.Process().children(recursive=True):
        with suppress(*GONE):
            if mark in process.cmdline():
                return process
    raise DeviceError("browser: it ended as soon as it had started", "open it by hand to see why")


def _tree(root: psutil.Process | None) -> list[psutil.Process]:
    """A process and all below it; nothing if it is gone."""
    with suppress(*GONE):
        return [root, *root.children(recursive=True)] if root else []
    return []


def _version_of(chromium: Path | None) -> str:
    done = subprocess.run([str(chromium), "--version"], capture_output=True, text=True, check=False, timeout=START_S)
    return done.stdout.strip() or "Chromium"


def _version_at(cdp: str) -> str:
    """What a browser says that listens there. Raises DeviceLost if none does."""
    try:
        with urlopen(f"{cdp.rstrip('/')}/json/version", timeout=START_S) as answer:
            return str(json.load(answer)["Browser"])
    except (URLError, OSError, ValueError, KeyError) as error:
        raise DeviceLost(f"no browser answers at {cdp}: {error}", "adb forward tcp:PORT localabstract:...") from error
