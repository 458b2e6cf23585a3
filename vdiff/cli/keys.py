"""`vdiff keys`: create, list, revoke and rotate API keys, straight in the database."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.checks import plain
from shared.errors import Conflict, InvalidParameter, NotFound, VDiffError
from shared.ids import new_id
from shared.keys import tokens
from shared.keys.principal import DEFAULT_SCOPES, Scope
from shared.keys.requests import GRACE_SECONDS_MAX, LIMIT_MAX, WEIGHT_MAX, name_of, tenant_of
from shared.vault import vault_of
from shared.webhooks.secrets import new_secret
from vdiff.cli.database import open_database, settings_of_database
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import Listing

if TYPE_CHECKING:
    from shared.db.session import ReadSession

app = typer.Typer(help="API keys: create, list, revoke, rotate.", no_args_is_help=True)
DEFAULT_GRACE_SECONDS = 24 * 3600.0
EXPIRES_DAYS_MAX = 100 * 366.0
_SHOWN = (
    "id",
    "name",
    "tenant",
    "scopes",
    "weight",
    "requests_per_minute",
    "max_queued_jobs",
    "max_queued_tokens",
    "created_at",
    "last_used_at",
    "expires_at",
    "revoked_at",
)


@app.command(
    epilog=examples(
        "vdiff keys create 'evaluation team' --max-queued-jobs 50000 --weight 2",
        "vdiff keys create ci --scope jobs --expires-days 90 > ci.key",
        "vdiff keys create ci --json | jq .key",
    )
)
def create(
    name: Annotated[str, typer.Argument(help="what the key is for")],
    scope: Annotated[
        list[Scope] | None, typer.Option(help="what it may do, repeatable [default: all but admin]")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="share this tenant's jobs [default: a tenant of its own]")
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option(min=1, max=LIMIT_MAX, help="[default: the server's]")
    ] = None,
    max_queued_jobs: Annotated[
        int | None, typer.Option(min=1, max=LIMIT_MAX, help="[default: the server's]")
    ] = None,
    max_queued_tokens: Annotated[
        int | None, typer.Option(min=1, max=LIMIT_MAX, help="[default: the server's]")
    ] = None,
    weight: Annotated[
        int, typer.Option(min=1, max=WEIGHT_MAX, help="turns it gets while keys compete")
    ] = 1,
    expires_days: Annotated[
        float | None, typer.Option(min=0, max=EXPIRES_DAYS_MAX, help="[default: never]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Make a key and print it, this once: only its hash is stored."""
    from shared.keys import repository

    name_of(name)
    if tenant is not None:
        tenant_of(tenant)
    if expires_days is not None:
        _between("--expires-days", expires_days, 0, EXPIRES_DAYS_MAX)
    key_id, vault = tokens.new_key_id(), vault_of(settings_of_database().secret_keys)
    key = tokens.new_key(key_id)
    with open_database() as database, database.write() as session:
        session.execute(
            repository.create(
                key_id,
                name=name,
                tenant=tenant or new_id("tenant"),
                key_hash=tokens.hash_key(key),
                scopes=[s.value for s in dict.fromkeys(scope or DEFAULT_SCOPES)],
                webhook_secret=vault.seal(new_secret()),
                requests_per_minute=requests_per_minute,
                max_queued_jobs=max_queued_jobs,
                max_queued_tokens=max_queued_tokens,
                weight=weight,
                expires_at=None
                if expires_days is None
                else datetime.now(UTC) + timedelta(days=expires_days),
            )
        )
    typer.echo(f"{key_id} ({name}); keep the key, it is not shown again:", err=True)
    typer.echo(json.dumps({"id": key_id, "name": name, "key": key}) if as_json else key)


@app.command("list", epilog=examples("vdiff keys list", "vdiff keys list --json | jq .id"))
def list_keys(
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a line")] = False,
) -> None:
    """All keys, revoked ones too; never the keys themselves."""
    from shared.keys import repository

    with open_database() as database, database.read() as session:
        rows = session.execute(repository.all_keys()).all()
    if as_json:
        for row in rows:
            typer.echo(json.dumps({name: _plain(getattr(row, name)) for name in _SHOWN}))
        return
    listing = Listing("id", "name", "tenant", "scopes", "last used", "state", shrink=("name",))
    now = datetime.now(UTC)
    for row in rows:
        expired = row.expires_at is not None and row.expires_at <= now
        state = "revoked" if row.revoked_at else "expired" if expired else "good"
        used = row.last_used_at.isoformat(timespec="minutes") if row.last_used_at else "never"
        listing.add(row.id, row.name, row.tenant, ",".join(row.scopes), used, state)
    listing.print("no keys")


@app.command(epilog=examples("vdiff keys revoke key_01k..."))
def revoke(
    key_id: Annotated[str, typer.Argument(help="the key's id, key_...")], as_json: AsJson = False
) -> None:
    """End a key for good; API processes notice within a second. Its jobs stay."""
    from shared.keys import repository

    with open_database() as database, database.write() as session:
        if session.execute(repository.revoke(key_id)).one_or_none() is None:
            raise _why_not(session, key_id)
    typer.echo(json.dumps({"id": key_id, "revoked": True}) if as_json else f"{key_id} is revoked")


@app.command(
    epilog=examples(
        "vdiff keys rotate key_01k...", "vdiff keys rotate key_01k... --grace-seconds 0"
    )
)
def rotate(
    key_id: Annotated[str, typer.Argument(help="the key's id, key_...")],
    grace_seconds: Annotated[
        float,
        typer.Option(
            min=0, max=GRACE_SECONDS_MAX, help="seconds for which the old key stays valid"
        ),
    ] = DEFAULT_GRACE_SECONDS,
    as_json: AsJson = False,
) -> None:
    """Print a new key for the same id, tenant and limits; the old one stays valid for a day."""
    from shared.keys import repository

    _between("--grace-seconds", grace_seconds, 0, GRACE_SECONDS_MAX)
    key = tokens.new_key(key_id)
    with open_database() as database, database.write() as session:
        statement = repository.rotate(
            key_id, key_hash=tokens.hash_key(key), grace_seconds=grace_seconds
        )
        if session.execute(statement).one_or_none() is None:
            raise _why_not(session, key_id)
    typer.echo(
        f"{key_id}: the old key ends in {plain(grace_seconds)} s; the new one, not shown again:",
        err=True,
    )
    typer.echo(json.dumps({"id": key_id, "key": key}) if as_json else key)


def _why_not(session: ReadSession, key_id: str) -> VDiffError:
    from shared.keys import repository

    if session.execute(repository.get(key_id)).one_or_none() is None:
        return NotFound(f"no key {key_id!r}; `vdiff keys list` has all", param="key_id")
    return Conflict(f"{key_id} was revoked before", param="key_id")


def _between(option: str, value: float, low: float, high: float) -> None:
    """Raises InvalidParameter; NaN is not between."""
    if not low <= value <= high:
        raise InvalidParameter(f"{option} must be from {plain(low)} to {plain(high)}", param=option)


def _plain(value: Any) -> Any:
    return value.isoformat() if isinstance(value, datetime) else value
