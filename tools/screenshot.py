"""Take the README's picture of a report: on a wide screen and on a phone, side by side, as WebP.

python tools/screenshot.py runs/report-<key>/report.html docs/report.webp
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from playwright.sync_api import sync_playwright

from edgeft.bench.devices.browser import find_chromium

WIDE, PHONE, HEIGHT = 1040, 390, 880  # CSS pixels
QUALITY = 78
FRAME = "border:1px solid #d8d5cf;border-radius:14px;background:#fff"


def main() -> int:
    report, picture = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    frames = "".join(
        f'<iframe src="{report.as_uri()}#{part}" width="{width}" height="{HEIGHT}" style="{FRAME}"></iframe>'
        for width, part in ((WIDE, ""), (PHONE, "fronts"))
    )
    body = f'<body style="margin:0;padding:18px;background:#ece9e3;display:flex;gap:18px;width:max-content">{frames}'
    page_file = picture.with_suffix(".partial.html")
    page_file.write_text(f"<!doctype html><meta charset=utf-8>{body}</body>", "utf-8")
    flags = ["--no-sandbox"] if os.geteuid() == 0 else []
    try:
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=find_chromium(), args=flags)
            page = browser.new_page(viewport={"width": WIDE + PHONE + 62, "height": HEIGHT + 42})
            page.goto(page_file.resolve().as_uri(), wait_until="load")
            page.wait_for_timeout(300)
            shot = {"format": "webp", "quality": QUALITY}
            taken = page.context.new_cdp_session(page).send("Page.captureScreenshot", shot)
            picture.write_bytes(base64.b64decode(taken["data"]))
            browser.close()
    finally:
        page_file.unlink()
    print(f"wrote {picture}, {picture.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
