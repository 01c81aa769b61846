"""A headless Chromium for tests; those that need one are skipped where there is none, with the reason."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from edgeft.bench.devices.browser import find_chromium
from edgeft.errors import EdgeftError


@contextmanager
def chromium() -> Iterator[Any]:
    """A started browser."""
    api = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install 'edgeft[browser]'"
    )
    try:
        program = find_chromium()
    except EdgeftError as error:
        pytest.skip(f"{error.message}: {error.hint}")
    with api.sync_playwright() as play:
        browser = play.chromium.launch(
            executable_path=program, headless=True, args=["--no-sandbox"] if os.geteuid() == 0 else []
        )
        try:
            yield browser
        finally:
            browser.close()
