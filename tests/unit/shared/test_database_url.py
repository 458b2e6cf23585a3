"""Options of the database URL: honoured by both drivers, or refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Dialect
from sqlalchemy.dialects.postgresql import asyncpg, psycopg

from shared.db.session import async_engine, sync_engine
from shared.db.url import parse_database_url
from shared.errors import ConfigurationError

BASE = "postgresql://u:p@h:5432/d"


def arguments(url: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments that each driver connects with: psycopg's, asyncpg's."""
    found: list[dict[str, Any]] = []

    def keep(dialect: Dialect, record: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        found.append({**kwargs})
        raise ConnectionError

    from sqlalchemy import event

    engine = sync_engine(url)
    event.listen(engine, "do_connect", keep)
    with pytest.raises(ConnectionError):
        engine.connect()
    aengine = async_engine(url)
    event.listen(aengine.sync_engine, "do_connect", keep)
    with pytest.raises(ConnectionError):
        aengine.sync_engine.connect()
    return found[0], found[1]


def test_each_driver_is_told_in_its_own_way() -> None:
    sync, asynchronous = arguments(
        f"{BASE}?sslmode=verify-full&sslrootcert=/ca.pem&channel_binding=require&application_name=mine"
        "&connect_timeout=7&target_session_attrs=read-write"
    )
    assert (sync["sslmode"], sync["sslrootcert"], sync["channel_binding"]) == (
        "verify-full",
        "/ca.pem",
        "require",
    )
    assert (sync["application_name"], sync["connect_timeout"]) == ("mine", 7)
    assert "statement_timeout=30000" in sync["options"]
    assert asynchronous["dsn"] == "postgresql:///?sslmode=verify-full&sslrootcert=%2Fca.pem"
    assert (
        asynchronous["server_settings"]["application_name"] == "mine"
        and asynchronous["timeout"] == 7
    )
    assert "channel_binding" not in asynchronous and "sslmode" not in asynchronous
    assert sync["target_session_attrs"] == asynchronous["target_session_attrs"] == "read-write"


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p@a:5432,b:5433/d",
        "postgresql://u:p@/d?host=a:5432&host=b:5433",
        "postgresql://u:p@/d?host=a,b&port=5432,5433",
    ],
)
def test_several_hosts_reach_both_drivers(url: str) -> None:
    sync, asynchronous = arguments(f"{url}{'&' if '?' in url else '?'}target_session_attrs=primary")
    assert (sync["host"], sync["port"]) == ("a,b", "5432,5433")
    assert (list(asynchronous["host"]), list(asynchronous["port"])) == (["a", "b"], [5432, 5433])
    assert (sync["user"], asynchronous["user"], sync["password"]) == ("u", "u", "p")


def test_pgbouncer_is_asked_for_no_settings_and_no_named_statements() -> None:
    sync, asynchronous = arguments(f"{BASE}?pgbouncer=true")
    assert "options" not in sync and sync["prepare_threshold"] is None and "pgbouncer" not in sync
    assert asynchronous["server_settings"] == {"application_name": "vdiff"}
    assert (
        asynchronous["statement_cache_size"] == 0
        and asynchronous["prepared_statement_name_func"]() == ""
    )
    plain, _ = arguments(f"{BASE}?pgbouncer=false")
    assert "options" in plain and "prepare_threshold" not in plain


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("options=-c%20work_mem=1GB", "the option options cannot be used"),
        ("statement_timeout=5", "the option statement_timeout cannot be used"),
        ("keepalives=1", "the option keepalives cannot be used"),
        ("service=x", "the option service cannot be used"),
        ("gssencmode=require", "the option gssencmode cannot be used"),
        ("channel_binding=require", "asyncpg, the driver of the API, has no channel binding"),
        ("sslmode=require&channel_binding=require", "use sslmode=verify-full"),
        ("channel_binding=always", "channel_binding must be"),
        ("target_session_attrs=writable", "target_session_attrs must be"),
        ("connect_timeout=0", "connect_timeout must be"),
        ("connect_timeout=9999999999", "connect_timeout must be"),
        ("connect_timeout=x", "connect_timeout must be"),
        ("pgbouncer=1", "pgbouncer must be true or false"),
        ("sslmode=require&sslmode=disable", "sslmode is given twice"),
    ],
)
def test_what_one_driver_could_not_honour_is_refused_by_name(options: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said) as refused:
        parse_database_url(f"{BASE}?{options}")
    assert refused.value.param == "database_url" and refused.value.message.startswith(
        "VDIFF_DATABASE_URL: "
    )


@pytest.mark.parametrize("value", ["disable", "prefer"])
def test_channel_binding_that_requires_nothing_is_accepted(value: str) -> None:
    sync, asynchronous = arguments(f"{BASE}?sslmode=require&channel_binding={value}")
    assert sync["channel_binding"] == value and "channel_binding" not in asynchronous


def test_the_dialects_are_those_of_the_drivers() -> None:
    parsed = parse_database_url(BASE)
    assert parsed.for_psycopg().get_dialect() is psycopg.dialect
    assert parsed.for_asyncpg().get_dialect() is asyncpg.dialect
