"""The dashboard in a real browser: what it shows is what the API holds, and everybody can use it."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, Route, expect
from sqlalchemy import text

from tests.browser.conftest import chromium, finished, look, sse, visit
from tests.integration.conftest import ApiProcess, Served
from tests.integration.test_api_jobs import long_job

pytestmark = pytest.mark.integration


def answer(page: Page) -> Locator:
    return (
        page.locator("section")
        .filter(has=page.get_by_role("heading", name="Answer", exact=True))
        .locator("pre")
    )


def test_overview_counts_jobs_and_workers(page: Page, served: Served) -> None:
    finished(served)
    visit(page)
    states = page.locator(".states li", has_text="succeeded")
    before = int(states.locator("b").inner_text())
    assert before >= 1
    expect(page.get_by_role("table").locator("tbody tr")).to_have_count(1)
    expect(page.locator(".tile", has_text="Workers ready").locator(".tile-value")).to_have_text("1")
    finished(served)  # no reload: the stream brings it
    expect(states.locator("b")).to_have_text(str(before + 1))


def test_jobs_are_filtered_searched_and_paged(page: Page, served: Served) -> None:
    jobs = [finished(served, metadata={"tag": "paged"}) for _ in range(26)]
    other = finished(served, metadata={"tag": "other"})
    visit(page, "#/jobs")
    expect(page.get_by_role("link", name=other["id"])).to_be_visible()
    page.get_by_label("Metadata").fill("tag=paged")
    page.get_by_label("Metadata").press("Enter")
    expect(page.get_by_role("link", name=other["id"])).to_have_count(0)
    expect(page.locator("tbody tr")).to_have_count(25)
    page.get_by_role("button", name="Older").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(page.get_by_role("link", name=jobs[0]["id"])).to_be_visible()
    page.get_by_role("button", name="Newer").click()
    expect(page.get_by_role("link", name=jobs[-1]["id"])).to_be_visible()
    page.get_by_label("State").select_option("failed")
    expect(page.get_by_text("No job matches.")).to_be_visible()
    assert "status=failed" in page.url
    page.reload()
    expect(page.get_by_text("No job matches.")).to_be_visible()


def test_a_new_job_appears_in_the_list(page: Page, served: Served) -> None:
    visit(page, "#/jobs")
    expect(page.locator("tbody tr").first).to_be_visible()
    job = finished(served)
    expect(page.get_by_role("link", name=job["id"])).to_be_visible()


def test_a_finished_job_shows_how_its_answer_came_about(page: Page, served: Served) -> None:
    job = finished(served, metadata={"team": "x"})
    visit(page, f"#/jobs/{job['id']}")
    expect(answer(page)).to_have_text("42")
    expect(page.locator("section", has_text="Asked").locator("pre").first).to_have_text(
        "What is 17 + 25?"
    )
    expect(page.get_by_text("Attempt 1")).to_be_visible()
    expect(page.get_by_text("low_confidence")).to_be_visible()
    grid = page.get_by_role("group", name=re.compile("tokens committed"))
    tokens = grid.locator(".token:not(.mask)")
    scrubber = page.get_by_role("slider")
    last = int(scrubber.get_attribute("max") or 0)
    assert last >= 1 and tokens.count() >= job["usage"]["completion_tokens"]
    scrubber.focus()
    page.keyboard.press("Home")
    expect(tokens).to_have_count(0)
    page.keyboard.press("ArrowRight")
    expect(tokens).not_to_have_count(0)
    page.keyboard.press("End")
    grid.focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".detail")).to_contain_text('Position 0: "')
    expect(page.locator(".detail")).to_contain_text("confidence")
    texts = "".join(grid.locator(".token").all_inner_texts()).replace(" ", "")
    assert texts.startswith("42"), texts
    page.get_by_label("Colour").select_option("confidence")
    expect(page.get_by_text("unsure")).to_be_visible()


def test_the_steps_stay_when_redis_has_forgotten_them(page: Page, served: Served) -> None:
    job = finished(served)
    served.jobs.redis.delete(f"vdiff:events:{job['id']}")
    visit(page, f"#/jobs/{job['id']}")
    tokens = page.locator(".token:not(.mask)")
    expect(tokens).not_to_have_count(0)
    page.get_by_role("slider").focus()
    page.keyboard.press("Home")
    expect(tokens).to_have_count(0)
    page.keyboard.press("ArrowRight")
    expect(tokens).not_to_have_count(0)
    with served.jobs.database.write() as session:
        session.execute(text("UPDATE jobs SET steps = NULL WHERE id = :id"), {"id": job["id"]})
    page.reload()
    expect(page.get_by_text("were not kept", exact=False)).to_be_visible()


def test_a_running_job_fills_in_and_can_be_cancelled(page: Page, served: Served) -> None:
    job = served.client.post("/v1/jobs", json=long_job()).json()
    visit(page, f"#/jobs/{job['id']}")
    tokens = page.locator(".token:not(.mask)")
    expect(tokens).not_to_have_count(0)
    seen = tokens.count()
    expect(page.locator(".token")).to_have_count(480)
    page.wait_for_function(
        "n => document.querySelectorAll('.token:not(.mask)').length > n", arg=seen
    )
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".status", has_text="cancelled").first).to_be_visible()
    page.get_by_role("button", name="Retry").click()
    expect(page.get_by_role("button", name="Cancel")).to_be_visible()
    served.client.post(job["urls"]["cancel"])


def test_replay_makes_another_job(page: Page, served: Served) -> None:
    job = finished(served)
    visit(page, f"#/jobs/{job['id']}")
    page.get_by_role("button", name="Replay").click()
    expect(page.locator(".path")).not_to_contain_text(job["id"])
    expect(answer(page)).to_have_text("42")


def test_playground_compares_two_configurations(page: Page, served: Served) -> None:
    visit(page, "#/playground")
    page.get_by_label("Prompt").fill("Reverse the words: silver hammer horse mountain")
    second = page.get_by_role("group", name="B")
    second.get_by_label("threshold", exact=True).fill("0.5")
    expect(second.get_by_text("committed once the model is this sure")).to_be_visible()
    page.get_by_role("button", name="Run both").click()
    expect(page.get_by_text("times less time", exact=False)).to_be_visible()
    a, b = (page.get_by_role("region", name=f"Configuration {name}") for name in "AB")
    forwards = [int(side.locator("dd").first.inner_text()) for side in (a, b)]
    assert forwards[0] > forwards[1] >= 1
    for side in (a, b):
        expect(side.locator(".token").first).to_be_visible()


def test_playground_says_which_parameter_is_wrong(page: Page, served: Served) -> None:
    visit(page, "#/playground")
    page.get_by_role("group", name="B").get_by_label("threshold", exact=True).fill("7")
    page.get_by_role("button", name="Run both").click()
    expect(page.get_by_role("alert")).to_contain_text("diffusion.threshold")


def test_html_in_a_prompt_and_in_an_answer_is_text(page: Page, served: Served) -> None:
    evil = "<img src=x onerror=\"document.title='run'\"><script>document.title='run'</script>"
    job = finished(
        served,
        metadata={"note": evil},
        custom_id=evil,
        body={"messages": [{"role": "user", "content": evil}]},
    )
    shown = {**job, "result": {"choices": [{"index": 0, "message": {"content": evil}}]}}
    page.route(f"**/v1/jobs/{job['id']}", lambda route: route.fulfill(json=shown))
    visit(page, f"#/jobs/{job['id']}")
    expect(page.locator("section", has_text="Asked").locator("pre").first).to_have_text(evil)
    expect(answer(page)).to_have_text(evil)
    visit(page, "#/jobs")
    expect(page.get_by_text(evil).first).to_be_visible()
    assert page.locator("main img, main script").count() == 0
    assert page.title() != "run"


def test_4000_tokens_provisional_and_replaced_ones(page: Page, served: Served) -> None:
    """A crafted stream, as no bundled model makes these: long, edited, and with tokens that are
    only proposed.
    """
    job = finished(served)
    common = {"attempt": 1, "index": 0}
    events: list[tuple[str, dict[str, Any]]] = [
        ("queued", {"id": job["id"]}),
        ("started", {"attempt": 1, "worker_id": "w"}),
    ]
    for step in range(1, 201):
        places = list(range(20 * (step - 1), 20 * step))
        progress = {
            **common,
            "step": step,
            "tokens_committed": 20 * step,
            "tokens_total": 4000,
            "offset": 0,
            "text": "",
        }
        denoise = {
            **common,
            "step": step,
            "positions": places,
            "tokens": [7] * 20,
            "texts": ["ab"] * 20,
            "confidence": [0.5] * 20,
        }
        if step == 2:
            denoise["positions"] = [0, *places[1:]]
            denoise["texts"] = ["new", *["ab"] * 19]
            denoise["provisional"] = {"positions": [3999], "tokens": [8], "texts": ["maybe"]}
        events += [("progress", progress), ("denoise", denoise)]
    page.route(
        "**/events",
        lambda r: (
            r.fulfill(body=sse([*events, ("done", job)]), content_type="text/event-stream")
            if job["id"] in r.request.url
            else r.continue_()
        ),
    )
    visit(page, f"#/jobs/{job['id']}")
    expect(page.locator(".token")).to_have_count(4000)
    expect(page.locator(".token").first).to_have_text("new")
    look(page, "job-4000")
    scrubber = page.get_by_role("slider")
    scrubber.focus()
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token").first).to_have_text("ab")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".token.provisional")).to_have_text("maybe")


def test_a_lost_stream_says_so_and_comes_back(page: Page, served: Served) -> None:
    lost = sse([("overview", served.client.get("/v1/overview").json())])  # it ends after one event
    page.route(
        "**/v1/overview/events",
        lambda route: route.fulfill(body=lost, content_type="text/event-stream"),
    )
    visit(page)
    expect(page.get_by_text("Workers ready")).to_be_visible()
    expect(page.get_by_text("The connection was lost", exact=False)).to_be_visible()
    page.unroute("**/v1/overview/events")
    expect(page.get_by_text("The connection was lost", exact=False)).to_have_count(0)
    states = page.locator(".states li", has_text="succeeded").locator("b")
    before = int(states.inner_text())
    finished(served)
    expect(states).to_have_text(str(before + 1))


def test_an_unknown_job_and_an_unknown_page_say_so(page: Page, served: Served) -> None:
    visit(page, "#/jobs/job_none")
    expect(page.get_by_role("alert").first).to_contain_text("no job")
    visit(page, "#/nowhere")
    expect(page.get_by_text("There is no page at this address.")).to_be_visible()


def test_no_worker_says_so(page: Page, served: Served) -> None:
    def without(route: Route) -> None:
        shown = served.client.get("/v1/overview").json() | {
            "workers": [],
            "pace": {"tokens_per_second": None},
        }
        route.fulfill(body=sse([("overview", shown)]), content_type="text/event-stream")

    page.route("**/v1/overview/events", without)
    visit(page)
    expect(page.get_by_text("No worker is ready.", exact=False)).to_be_visible()


def test_a_model_that_did_not_load_says_why(page: Page, served: Served) -> None:
    reason = "/models/x: tensor <b>wte</b> is missing"
    failure = {
        "model": "big-model",
        "hostname": "gpu-7",
        "message": reason,
        "code": "model_load_failed",
        "count": 12,
        "last_at": time.time() - 60,
    }

    def failing(route: Route) -> None:
        shown = served.client.get("/v1/overview").json() | {"failures": [failure]}
        route.fulfill(body=sse([("overview", shown)]), content_type="text/event-stream")

    page.route("**/v1/overview/events", failing)
    for where in ("", "#/workers"):
        visit(page, where)
        notice = page.get_by_text("A worker could not load big-model", exact=False)
        expect(notice).to_be_visible()
        expect(page.locator(".notice.bad").first).to_contain_text(reason)  # as text, tags and all
        expect(page.locator(".notice.bad").first).to_contain_text("12 times")


def test_a_job_that_nobody_can_take_says_so(page: Page, served: Served) -> None:
    job = finished(served)
    deadlines = job["deadlines"] | {"complete_by": int(time.time()) + 3600}
    waiting = job | {
        "status": "queued",
        "done": False,
        "result": None,
        "timing": None,
        "deadlines": deadlines,
    }
    model = served.client.get(f"/v1/models/{job['model']}").json()
    page.route(f"**/v1/jobs/{job['id']}", lambda route: route.fulfill(json=waiting))
    page.route(
        f"**/v1/jobs/{job['id']}/events",
        lambda route: route.fulfill(body="", content_type="text/event-stream"),
    )
    page.route(
        f"**/v1/models/{job['model']}", lambda route: route.fulfill(json=model | {"workers": 0})
    )
    visit(page, f"#/jobs/{job['id']}")
    expect(page.get_by_text(f"No live worker serves {job['model']}")).to_be_visible()
    expect(page.get_by_text("Expires unless done by")).to_be_visible()
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [model | {"workers": 0}]}))
    visit(page, "#/playground")
    expect(page.get_by_text("what is run waits for one")).to_be_visible()


def test_no_database_says_so(page: Page, served: Served) -> None:
    body = sse([("trouble", {"code": "database_unavailable"})])
    page.route(
        "**/v1/overview/events", lambda r: r.fulfill(body=body, content_type="text/event-stream")
    )
    visit(page)
    expect(page.get_by_text("PostgreSQL does not answer", exact=False)).to_be_visible()


def test_a_key_is_asked_for_and_kept_in_the_tab_alone(
    page: Page, served: Served, tmp_path: Path
) -> None:
    api = ApiProcess(served.jobs, tmp_path / "api.log", auth="required", api_key="let-me-in")
    try:
        api.wait_ready()
        tab = page.context.browser.new_page()  # type: ignore[union-attr]
        tab.goto(api.url)
        tab.get_by_role("textbox", name="Key").fill("wrong")
        tab.get_by_role("button", name="Use it").click()
        expect(tab.get_by_role("textbox", name="Key")).to_be_visible()
        tab.get_by_role("textbox", name="Key").fill("let-me-in")
        tab.get_by_role("button", name="Use it").click()
        expect(tab.get_by_text("Workers ready")).to_be_visible()
        assert tab.evaluate("localStorage.length") == 0 and tab.evaluate("document.cookie") == ""
        tab.reload()
        expect(tab.get_by_text("Workers ready")).to_be_visible()
        tab.context.close()
    finally:
        api.end()


def test_without_a_chromium_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CHROMIUM", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(pytest.exit.Exception, match="apt-get install chromium"):
        chromium()


PAGES = ("overview", "jobs", "job", "playground", "workers")


@pytest.mark.parametrize("name", PAGES)
def test_pages_are_accessible(page: Page, served: Served, name: str) -> None:
    question = (
        "Fill in NAME = Kate, DAY = Sunday, CITY = Vienna: The train to CITY leaves on DAY, NAME."
    )
    messages = [{"role": "user", "content": question}]
    job = finished(served, metadata={"team": "docs"}, body={"max_tokens": 64, "messages": messages})
    fragment = {"overview": "#/", "jobs": "#/jobs", "job": f"#/jobs/{job['id']}"}.get(
        name, f"#/{name}"
    )
    visit(page, fragment)
    if name == "job":
        expect(page.locator(".token").first).to_be_visible()
    elif name == "playground":
        page.get_by_label("Prompt").fill(
            "Leo has 5 eggs, gets 3 more and loses 1. How many eggs are left?"
        )
        page.get_by_role("button", name="Run both").click()
        expect(page.get_by_text("times less time", exact=False)).to_be_visible()
    elif name == "jobs":
        expect(page.locator("tbody tr").first).to_be_visible()
    else:
        expect(page.get_by_role("table").first).to_be_visible()
    look(page, name, whole=name != "jobs")


def test_a_keyboard_reaches_everything(page: Page, served: Served) -> None:
    visit(page)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="To the content")).to_be_focused()
    for name in ("vdiff", "Overview", "Jobs"):
        page.keyboard.press("Tab")
        expect(page.get_by_role("link", name=name, exact=True).first).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Jobs", level=1)).to_be_visible()


def test_a_large_request_is_cut_where_it_is_shown(page: Page, served: Served) -> None:
    job = finished(served)
    content = [{"type": "text", "text": "a" * 100_000}, {"type": "text", "text": "tail"}]
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": content},
        ]
    }
    page.route(f"**/v1/jobs/{job['id']}/input", lambda route: route.fulfill(json={"body": body}))
    visit(page, f"#/jobs/{job['id']}")
    turns = page.locator("section", has_text="Asked").locator("> pre")
    expect(turns.first).to_have_text("Be brief.")
    expect(turns.nth(1)).to_contain_text("… and 5 characters more")
    expect(page.get_by_text("tail")).to_have_count(0)
