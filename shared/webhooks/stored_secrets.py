"""All SQL on secrets at rest as a whole: which keys encrypt them, and their encryption with another
key.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from sqlalchemy import Select, Table, Update, bindparam, case, func, select, union_all, update

from shared import vault
from shared.db.session import Database, ReadSession
from shared.db.tables import ApiKey, WebhookEndpoint, WebhookSecret
from shared.errors import ConfigurationError
from shared.vault import Vault

COLUMNS: tuple[tuple[type[Any], str, str], ...] = (  # (table, primary key, column)
    (ApiKey, "id", "webhook_secret"),
    (ApiKey, "id", "previous_webhook_secret"),
    (WebhookEndpoint, "id", "secret"),
    (WebhookEndpoint, "id", "previous_secret"),
    (WebhookSecret, "tenant", "secret"),
    (WebhookSecret, "tenant", "previous_secret"),
)
BATCH = 200


def counts() -> Select[Any]:
    """(key_id, stored) of all stored secrets; `clear` for those that are not encrypted."""
    every = union_all(
        *(select(_of(table).c[name].label("secret")) for table, _, name in COLUMNS)
    ).subquery()
    sealed = every.c.secret.startswith(f"{vault.PREFIX}:")
    key_id = case((sealed, func.split_part(every.c.secret, ":", 2)), else_=vault.CLEAR)
    return (
        select(key_id.label("key_id"), func.count().label("stored"))
        .where(every.c.secret.is_not(None))
        .group_by(key_id)
    )


def check(session: ReadSession, keys: Vault) -> Counter[str]:
    """Count the stored secrets by key id. Raises ConfigurationError: one of the keys is not among
    ours.
    """
    found = Counter({row.key_id: int(row.stored) for row in session.execute(counts())})
    if missing := sorted(set(found) - {vault.CLEAR, *keys.key_ids}):
        raise ConfigurationError(vault.unknown_keys_message(missing), param="secret_keys")
    return found


def reseal(database: Database, keys: Vault) -> int:
    """Encrypt every stored secret with the first key, a batch at a time; return how many changed.

    A secret that is replaced meanwhile keeps its new value: a row changes only while it has the old
    one.

    Raises:
        ConfigurationError: there is no key, or a secret's key is not among ours.
    """
    if not keys.key_ids:
        raise ConfigurationError(f"{vault.SETTING} is not set", param="secret_keys")
    changed = 0
    for table, key, name in COLUMNS:
        after = ""
        while rows := _page(database, _of(table), key, name, keys.seals_as, after):
            after = rows[-1][0]
            values = [
                {"row_key": row_key, "old": stored, "new": keys.seal(keys.unseal(stored))}
                for row_key, stored in rows
            ]
            with database.write() as session:
                for value in values:
                    changed += len(session.execute(_replace(_of(table), key, name), value).all())
    return changed


def _of(table: type[Any]) -> Table:
    return cast(Table, table.__table__)


def _page(
    database: Database, table: Table, key: str, name: str, seals_as: str, after: str
) -> Sequence[tuple[str, str]]:
    column = table.c[name]
    statement = (
        select(table.c[key], column)
        .where(
            table.c[key] > after,
            column.is_not(None),
            ~column.startswith(f"{vault.PREFIX}:{seals_as}:"),
        )
        .order_by(table.c[key])
        .limit(BATCH)
    )
    with database.read() as session:
        return [(row[0], row[1]) for row in session.execute(statement)]


def _replace(table: Table, key: str, name: str) -> Update:
    return (
        update(table)
        .where(table.c[key] == bindparam("row_key"), table.c[name] == bindparam("old"))
        .values({name: bindparam("new")})
        .returning(table.c[key])
    )
