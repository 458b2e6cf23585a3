"""`vdiff models`: what the server serves."""

from __future__ import annotations

import json

import typer

from vdiff.cli.connect import BaseUrl, Key, connected
from vdiff.cli.options import AsJson, examples
from vdiff.cli.output import Listing, write

app = typer.Typer()


@app.command(epilog=examples("vdiff models", "vdiff models --json | jq .id"))
def models(as_json: AsJson = False, base_url: BaseUrl = None, api_key: Key = None) -> None:
    """Models that workers registered, how many workers are up, and which algorithms and caches each
    has.
    """
    with connected(base_url, api_key) as client:
        found = client.models()
    if as_json:
        for model in found:
            typer.echo(json.dumps(model.raw))
        return
    if not found:
        write("no model yet; a worker registers its own: `vdiff worker`")
        return
    listing = Listing(
        "model",
        "workers",
        "slots",
        "context",
        "family",
        "device",
        "dtype",
        shrink=("family", "dtype"),
    )
    for model in found:
        listing.add(
            model.id,
            str(model.workers),
            str(model.slots),
            str(model.context_length),
            model.family,
            model.device,
            model.dtype,
        )
    listing.print("")
    for model in found:
        write("")
        for name in ("algorithms", "caches", "endpoints"):
            write(f"{model.id} {name}: {', '.join(model.capabilities.get(name, ()))}")
