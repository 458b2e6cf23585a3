"""Lists stay small however large the results are; each thing in them leads to its whole."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import text

import vdiff
from tests.integration.conftest import Served
from vdiff.client.calls import batch_lines

pytestmark = pytest.mark.integration

LARGE = "x" * 1_000_000


def test_a_page_of_large_results_is_small(served: Served) -> None:
    label = {"list": "large"}
    body = {"model": "vdiff-tiny", "prompt": "1+1=", "max_tokens": 4}
    job = served.client.post(
        "/v1/jobs",
        json={"endpoint": "/v1/completions", "body": body, "metadata": label},
        headers={"prefer": "wait=30"},
    ).json()
    assert job["status"] == "succeeded"
    grow = text(
        "UPDATE jobs SET result = jsonb_set(CAST(result AS jsonb), '{choices,0,text}', to_jsonb(CAST(:t AS text))) "
        "WHERE id = :i"
    )
    with served.jobs.database.write() as session:
        session.execute(grow, {"t": LARGE, "i": job["id"]})
    answer = served.client.get("/v1/jobs", params={"metadata[list]": "large"})
    [listed] = answer.json()["data"]
    assert len(answer.content) < 10_000
    assert (
        "result" not in listed
        and listed["usage"] == job["usage"]
        and listed["diffusion"] == job["diffusion"]
    )
    same = {k: v for k, v in job.items() if k not in ("result", "eta_seconds", "eta_range_seconds")}
    assert {k: listed[k] for k in same} == same
    assert served.client.get(listed["urls"]["result"]).json()["choices"][0]["text"] == LARGE
    with vdiff.Client(base_url=served.url) as client:
        [found] = client.list_jobs(metadata=label)
        with pytest.raises(vdiff.ClientError, match="a list carries no results"):
            _ = found.text
        assert [whole.text for whole in client.list_jobs(metadata=label, results=True)] == [LARGE]


def test_lines_of_a_batch_lead_to_their_responses(served: Served) -> None:
    lines = batch_lines(
        ["1+1=", "2+2="], model="vdiff-tiny", max_tokens=4, endpoint="/v1/completions"
    )
    with vdiff.Client(base_url=served.url) as client:
        batch = client.wait_batch(
            client.create_batch(client.upload(lines), endpoint="/v1/completions"), timeout=120
        )
        page = served.client.get(f"/v1/batches/{batch.id}/items").json()["data"]
        assert all("response" not in item for item in page)
        wholes = [served.client.get(item["urls"]["self"]).json() for item in page]
        assert [item["response"]["status_code"] for item in wholes] == [200, 200]
        assert [{**item, **whole} for item, whole in zip(page, wholes, strict=True)] == wholes
        assert [item.text for item in client.batch_items(batch)] == [
            item["response"]["body"]["choices"][0]["text"] for item in wholes
        ]
        bare = list(client.batch_items(batch, results=False))
        with pytest.raises(vdiff.ClientError, match="without its response"):
            _ = bare[0].text
    for path, param in (
        (f"{page[0]['urls']['self']}0", "line"),
        (f"/v1/batches/{batch.id}/items/x", "line"),
    ):
        refused: dict[str, Any] = served.client.get(path).json()
        assert refused["error"]["param"] == param
