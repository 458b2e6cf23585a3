"""A real Chromium before a real vdiff. `$CHROMIUM`, or a chromium or chrome on PATH; Playwright
only drives it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.integration.conftest import Served, migrated_template, served
from tests.integration.test_api_jobs import chat_job

__all__ = ["migrated_template", "served"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOW = "the browser tests need a Chromium: `apt-get install chromium` (Debian, Ubuntu), or set CHROMIUM to its program"
WIDE = {"width": 1280, "height": 900}
SCREENSHOTS = os.environ.get(
    "VDIFF_SCREENSHOTS"
)  # a folder: every page is drawn into it, light and dark


expect.set_options(timeout=20_000)  # the machine may be busy with other things


def chromium() -> str:
    found = os.environ.get("CHROMIUM") or next(
        (p for name in NAMES if (p := shutil.which(name))), None
    )
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
    """A fresh tab at the dashboard; a script error, or anything loaded from elsewhere, fails the
    test.
    """
    context = browser.new_context(base_url=served.url, viewport=WIDE)  # type: ignore[arg-type]
    tab = context.new_page()
    tab.set_default_timeout(20_000)
    errors: list[str] = []
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on(
        "console", lambda m: errors.append(m.text) if "Content Security Policy" in m.text else None
    )
    ours = (
        "http://127.0.0.1:",
        "blob:",
    )  # `served`, or another API of the test; files that a page saves
    tab.on(
        "request",
        lambda r: errors.append(f"foreign: {r.url}") if not r.url.startswith(ours) else None,
    )
    yield tab
    context.close()
    assert errors == []


def finished(served: Served, **more: Any) -> dict[str, Any]:
    answer = served.client.post("/v1/jobs", json=chat_job(**more), headers={"prefer": "wait=30"})
    assert answer.status_code == 200
    job: dict[str, Any] = answer.json()
    return job


def visit(page: Page, fragment: str = "#/", url: str = "") -> None:
    page.goto(f"{url}/{fragment}")
    expect(page.locator("main")).not_to_be_empty()


def unfold(page: Page, words: str) -> None:
    page.locator("details", has_text=words).evaluate("d => { d.open = true; }")


def sse(events: list[tuple[str, dict[str, Any]]]) -> str:
    return "".join(
        f"event: {kind}\ndata: {json.dumps(data)}\nid: {i}-0\n\n"
        for i, (kind, data) in enumerate(events)
    )


def look(page: Page, name: str, *, whole: bool = True) -> None:
    """The page as it stands, in both schemes and on a phone: axe finds nothing, and nothing sticks
    out.
    """
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
        found = Axe().run(page)
        assert found.violations_count == 0, found.generate_report()
        if SCREENSHOTS:
            page.screenshot(path=f"{SCREENSHOTS}/{name}-{scheme}.png", full_page=whole)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, (
        "a phone would have to scroll sideways"
    )
    if SCREENSHOTS:
        page.screenshot(path=f"{SCREENSHOTS}/{name}-phone.png", full_page=whole)
    page.set_viewport_size(WIDE)  # type: ignore[arg-type]
