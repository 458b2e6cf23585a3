"""A real Chromium before a real vdiff. `$CHROMIUM`, or a chromium or chrome on PATH; Playwright only drives it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.integration.conftest import Served, migrated_template, served

__all__ = ["migrated_template", "served"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "the browser tests need a Chromium: `apt-get install chromium` (Debian, Ubuntu), or set CHROMIUM to its program"
WIDE = {"width": 1280, "height": 900}


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next((p for name in NAMES if (p := shutil.which(name))), None)
    if found is None:
        pytest.exit(HOW, returncode=2)
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Under root, as in containers, Chromium's sandbox cannot start; the pages are ours.
        launched = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Browser, served: Served) -> Iterator[Page]:
    """A fresh tab at the dashboard; a script error, or anything loaded from elsewhere, fails the test."""
    context = browser.new_context(base_url=served.url, viewport=WIDE)  # type: ignore[arg-type]
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None)
    tab.on("request", lambda r: errors.append(f"foreign: {r.url}") if not r.url.startswith(served.url) else None)
    yield tab
    context.close()
    assert errors == []
