"""Passwords of PostgreSQL and Redis change while parts run, by the statements of
docs/operations.md.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from migrations.run import upgrade
from shared.db.session import Database
from tests.integration.conftest import ROOT, create_database, drop_database, sync_engine_unpooled
from vdiff.embedded.redis import EmbeddedRedis

pytestmark = pytest.mark.integration


def statements() -> list[str]:
    page = (ROOT / "docs/operations.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```sql\n(.*?)```", page, re.S)
    return [line for line in block.splitlines() if not line.startswith("--")]


@pytest.fixture
def owned(postgres_url: str) -> Iterator[tuple[str, str]]:
    """(name of a role that owns a database of this name, its URL)."""
    name = f"rotate_{uuid.uuid4().hex[:8]}"
    url = make_url(create_database(postgres_url, name))
    admin(
        postgres_url,
        f"CREATE ROLE {name} LOGIN PASSWORD 'old'",
        f"ALTER DATABASE {name} OWNER TO {name}",
    )
    yield name, url.set(username=name, password="old").render_as_string(hide_password=False)
    drop_database(postgres_url, name)
    admin(postgres_url, f"DROP ROLE IF EXISTS {name}_3, {name}_2", f"DROP ROLE {name}")


def admin(url: str, *sql: str) -> None:
    with (
        sync_engine_unpooled(url)
        .execution_options(isolation_level="AUTOCOMMIT")
        .connect() as connection
    ):
        for statement in sql:
            connection.execute(text(statement))


def test_postgresqls_password_by_a_second_role_and_a_third(
    owned: tuple[str, str], postgres_url: str
) -> None:
    name, old_url = owned
    upgrade(old_url)
    *before, after = statements()

    def rotate(number: int, sql: str) -> str:
        return re.sub(r"\bvdiff\b", name, sql.replace("vdiff_2", f"{name}_{number}"))

    urls = {1: old_url}
    for number in (2, 3):
        admin(postgres_url, *(rotate(number, sql) for sql in before))
        as_role = make_url(old_url).set(username=f"{name}_{number}", password="NEW")
        urls[number] = as_role.render_as_string(hide_password=False)
        for url in (urls[number], urls[number - 1]):  # both, while parts change over
            database = Database(url)
            with database.write() as session:
                session.execute(text(f"ALTER TABLE jobs ADD COLUMN IF NOT EXISTS x{number} int"))
                session.execute(text(f"CREATE TABLE IF NOT EXISTS y{number} ()"))
            database.dispose()
        admin(postgres_url, rotate(number, after))
    admin(postgres_url, f"DROP ROLE {name}_2")  # owns nothing
    upgrade(urls[3])
    for number in (1, 2):
        with pytest.raises(OperationalError):
            sync_engine_unpooled(urls[number]).connect()


def test_redis_password_beside_the_old_one(tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    try:
        old_url = server.start()
        old = str(make_url(old_url).password)
        new_url = old_url.replace(old, "NEW")
        with redis.Redis.from_url(old_url) as client:
            client.execute_command("ACL SETUSER default >NEW")
            with redis.Redis.from_url(new_url) as other:
                assert client.ping() and other.ping()
                other.execute_command(f"ACL SETUSER default <{old}")
            assert client.ping(), "a connection that is there goes on"
        with redis.Redis.from_url(old_url) as refused, pytest.raises(redis.AuthenticationError):
            refused.ping()
    finally:
        server.stop()
