"""Work that is begun on the dashboard: the forms for evaluations and batches, filled in as a person
does.
"""

from __future__ import annotations

import json
import re

import pytest
from playwright.sync_api import Locator, Page, expect

from tests.browser.conftest import look, unfold, visit
from tests.integration.conftest import Served
from tests.integration.test_evaluations import sums

pytestmark = pytest.mark.integration


def part(page: Page, name: str) -> Locator:
    return page.get_by_role("group", name=name, exact=True)


def said(field: Locator) -> Locator:
    """Return the message that is shown for a field."""
    return field.page.locator(f"[id='{field.get_attribute('aria-describedby')}']")


def jsonl(rows: list[dict[str, object]], name: str) -> dict[str, object]:
    return {
        "name": name,
        "mimeType": "application/jsonl",
        "buffer": "\n".join(map(json.dumps, rows)).encode(),
    }


def test_an_evaluation_is_begun_and_comes_to_its_end(page: Page, served: Served) -> None:
    visit(page, "#/evaluations")
    unfold(page, "New evaluation")
    dataset = page.get_by_label("Dataset")
    expect(dataset).to_have_value("bundled:vdiff-tiny")
    expect(page.get_by_text("{{reference}}").first).to_be_visible()
    look(page, "evaluation-form")
    rows = [
        {
            "question": f"What is {row['input'].split()[2]} + 5?",
            "answer": row["reference"],
            "mark": row["mark"],
        }
        for row in sums(6, wrong=1)
    ]
    dataset.select_option("A file of this machine")
    page.get_by_label("File").set_input_files(jsonl(rows, "sums.jsonl"))  # type: ignore[arg-type]
    page.get_by_label("Name").first.fill("by <i>hand</i>")
    expect(said(page.get_by_label("User message"))).to_contain_text("{{question}}")
    start = page.get_by_role("button", name="Check and start")
    start.click()
    prompt = page.get_by_label("User message")
    expect(prompt).to_be_focused()  # it asks for a column that is not there, and is told so
    expect(said(prompt)).to_contain_text("line 1: there is no column 'input'")
    assert prompt.get_attribute("aria-invalid") == "true"
    prompt.fill("{{question}}")
    page.get_by_label("System message").fill("Be brief.")
    grader = part(page, "Grader 1")
    grader.get_by_label("Type").select_option("regex")
    grader.get_by_label("Reference").fill("{{answer}}")
    grader.get_by_label("Pattern").fill("(\\d+")
    start.click()
    expect(said(grader.get_by_label("Pattern"))).to_contain_text("no regular expression")
    expect(grader.get_by_label("Pattern")).to_be_focused()
    grader.get_by_label("Pattern").fill("(\\d+)")
    page.get_by_role("button", name="Add a grader").click()
    second = part(page, "Grader 2")
    expect(second.get_by_label("Type")).to_be_focused()
    second.get_by_label("Type").select_option("number")
    second.get_by_label("Reference").fill("{{answer}}")
    second.get_by_label("Relative").fill("much")
    page.get_by_role("button", name="Add a configuration").click()
    first, other = part(page, "Configuration 1"), part(page, "Configuration 2")
    expect(other.get_by_label("Name")).to_be_focused()
    other.get_by_label("Rule").select_option("threshold")
    other.get_by_label("threshold", exact=True).fill("7")
    start.click()
    expect(said(second.get_by_label("Relative"))).to_contain_text("much is no number")
    second.get_by_label("Relative").fill("0.001")
    start.click()
    expect(said(other.get_by_label("threshold", exact=True))).to_contain_text("must be above 0")
    look(page, "evaluation-form-refused")
    other.get_by_label("threshold", exact=True).fill("0.9")
    for configuration in (first, other):
        configuration.get_by_label("max_tokens").fill("16")
    first.get_by_label("Seeds").fill("3, 4")
    other.get_by_text("More parameters").click()
    other.get_by_label("block_length", exact=True).fill("8")
    start.click()
    expect(page.locator(".bar .status").first).to_have_text("completed", timeout=60_000)
    expect(page.locator(".bar").first).to_contain_text("by <i>hand</i>")
    evaluation = served.client.get(f"/v1/evaluations/{page.url.rsplit('/', 1)[1]}").json()
    assert [m["content"] for m in evaluation["template"]] == ["Be brief.", "{{question}}"]
    assert [(c["name"], c["fields"], c["seeds"]) for c in evaluation["configurations"]] == [
        ("default", {"max_tokens": 16}, [3, 4]),
        (
            "threshold",
            {
                "max_tokens": 16,
                "diffusion": {"algorithm": "threshold", "threshold": 0.9, "block_length": 8},
            },
            [0],
        ),
    ]
    assert evaluation["graders"][1]["relative"] == 0.001
    expect(page.get_by_text("the last match of (\\d+), group 1, is {{answer}}")).to_be_visible()
    expect(
        page.get_by_text("the last number of the answer is that of {{answer}}, give or take 0.1 %")
    ).to_be_visible()
    answers = page.get_by_role("region", name="Answers").locator("tbody tr")
    expect(answers).to_have_count(18)
    expect(answers.first).to_contain_text(
        re.compile(r"regex failed, read “\d+”; number failed, read “\d+”")
    )

    page.get_by_role("link", name="Evaluations").first.click()
    unfold(page, "New evaluation")  # what was filled in is still there
    expect(part(page, "Grader 1").get_by_label("Pattern")).to_have_value("(\\d+)")
    kept = page.get_by_label("Dataset").locator("option", has_text="sums.jsonl")
    expect(kept).to_have_count(1)  # uploaded once, however often the server refused the rest
    page.get_by_label("Dataset").select_option(kept.get_attribute("value"))
    expect(said(page.get_by_label("User message"))).to_contain_text(
        "{{question}}"
    )  # read from the server's file
    start.click()
    expect(page.get_by_text("so nothing runs")).to_be_visible()


def test_what_a_form_offers_is_what_the_server_takes(page: Page, served: Served) -> None:
    options = served.client.get("/v1/evaluations/options").json()
    assert {
        "name": "vdiff-tiny",
        "items": 480,
        "columns": ["id", "kind", "input", "reference"],
    } in options["datasets"]
    visit(page, "#/evaluations")
    unfold(page, "New evaluation")
    kinds = part(page, "Grader 1").get_by_label("Type")
    expect(kinds.locator("option")).to_have_text(options["graders"])
    page.get_by_role("button", name="Add a grader").click()
    part(page, "Grader 1").get_by_label("Type").select_option("choice")
    part(page, "Grader 2").get_by_label("Type").select_option("json")
    part(page, "Grader 1").get_by_role("button", name="Remove").click()
    expect(kinds).to_have_value("json")
    expect(kinds).to_be_focused()
    expect(part(page, "Grader 2")).to_have_count(0)
    expect(page.get_by_text("That makes 480 answers.")).to_be_visible()
    page.get_by_label("Lines").fill("20")
    part(page, "Configuration 1").get_by_label("Repeats").fill("2")
    expect(page.get_by_text("That makes 40 answers.")).to_be_visible()
    page.get_by_label("Dataset").select_option("upload")
    broken = {"name": "broken.jsonl", "mimeType": "application/jsonl", "buffer": b"a,b\n1,2\n"}
    page.get_by_label("File").set_input_files(broken)  # type: ignore[arg-type]
    expect(page.get_by_text("Its first line is no JSON object.")).to_be_visible()
    page.get_by_role("button", name="Check and start").click()
    expect(said(page.get_by_label("Dataset"))).to_contain_text("line 1")


def test_a_batch_of_a_file_that_is_there(page: Page, served: Served) -> None:
    body = {"model": "vdiff-tiny", "prompt": "What is 3 + 4?", "max_tokens": 8}
    row = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": body}
    content = json.dumps(row).encode()

    def upload(name: str) -> str:
        answer = served.client.post(
            "/v1/files", data={"purpose": "batch"}, files={"file": (name, content)}
        )
        return str(answer.json()["id"])

    gone, kept = upload("gone.jsonl"), upload("kept.jsonl")
    visit(page, "#/batches")
    unfold(page, "New batch")
    requests = page.get_by_label("Requests")
    expect(requests.locator("option", has_text="gone.jsonl")).to_have_count(1)
    requests.select_option(gone)
    expect(page.get_by_label("Endpoint")).to_have_value(
        "/v1/completions"
    )  # as its first line has it
    served.client.delete(f"/v1/files/{gone}")
    start = page.get_by_role("button", name="Check and start")
    start.click()
    expect(said(requests)).to_contain_text(gone)
    expect(requests).to_be_focused()
    look(page, "batch-form-refused")
    requests.select_option(kept)
    start.click()
    expect(page.locator(".status").first).to_have_text("completed")
    expect(page.get_by_role("region", name="Items").locator("tbody tr")).to_have_count(1)
    page.get_by_role("link", name="Batches").first.click()
    expect(page.get_by_role("region", name="Batches").locator("tbody tr").first).to_contain_text(
        "1 of 1"
    )
    expect(page.get_by_label("Requests")).to_be_hidden()
