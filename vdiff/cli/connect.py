"""Shared parts of commands that talk to a server: options, a client that fails at once without a
server, prompts and parameters.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shared.checks import MOST
from shared.errors import InvalidParameter
from shared.settings import TEN_YEARS
from shared.text_files import decode_text
from vdiff.cli.output import aside

if TYPE_CHECKING:
    from vdiff.client import Client

BaseUrl = Annotated[
    str | None,
    typer.Option(
        help="the server [default: VDIFF_BASE_URL, else a `vdiff up` of this folder, else http://127.0.0.1:8000]"
    ),
]
Key = Annotated[
    str | None,
    typer.Option("--api-key", help="[default: VDIFF_API_KEY, which keeps it out of `ps`]"),
]
ModelName = Annotated[
    str | None, typer.Option("--model", help="[default: the server's, if it has only one]")
]
MaxTokens = Annotated[int | None, typer.Option(min=1, max=MOST, help="longest answer, tokens")]
Temperature = Annotated[
    float | None, typer.Option(min=0, max=2, help="0 takes the likeliest token")
]
Seed = Annotated[
    int | None,
    typer.Option(
        min=-(2**63), max=2**63 - 1, help="the same request with the same seed gives the same text"
    ),
]
Algorithm = Annotated[
    str | None, typer.Option(help="unmasking rule, or apd; `vdiff models` lists them")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="any other field of the request, repeatable: diffusion.threshold=0.9",
    ),
]
Metadata = Annotated[
    list[str] | None,
    typer.Option("--metadata", metavar="KEY=VALUE", help="label, repeatable; lists filter by it"),
]
SAID_FROM_SECONDS = 1.0  # a wait that is shorter passes before it is read

Timeout = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=TEN_YEARS,
        help="seconds to wait; then exit with code 6; the job or batch continues",
    ),
]


@contextmanager
def connected(
    base_url: str | None, api_key: str | None, model: str | None = None, *, patient: bool = False
) -> Iterator[Client]:
    """A patient client of a server that answers now; it says on stderr when it waits. Raises
    ServerUnreachable at once when nobody answers, UnexpectedAnswer when somebody else does.

    Args:
        patient: for much work: a limit or a server that is away is waited for as long as
            `Client.map` does.
    """
    from vdiff.client import ApiError, Client, UnexpectedAnswer
    from vdiff.client.connection import MAP_RETRY_SECONDS, RETRY_SECONDS

    with Client(base_url, api_key, retry_seconds=0) as probe:
        try:
            probe.server_version()
        except UnexpectedAnswer as exc:
            raise UnexpectedAnswer(f"that is not a vdiff server: {exc.message}") from exc
        except ApiError as exc:
            if exc.code is None and exc.status in (
                400,
                404,
                405,
            ):  # every vdiff server has a /version
                raise UnexpectedAnswer(f"that is not a vdiff server: {exc.message}") from exc
            raise
    seconds = MAP_RETRY_SECONDS if patient else RETRY_SECONDS
    with Client(base_url, api_key, model=model, retry_seconds=seconds, on_wait=Waits()) as client:
        yield client


class Waits:
    """Says why nothing happens, once for all who wait at the same time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._until = 0.0

    def __call__(self, seconds: float, why: str) -> None:
        with self._lock:
            now = monotonic()
            if seconds < SAID_FROM_SECONDS or now < self._until:
                return
            self._until = now + seconds
        aside(f"waiting {seconds:.0f} s: {why}")


def pairs(values: list[str] | None, option: str) -> dict[str, str]:
    """KEY=VALUE, each. Raises InvalidParameter."""
    found = {}
    for value in values or ():
        name, sign, said = value.partition("=")
        if not sign or not name:
            raise InvalidParameter(f"{option} takes NAME=VALUE, not {value!r}", param=option)
        found[name] = said
    return found


def fields_of(
    given: list[str] | None,
    *,
    max_tokens: int | None,
    temperature: float | None,
    seed: int | None,
    algorithm: str | None,
) -> dict[str, Any]:
    """The body's fields that options and `--set` name; a value is JSON where it can be, else text;
    a dot goes inside.
    """
    fields: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature, "seed": seed}
    fields = {name: value for name, value in fields.items() if value is not None}
    named = pairs(given, "--set")
    if algorithm is not None:
        named = {"diffusion.algorithm": json.dumps(algorithm), **named}
    for name, text in named.items():
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *path, last = name.split(".")
        if not all((*path, last)):
            raise InvalidParameter(f"--set takes NAME=VALUE, not {name!r}=", param="--set")
        inside = fields
        for part in path:
            inside = inside.setdefault(part, {})
            if not isinstance(inside, dict):
                raise InvalidParameter(f"--set {name}: {part} is no object", param="--set")
        inside[last] = value
    return fields


def require_writable(output: Path | None) -> None:
    """Before answers are paid for that could not be kept. Raises InvalidParameter."""
    if output is None:
        return
    try:
        with output.open("a", encoding="utf-8"):
            pass
    except OSError as exc:
        raise InvalidParameter(f"{output}: {exc.strerror}", param="--output") from exc


def read_stdin() -> str:
    """Read all of stdin as one text. Raises NotUTF8."""
    return decode_text(sys.stdin.buffer.read(), "stdin", param="prompt")


def prompts_of(file: Path) -> list[Any]:
    """Read a prompt a line: text, or in a .jsonl a string, a list of messages or a whole body.

    Raises:
        InvalidParameter: the file cannot be read, or a line is none.
        NotUTF8: it is in another encoding.
    """
    try:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as exc:
        raise InvalidParameter(f"{file}: {exc.strerror}", param="--file") from exc
    text = decode_text(raw, "stdin" if str(file) == "-" else str(file), param="--file")
    found: list[Any] = []
    for number, line in enumerate(
        text.split("\n"), 1
    ):  # not splitlines(): U+2028 is a character of a prompt
        if not line.strip():
            continue
        if file.suffix != ".jsonl":
            found.append(line.rstrip("\r"))
            continue
        try:
            value = json.loads(line)
        except ValueError as exc:
            raise InvalidParameter(
                f"{file}, line {number}: no JSON: {exc}", param="--file"
            ) from exc
        if not isinstance(value, str | list | dict):
            raise InvalidParameter(
                f"{file}, line {number}: a text, a list or an object is wanted", param="--file"
            )
        found.append(value)
    if not found:
        raise InvalidParameter(f"{file} has no prompts", param="--file")
    return found
