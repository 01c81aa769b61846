"""A real package in a real Chromium, beside the same package in this machine's own runtime."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import numpy as np
import psutil
import pytest

from edgeft.bench.devices.browser import BrowserDevice, _tree, find_chromium, parse_options
from edgeft.bench.devices.device import DeviceError, DeviceLost, opened
from edgeft.bench.devices.job import ForcedJob, Job, RowJob, SpeedJob
from edgeft.bench.devices.partial import completed
from edgeft.bench.devices.web_runtimes import find_runtime
from edgeft.bench.session import open_session
from edgeft.formats.parity import differences, summarize
from tests.real_model import smollm2_gguf

QUESTIONS = ("Name three colours.", "What is the capital of France?")
ROUNDING = 1.0  # nats between two kernels that multiply 4-bit weights with inputs of 8 bits
ANSWER = "Red, green and\nblue \N{EN DASH} caf\N{LATIN SMALL LETTER E WITH ACUTE}."


@pytest.fixture
def playing() -> None:
    """Skips where no browser can be driven."""
    pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install 'edgeft[browser]'")
    try:
        find_chromium()
        find_runtime("gguf")
    except DeviceError as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_package_in_chromium_answers_and_scores_as_on_this_machine(tmp_path: Path, playing: None) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "model.gguf").symlink_to(smollm2_gguf())
    session = open_session(package, 1, 512)
    prompts = [session.prompt_ids([{"role": "user", "content": question}]) for question in QUESTIONS]
    reference = session.answer_ids(ANSWER)
    row = [*prompts[0], *reference]
    at = range(len(prompts[0]) - 1, len(row) - 1)
    [local_PV] = session.score([(row, at)])
    job = Job(
        threads=1, context=512, stop_ids=sorted(session.stop_ids), max_new_tokens=8,
        speed=SpeedJob(prompts[0], 4, 2), rows=[RowJob(prompts[0], reference), RowJob(prompts[1])],
        forced=[ForcedJob(row, list(at))], logits="logits.bin",
    )  # fmt: skip
    lines: list[str] = []
    with opened("browser:threads=1") as device:
        device.push({"model.gguf": package / "model.gguf"})
        found = device.run(job, tmp_path, lines.append)
    assert found["runtime"] == "wllama" and "1 thread(s), cross-origin isolated" in found["build"]
    assert [len(sample["decode_s"]) for sample in found["samples"]] == [4, 4]
    assert all(0 < s < 60 for sample in found["samples"] for s in (sample["prefill_s"], *sample["decode_s"]))
    assert found["peak_rss_bytes"] > 90e6 and found["memory"]["bytes"] > 90e6
    assert json.loads(lines[-1]) == {"what": "forced", "total": 1, "done": 1}
    there_PV = np.fromfile(tmp_path / "logits.bin", "<f4").reshape(local_PV.shape)
    parity = summarize([differences(local_PV, completed(local_PV, there_PV), np.array(reference))])
    assert parity.kl_mean < 0.02 and parity.top1 > 0.85  # other kernels, other rounding
    log_p = local_PV - np.log(np.exp(local_PV - local_PV.max(1, keepdims=True)).sum(1, keepdims=True))
    log_p -= local_PV.max(1, keepdims=True)
    told = found["references"][0]["next_logprob"]
    assert np.abs(log_p[np.arange(len(reference)), reference] - told).max() < ROUNDING
    for prompt, answer in zip(prompts, found["answers"], strict=True):
        logits_V = session.prefill(prompt)
        assert logits_V.max() - logits_V[answer[0]] < ROUNDING, "only a near tie may fall to the other side"


@pytest.fixture
def users_browser(tmp_path: Path, playing: None) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A Chromium that someone has started, and the address at which it can be driven."""
    profile = tmp_path / "profile"
    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    flags = ["--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    process = subprocess.Popen([find_chromium(), *flags, *root, "about:blank"], stderr=subprocess.DEVNULL)
    told = profile / "DevToolsActivePort"
    deadline = time.monotonic() + 60
    try:
        while not (told.is_file() and told.read_text().count("\n")):
            assert time.monotonic() < deadline and process.poll() is None, "Chromium did not start"
            time.sleep(0.1)
        yield process, f"http://localhost:{told.read_text().split()[0]}"
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_browser_beside_the_one_that_edgeft_starts_is_neither_read_nor_ended(
    tmp_path: Path, tiny_gguf: Path, users_browser: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, _ = users_browser
    theirs = {one.pid for one in psutil.Process(process.pid).children(recursive=True)} | {process.pid}
    device = BrowserDevice("browser", parse_options(""))
    with device._page(1):
        ours = {one.pid for one in _tree(device._driver)}
        assert not ours & theirs and device._peak()[0] and device._moment()["own_s"] > 0
    device.clean_up()
    assert process.poll() is None
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in ours)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_browser_that_runs_already_lends_one_page_and_stays_open(
    tmp_path: Path, tiny_gguf: Path, users_browser: tuple[subprocess.Popen[bytes], str]
) -> None:
    process, address = users_browser

    def pages() -> list[str]:
        with urlopen(f"{address}/json/list", timeout=10) as answer:
            return sorted(page["url"] for page in json.load(answer) if page["type"] == "page")

    session = open_session(tiny_gguf, 1, 64)
    prompt = session.prompt_ids([{"role": "user", "content": "hi"}])
    job = Job(threads=1, context=64, max_new_tokens=4, speed=SpeedJob(prompt, 2, 1), rows=[RowJob(prompt)])
    before = pages()
    with opened(f"browser:threads=1,cdp={address}") as device:
        assert device.probe()["machine"] == "wasm32"
        device.push({"model.gguf": tiny_gguf / "model.gguf"})
        found = device.run(job, tmp_path, lambda _line: None)
    logits_V = session.prefill(prompt)
    assert logits_V.max() - logits_V[found["answers"][0][0]] < 0.01
    assert found["runtime"] == "wllama" and [len(one["decode_s"]) for one in found["samples"]] == [2]
    assert process.poll() is None and pages() == before
    with opened(f"browser:cdp={address}") as device:
        process.kill()
        process.wait()
        with pytest.raises(DeviceLost, match="no browser answers"):
            device.probe()
        device.push({"model.gguf": tiny_gguf / "model.gguf"})
        with pytest.raises(DeviceLost, match="connect"):
            device.run(job, tmp_path, lambda _line: None)
