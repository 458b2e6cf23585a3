"""The dashboard on bad days: nobody works, the list is long, the key ends, the database goes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from sqlalchemy import text

from shared.keys.tokens import key_id_of
from tests.browser.conftest import look, visit
from tests.integration.conftest import ApiProcess, Jobs, drop_database, jobs_with_database, new_key
from vdiff.embedded import EmbeddedRedis

pytestmark = pytest.mark.integration
MANY = 100_000


@pytest.fixture(scope="module")
def long_ledger(
    postgres_url: str,
    redis_url: str,
    migrated_template: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[ApiProcess, Jobs]]:
    """An API that wants a key, without a worker, on a database with many jobs of the tenant `team`."""
    with ExitStack() as stack:
        jobs = jobs_with_database(postgres_url, redis_url, migrated_template, stack)
        with jobs.database.write() as session:
            session.execute(
                text(
                    "INSERT INTO jobs (id, tenant, endpoint, model, body, params, prompt_token_ids, status, finished_at,"
                    " result) SELECT 'job_' || lpad(i::text, 26, '0'), 'team', '/v1/completions', 'm', '{}',"
                    " '{\"diffusion\": {}}', '{}', 'succeeded', now(), '{\"choices\": []}'"
                    f" FROM generate_series(1, {MANY}) AS i"
                )
            )
        api = ApiProcess(jobs, tmp_path_factory.mktemp("bad-days") / "api.log", auth="required")
        stack.callback(api.end)
        api.wait_ready(path="/health/live")
        yield api, jobs


def with_key(page: Page, key: str) -> None:
    page.add_init_script(f"sessionStorage.setItem('vdiff-api-key', '{key}')")


def test_a_hundred_thousand_jobs_and_no_worker(
    page: Page, long_ledger: tuple[ApiProcess, Jobs]
) -> None:
    api, jobs = long_ledger
    with_key(page, new_key(jobs, tenant="team"))
    visit(page, "#/", api.url)
    expect(page.get_by_text("No worker is ready.", exact=False)).to_be_visible()
    expect(page.locator(".states li", has_text="succeeded").locator("b")).to_have_text("100,000")
    look(page, "bad-no-worker")
    page.get_by_role("link", name="Jobs", exact=True).click()
    rows = page.locator("tbody tr")
    expect(rows).to_have_count(25)
    expect(rows.first).to_contain_text(f"job_{MANY:026d}")
    for number in (2, 3):
        page.get_by_role("button", name="Older").click()
        expect(page.get_by_text(f"Page {number}")).to_be_visible()
        expect(rows.first).to_contain_text(f"job_{MANY - 25 * (number - 1):026d}")
    page.get_by_label("State").select_option("failed")
    expect(page.get_by_text("No job matches.")).to_be_visible()
    page.get_by_label("Job id").fill(f"job_{1:026d}")
    page.get_by_role("button", name="Open").click()
    expect(page.get_by_text("were not kept", exact=False)).to_be_visible()


def test_a_key_that_is_revoked_while_it_is_used(
    page: Page, long_ledger: tuple[ApiProcess, Jobs]
) -> None:
    api, jobs = long_ledger
    key = new_key(jobs)
    with_key(page, key)
    visit(page, "#/batches", api.url)
    expect(page.get_by_text("No batch yet.")).to_be_visible()
    jobs.execute(
        text("UPDATE api_keys SET revoked_at = now() WHERE id = :id RETURNING id").bindparams(
            id=key_id_of(key) or ""
        )
    )
    page.wait_for_timeout(1_200)  # a key's row is trusted for a second
    page.get_by_role("link", name="Webhooks").click()
    dialog = page.get_by_role("dialog")
    expect(dialog.get_by_role("alert")).to_contain_text("not known, expired or revoked")
    look(page, "bad-key", whole=False)
    dialog.get_by_role("textbox", name="Key").fill(new_key(jobs))
    dialog.get_by_role("button", name="Use it").click()
    expect(page.get_by_text("No endpoint yet.", exact=False)).to_be_visible()


def test_a_server_that_takes_no_writes_is_said_with_the_remedy(
    page: Page, postgres_url: str, migrated_template: str, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        server = EmbeddedRedis(tmp_path / "redis")
        stack.callback(server.stop)
        jobs = jobs_with_database(postgres_url, server.start(), migrated_template, stack)
        api = ApiProcess(jobs, tmp_path / "api.log")
        stack.callback(api.end)
        api.wait_ready(path="/health/live")
        visit(page, "#/", api.url)
        expect(page.get_by_text("Workers ready")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        jobs.redis.config_set("maxmemory", "1")
        alert = page.get_by_role("alert")
        expect(alert).to_contain_text("Redis: full")
        expect(alert).to_contain_text("raise maxmemory")
        look(page, "bad-redis")
        jobs.redis.config_set("maxmemory", "0")
        expect(alert).to_have_count(0)


def test_without_a_database_every_page_says_so(
    page: Page, long_ledger: tuple[ApiProcess, Jobs], postgres_url: str
) -> None:
    """Runs last: the database is really gone."""
    api, jobs = long_ledger
    with_key(page, new_key(jobs, scopes=["admin"]))
    visit(page, "#/", api.url)
    expect(page.get_by_text("Workers ready")).to_be_visible()
    jobs.database.dispose()
    drop_database(postgres_url, jobs.database_url.rpartition("/")[2].partition("?")[0])
    expect(page.get_by_text("PostgreSQL does not answer", exact=False)).to_be_visible()
    look(page, "bad-database")
    for name in ("Jobs", "Batches", "Evaluations", "Webhooks", "Keys"):
        page.get_by_role("link", name=name, exact=True).click()
        expect(page.get_by_role("alert").filter(has_text="database").first).to_be_visible()
        look(page, f"bad-database-{name.lower()}")
