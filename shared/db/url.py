"""The database URL: which of libpq's options both drivers honour, and how each driver is told.

psycopg (workers, senders, commands) takes libpq's options as they are. asyncpg (the API) takes some
as arguments, some from a DSN, and lacks others. An option that one of them could not honour is
refused by name: it would stop one process and not the rest, or be ignored by one of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode, urlsplit, urlunsplit

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from shared.errors import ConfigurationError

TLS_OPTIONS = ("sslmode", "sslrootcert", "sslcert", "sslkey", "sslcrl", "sslpassword")
OWN_OPTIONS = ("pgbouncer",)  # not libpq's: see `DatabaseURL.pgbouncer`
URL_OPTIONS = (
    *TLS_OPTIONS,
    "channel_binding",
    "host",
    "port",
    "target_session_attrs",
    "application_name",
    "connect_timeout",
    *OWN_OPTIONS,
)
SESSION_ATTRS = ("any", "primary", "standby", "read-write", "read-only", "prefer-standby")
APPLICATION_NAME = "vdiff"
CONNECT_TIMEOUT_S = 5
CONNECT_TIMEOUT_MAX_S = 300


def _bad(text: str) -> ConfigurationError:
    return ConfigurationError(f"VDIFF_DATABASE_URL: {text}", param="database_url")


@dataclass(frozen=True, slots=True)
class DatabaseURL:
    """A checked URL, without the options that are told apart."""

    url: URL  # with the options `host`, `port` and `target_session_attrs` alone
    tls: dict[str, str]
    channel_binding: str | None
    application_name: str
    connect_timeout_seconds: int
    pgbouncer: bool  # PgBouncer in transaction mode: no settings at connect, no prepared statements

    def for_psycopg(self) -> URL:
        more = {
            **self.tls,
            **({"channel_binding": self.channel_binding} if self.channel_binding else {}),
        }
        return self.url.set(drivername="postgresql+psycopg").update_query_dict(more)

    def for_asyncpg(self) -> URL:
        return self.url.set(drivername="postgresql+asyncpg")

    def asyncpg_dsn(self) -> dict[str, str]:
        """The argument that tells asyncpg about TLS, which it reads from a DSN only."""
        return {"dsn": f"postgresql:///?{urlencode(self.tls)}"} if self.tls else {}


def parse_database_url(url: str) -> DatabaseURL:
    """Parse `postgresql://...` or `postgres://...`, several hosts included.

    Raises:
        ConfigurationError: not a PostgreSQL URL, or an option that not every process could honour.
    """
    try:
        parsed = make_url(_hosts_as_options(url))
    except (ArgumentError, ValueError) as exc:
        raise ConfigurationError("VDIFF_DATABASE_URL is not a URL", param="database_url") from exc
    if parsed.drivername.partition("+")[0] not in ("postgresql", "postgres"):
        raise ConfigurationError(
            "VDIFF_DATABASE_URL must start with postgresql://", param="database_url"
        )
    given: dict[str, Any] = dict(parsed.query)
    for name in given:
        if name not in URL_OPTIONS:
            raise _bad(f"the option {name} cannot be used; there are {', '.join(URL_OPTIONS)}")
        if name not in ("host", "port") and not isinstance(given[name], str):
            raise _bad(f"the option {name} is given twice")
    attrs = given.get("target_session_attrs")
    if attrs is not None and attrs not in SESSION_ATTRS:
        raise _bad(f"target_session_attrs must be one of {', '.join(SESSION_ATTRS)}")
    kept: dict[str, Any] = {
        name: given[name] for name in ("host", "port", "target_session_attrs") if name in given
    }
    tls = {name: given[name] for name in TLS_OPTIONS if name in given}
    return DatabaseURL(
        url=parsed.set(query=kept),
        tls=tls,
        channel_binding=_channel_binding(given.get("channel_binding"), tls.get("sslmode")),
        application_name=given.get("application_name") or APPLICATION_NAME,
        connect_timeout_seconds=_seconds(given.get("connect_timeout")),
        pgbouncer=_flag(given.get("pgbouncer"), "pgbouncer"),
    )


def _hosts_as_options(url: str) -> str:
    """Rewrite `h1:5432,h2:5433` after the `@` as SQLAlchemy writes several hosts:
    `?host=h1:5432&host=h2:5433`.
    """
    parts = urlsplit(url)
    user, at, hosts = parts.netloc.rpartition("@")
    if "," not in hosts:
        return url
    query = "&".join(filter(None, [parts.query, *(f"host={host}" for host in hosts.split(","))]))
    return urlunsplit(parts._replace(netloc=user + at, query=query))


def _channel_binding(value: str | None, sslmode: str | None) -> str | None:
    """Check `channel_binding`, which asyncpg lacks: it is required only where TLS checks the server
    anyway.
    """
    if value is None:
        return None
    if value not in ("disable", "prefer", "require"):
        raise _bad("channel_binding must be disable, prefer or require")
    if value == "require" and sslmode != "verify-full":
        raise _bad(
            "channel_binding=require cannot be used with this sslmode: asyncpg, the driver of the API, has no channel "
            "binding; use sslmode=verify-full, which checks the server's certificate and name, or channel_binding=prefer"
        )
    return value


def _seconds(value: str | None) -> int:
    if value is None:
        return CONNECT_TIMEOUT_S
    if not (
        value.isascii()
        and value.isdigit()
        and len(value) < 6
        and 1 <= int(value) <= CONNECT_TIMEOUT_MAX_S
    ):
        raise _bad(
            f"connect_timeout must be a whole number of seconds from 1 to {CONNECT_TIMEOUT_MAX_S}"
        )
    return int(value)


def _flag(value: str | None, name: str) -> bool:
    if value not in (None, "true", "false"):
        raise _bad(f"{name} must be true or false")
    return value == "true"
