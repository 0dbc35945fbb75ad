"""A browser without a window: what a page has become, and what it complained of."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
TIMEOUT_S = 120


@dataclass(frozen=True)
class Opened:
    """A page after its scripts ran: its elements as text, and the console's lines."""

    dom: str
    console: list[str]


def find_browser() -> str | None:
    """The browser's program; None where there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def open_page(page: Path, *, home: Path, screenshot: Path | None = None) -> Opened:
    """Open a file in the browser.

    Args:
        page: The file.
        home: The browser's folder.
        screenshot: PNG file to take a picture into.
    """
    browser = find_browser()
    assert browser is not None
    action = (
        "--dump-dom" if screenshot is None else f"--screenshot={screenshot.resolve()}"
    )
    done = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",  # as root, in a container, there is none to be had
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--window-size=1400,2400",
            "--enable-logging=stderr",
            f"--user-data-dir={home / 'profile'}",
            action,
            page.resolve().as_uri(),
        ],
        env={**os.environ, "HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return Opened(dom=done.stdout, console=console)
