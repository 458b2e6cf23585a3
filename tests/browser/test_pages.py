"""Batches and webhooks in a real browser: from an upload to the files, from a new endpoint to its
redelivered events.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.browser.conftest import finished, look, unfold, visit
from tests.integration.conftest import Served, eventually, new_key
from tests.integration.test_api_jobs import chat_job
from tests.integration.test_evaluations import FAST, SLOW, begin, request, sums
from tests.integration.test_evaluations import upload as upload_dataset
from tests.integration.test_webhooks import Receiver, hooks, receiver

pytestmark = pytest.mark.integration
__all__ = ["hooks", "receiver"]


def line(custom_id: str, question: str, **body: Any) -> str:
    messages = [{"role": "user", "content": question}]
    request = {"model": "vdiff-tiny", "messages": messages, "max_tokens": 16, **body}
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}
    )


LONG = line(
    "long", "What?", max_tokens=200, ignore_eos=True, diffusion={"block_length": 200}
)  # runs for seconds


def upload(page: Page, lines: list[str]) -> None:
    unfold(page, "New batch")
    content = "\n".join(lines).encode()
    page.get_by_label("File", exact=True).set_input_files(
        {"name": "in.jsonl", "mimeType": "application/jsonl", "buffer": content}
    )
    page.get_by_role("button", name="Check and start").click()


def test_a_batch_from_upload_to_its_files(page: Page, served: Served, tmp_path: Path) -> None:
    visit(page, "#/batches")
    upload(page, [line(f"a-{n}", f"What is {n} + 25?") for n in range(1, 4)] + [LONG])
    expect(page.locator(".path")).to_contain_text("batch_")
    items = page.get_by_role("region", name="Items").locator("tbody tr")
    expect(items).to_have_count(4)
    page.get_by_role("button", name="Cancel").click()
    expect(page.locator(".status").first).to_have_text("cancelled")
    failed = page.get_by_role("button", name="Retry failed")
    expect(failed).to_be_visible()
    expect(items.locator(".status", has_text=re.compile("running|queued"))).to_have_count(0)
    states = items.locator(".status").all_inner_texts()
    assert states[0] == "cancelled" and states == sorted(states), (
        states
    )  # cancelled before succeeded
    look(page, "batch")
    failed.click()
    expect(page.locator(".status").first).to_have_text("completed", timeout=60_000)
    expect(page.get_by_text("4 of 4")).to_be_visible()
    expect(page.get_by_role("region", name="Items").get_by_text("26", exact=True)).to_be_visible()
    with page.expect_download() as saved:
        page.get_by_role("button", name="Output file").click()
    saved.value.save_as(tmp_path / "out.jsonl")
    rows = [json.loads(row) for row in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["custom_id"] for row in rows] == ["a-1", "a-2", "a-3", "long"]
    visit(page, "#/batches")
    expect(page.get_by_role("region", name="Batches").locator("tbody tr").first).to_contain_text(
        "4 of 4"
    )
    unfold(page, "New batch")
    look(page, "batches")


def test_a_bad_batch_says_which_line(page: Page, served: Served) -> None:
    visit(page, "#/batches")
    upload(page, [line("good", "What?"), line("bad", "<b>What?</b>", temperature=-1), "no json"])
    expect(page.get_by_role("heading", name="Why it failed")).to_be_visible()
    errors = page.get_by_role("region", name="Errors").locator("tbody tr")
    expect(errors).to_have_count(2)
    expect(errors.first).to_contain_text("body.temperature")
    look(page, "batch-failed")


def test_webhooks_from_an_endpoint_to_its_redelivery(
    page: Page, hooks: httpx.Client, receiver: Receiver
) -> None:
    visit(page, "#/webhooks", str(hooks.base_url))
    unfold(page, "New endpoint")
    page.get_by_label("URL").fill("ftp://example.com")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("alert")).to_contain_text("url")
    page.get_by_label("URL").fill(receiver.url + "/page")
    page.get_by_label("Description").fill("<i>mine</i>")
    page.get_by_label("job.started").check()
    page.get_by_label("Only jobs").fill("hook=page")
    page.get_by_role("button", name="Create").click()
    field = page.get_by_label("Secret")
    assert field.input_value().startswith("whsec_")
    look(page, "webhooks")
    page.get_by_role("button", name="I have it").click()
    expect(field).to_have_count(0)
    page.get_by_role("link", name=receiver.url + "/page").click()
    receiver.answers["/page"] = 500
    page.get_by_role("button", name="Send a test").click()
    rows = page.get_by_role("region", name="Deliveries").locator("tbody tr")
    expect(rows.first.locator(".status")).to_have_text("failed")
    expect(rows.first.locator(".attempts li")).to_have_count(4)
    expect(page.locator(".bar .status").first).to_have_text(
        "disabled"
    )  # a whole schedule without a success
    page.get_by_role("button", name="Enable").click()
    receiver.answers["/page"] = 200
    rows.first.get_by_role("button", name="Redeliver").click()
    expect(rows.first.locator(".status")).to_have_text("delivered")
    page.get_by_role("button", name="Disable").click()
    expect(page.get_by_role("button", name="Send a test")).to_be_disabled()
    page.get_by_role("button", name="Enable").click()
    page.get_by_role("button", name="Rotate secret").click()
    assert page.get_by_label("Secret").input_value().startswith("whsec_")
    page.get_by_role("button", name="I have it").click()
    page.get_by_text("Send a span of time again").click()
    page.get_by_label("Since").fill("2020-01-01T00:00")
    page.get_by_label("delivered").check()
    page.get_by_role("button", name="Redeliver them").click()
    expect(page.get_by_text("Sent again: 1.")).to_be_visible()
    expect(rows.first.locator(".status")).to_have_text("delivered")

    job = hooks.post(
        "/v1/jobs", json=chat_job(metadata={"hook": "page"}), headers={"prefer": "wait=30"}
    ).json()
    expect(rows).to_have_count(3)  # no reload: the stream brings started and succeeded
    look(page, "webhook")
    visit(page, f"#/jobs/{job['id']}", str(hooks.base_url))
    sent = page.get_by_role("region", name="Deliveries").locator("tbody tr")
    expect(sent).to_have_count(2)
    expect(sent.locator(".status").first).to_have_text("delivered")
    before = len(receiver.requests["/page"])
    sent.first.get_by_role("button", name="Redeliver").click()
    receiver.got("/page", before + 1)
    visit(page, "#/webhooks", str(hooks.base_url))
    page.get_by_role("link", name=receiver.url + "/page").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("button", name="Delete it and its deliveries").click()
    expect(page.get_by_role("link", name=receiver.url + "/page")).to_have_count(0)


def test_an_evaluation_shows_intervals_plots_and_failures_first(
    page: Page, served: Served, tmp_path: Path
) -> None:
    lines = sums(12, wrong=2)
    lines[0]["note"] = "<b>not bold</b>"
    made = begin(served, request(upload_dataset(served, lines), FAST, SLOW, name="<i>sums</i>"))
    visit(page, "#/evaluations")
    page.get_by_role("link", name="<i>sums</i>").click()
    expect(page.locator(".bar .status").first).to_have_text("completed", timeout=60_000)
    rows = page.get_by_role("region", name="Configurations").locator("tbody tr")
    expect(rows).to_have_count(2)
    expect(rows.first).to_contain_text("83.3 %")
    expect(rows.first).to_contain_text("10, 2, 0")
    for name in (
        "Accuracy with its 95 % interval",
        "Accuracy against tokens per forward",
        "Share of answers by latency",
    ):
        expect(page.get_by_role("img", name=name)).to_be_visible()
    expect(page.get_by_role("region", name="Comparisons").locator("tbody tr")).to_contain_text(
        "slow against fast"
    )
    outcomes = page.get_by_role("region", name="Answers").locator("tbody .status")
    expect(outcomes).to_have_count(24)
    assert outcomes.all_inner_texts() == ["failed"] * 4 + ["passed"] * 20
    expect(page.get_by_text("<b>not bold</b>").first).to_be_visible()
    look(page, "evaluation")
    page.get_by_label("Outcome").select_option("passed")
    expect(outcomes).to_have_count(20)
    with page.expect_download() as saved:
        page.get_by_role("button", name="Save the report").click()
    saved.value.save_as(tmp_path / "report.html")
    assert made["id"] in (tmp_path / "report.html").read_text()
    visit(page, "#/evaluations")
    expect(
        page.get_by_role("region", name="Evaluations").locator("tbody tr").first
    ).to_contain_text("24 of 24")
    look(page, "evaluations")


def test_keys_are_made_rotated_and_revoked(page: Page, served: Served) -> None:
    visit(page, "#/keys")
    unfold(page, "New key")
    page.get_by_label("Name").fill("<b>ci</b>")
    page.get_by_label("Weight").fill("5")
    page.get_by_role("button", name="Create").click()
    expect(page.get_by_role("alert")).to_contain_text("weight")  # no more than one has oneself
    page.get_by_label("Weight").fill("")
    page.get_by_label("Requests per minute").fill("600")
    page.get_by_label("webhooks").uncheck()
    page.get_by_role("button", name="Create").click()
    key = page.get_by_label("Secret").input_value()
    bearer = {"authorization": f"Bearer {key}"}
    assert served.client.get("/v1/keys/self", headers=bearer).json()["scopes"] == [
        "jobs",
        "batches",
    ]
    look(page, "keys")
    page.get_by_role("button", name="I have it").click()
    row = page.get_by_role("region", name="Keys").locator("tbody tr").first
    expect(row).to_contain_text("<b>ci</b>")
    row.get_by_role("button", name="Rotate").click()
    row.get_by_role("button", name="Make another").click()
    assert page.get_by_label("Secret").input_value() not in ("", key)
    row.get_by_role("button", name="Revoke").click()
    row.get_by_role("button", name="End it").click()
    expect(row.locator(".status")).to_have_text("revoked")
    eventually(
        lambda: served.client.get("/v1/keys/self", headers=bearer).json()["key"] is None
    )  # back to anonymous


def test_a_key_without_the_scope_is_told_so(page: Page, served: Served) -> None:
    page.add_init_script(f"sessionStorage.setItem('vdiff-api-key', '{new_key(served.jobs)}')")
    visit(page, "#/keys")
    expect(page.get_by_text("takes a key of scope")).to_be_visible()
    expect(page.get_by_text("New key")).to_have_count(0)


def test_a_tab_that_nobody_sees_gives_its_connection_back(page: Page, served: Served) -> None:
    """A browser has six connections to a server for all of its tabs: a few of ours in the
    background must not use them up.
    """
    visit(page)
    states = page.locator(".states li", has_text="succeeded").locator("b")
    expect(states).to_be_visible()
    page.evaluate("Object.defineProperty(document, 'hidden', {value: true, configurable: true})")
    with page.expect_event("requestfailed", lambda r: r.url.endswith("/overview/events")):
        page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    before = int(states.inner_text().replace(",", ""))
    finished(served)
    page.evaluate("delete document.hidden")
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(states).to_have_text(str(before + 1))
    expect(page.get_by_text("The connection was lost", exact=False)).to_have_count(0)
