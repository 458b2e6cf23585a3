"""`vdiff secrets`: the keys that encrypt webhook secrets in the database."""

from __future__ import annotations

import json

import typer

from shared.vault import CLEAR, Vault, new_key, vault_of
from vdiff.cli.database import open_database, settings_of_database
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import Listing

app = typer.Typer(help="Keys that encrypt secrets in the database.", no_args_is_help=True)


def _vault() -> Vault:
    return vault_of(settings_of_database().secret_keys)


@app.command(
    "new-key",
    epilog=examples(
        "vdiff secrets new-key", "echo VDIFF_SECRET_KEYS=$(vdiff secrets new-key) >> .env"
    ),
)
def make_key() -> None:
    """Print a new key for VDIFF_SECRET_KEYS. Nothing is stored."""
    typer.echo(new_key())


@app.command("list", epilog=examples("vdiff secrets list"))
def list_keys(as_json: AsJson = False) -> None:
    """Count the stored secrets by the key that encrypts them; `clear` are those in clear."""
    from shared.webhooks import stored_secrets

    known = _vault()
    with open_database() as database, database.read() as session:
        found = {row.key_id: int(row.stored) for row in session.execute(stored_secrets.counts())}
    rows = [
        (key_id, found.get(key_id, 0)) for key_id in dict.fromkeys([*known.key_ids, *sorted(found)])
    ]
    states = {key_id: "decrypts" for key_id in known.key_ids} | {known.seals_as: "encrypts"}
    if as_json:
        shown = [
            {"key_id": k, "secrets": n, "state": states.get(k, "old" if k == CLEAR else "missing")}
            for k, n in rows
        ]
        typer.echo(json.dumps(shown))
        return
    listing = Listing("key", "secrets", "state")
    for key_id, count in rows:
        listing.add(key_id, str(count), states.get(key_id, "old" if key_id == CLEAR else "missing"))
    listing.print("no secrets")


@app.command(epilog=examples("vdiff secrets rotate"))
def rotate(as_json: AsJson = False) -> None:
    """Encrypt every stored secret with the first key of VDIFF_SECRET_KEYS, those in clear too.

    Afterwards the other keys can be removed from the setting. Safe to repeat, and while processes
    run.
    """
    from shared.webhooks import stored_secrets

    known = _vault()
    with open_database() as database:
        changed = stored_secrets.reseal(database, known)
    done = {"key_id": known.seals_as, "changed": changed}
    typer.echo(
        json.dumps(done)
        if as_json
        else f"{changed} secrets are now encrypted with the key {known.seals_as}"
    )
