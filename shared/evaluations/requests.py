"""The body of `POST /v1/evaluations` and its configurations, checked: what can be told without the
dataset. Pure.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shared import checks
from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.evaluations.grader_requests import MEMORY_MB_MAX, parse_graders
from shared.evaluations.graders import Grader
from shared.evaluations.templates import Template, parse_template
from shared.jobs.fields import metadata_of
from shared.jobs.messages import ROLES
from shared.jobs.no_ops import changes_nothing, is_nothing
from shared.jobs.responses import CHAT, COMPLETIONS
from shared.sampling_params import GENERATION_FIELDS

FIELDS = (
    "name",
    "dataset",
    "template",
    "endpoint",
    "graders",
    "configurations",
    "completion_window",
    "metadata",
)
DATASET_FIELDS = ("file_id", "bundled", "limit")
CONFIGURATION_FIELDS = ("name", "model", "seed", "seeds", "repeats")
# Of a request, and not of a configuration: what the evaluation itself decides, or what no grader
# reads.
NOT_HERE = (
    "messages",
    "prompt",
    "n",
    "stream",
    "stream_options",
    "logprobs",
    "top_logprobs",
    "metadata",
    "user",
)
MAX_CONFIGURATIONS = 50
MAX_MESSAGES = 50
MAX_NAME = 64
MAX_REPEATS = 100
MAX_SEED = checks.EXACT


def digest(value: Any) -> str:
    """Return the hash of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(
        json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def sample_seed(seed: int, item: int) -> int:
    """The seed of one answer: other items get other random numbers, every configuration gets the
    same for the same item.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{item}".encode()).digest()[:8], "big") & MAX_SEED


@dataclass(frozen=True, slots=True)
class Configuration:
    """The parameters of one set of answers; `at` is its place in the request."""

    name: str
    model: str
    fields: dict[str, Any]  # of every request: max_tokens, temperature, diffusion, ...
    seeds: tuple[int, ...]
    at: str

    def content_hash(self, revision: str | None) -> str:
        """Return the hash by which two configurations are the same; seeds are left out."""
        return digest([self.model, revision, self.fields])


@dataclass(frozen=True, slots=True)
class Prompt:
    """The template: a text, or messages."""

    endpoint: str
    messages: tuple[tuple[str, Template], ...]  # role, content; of `completions` the prompt alone
    source: Any

    def body(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Build the request body of an item. Raises MissingColumn."""
        if self.endpoint == COMPLETIONS:
            return {"prompt": self.messages[0][1].text(row)}
        return {
            "messages": [
                {"role": role, "content": content.text(row)} for role, content in self.messages
            ]
        }


@dataclass(frozen=True, slots=True)
class NewEvaluation:
    name: str
    file_id: str | None
    bundled: str | None
    limit: int | None
    prompt: Prompt
    graders: list[Grader]
    configurations: list[Configuration]
    completion_window: str
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def dataset(self) -> dict[str, Any]:
        given = {"file_id": self.file_id, "bundled": self.bundled, "limit": self.limit}
        return {name: value for name, value in given.items() if value is not None}

    def content_hash(self, keys: Sequence[str]) -> str:
        """Return the hash by which two evaluations are the same, whatever their names."""
        return digest(
            [
                list(keys),
                self.prompt.endpoint,
                self.prompt.source,
                [g.to_json() for g in self.graders],
            ]
        )


def _known(value: Any, at: str, fields: Sequence[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidParameter(f"{at or 'the body'} must be an object", param=at or "body")
    for name in value:
        if name not in fields:
            where = f"{at}.{name[:80]}" if at else name[:80]
            raise UnknownParameter(
                f"{where} is not a field here; known: {', '.join(fields)}", param=where
            )
    return {k: v for k, v in value.items() if v is not None}


def _name(value: Any, at: str) -> str:
    if (
        not isinstance(value, str)
        or not 1 <= len(value.strip()) <= MAX_NAME
        or not value.isprintable()
    ):
        raise InvalidParameter(
            f"{at} must be a printable string of 1 to {MAX_NAME} characters", param=at
        )
    return value.strip()


def parse_evaluation(
    body: Any, *, code_allowed: bool, memory_mb_max: int = MEMORY_MB_MAX
) -> NewEvaluation:
    """Raises InvalidParameter, UnknownParameter, MissingParameter."""
    given = _known(body, "", FIELDS)
    for name in ("dataset", "template", "graders", "configurations"):
        if name not in given:
            raise MissingParameter(f"{name} is required", param=name)
    dataset = _known(given["dataset"], "dataset", DATASET_FIELDS)
    if ("file_id" in dataset) == ("bundled" in dataset):
        raise InvalidParameter("dataset takes file_id or bundled, one of them", param="dataset")
    for name in ("file_id", "bundled"):
        if not isinstance(dataset.get(name, ""), str):
            raise InvalidParameter(f"dataset.{name} must be a string", param=f"dataset.{name}")
    limit = dataset.get("limit")
    if limit is not None:
        checks.integer(limit, "dataset.limit", 1, checks.MOST)
    prompt = parse_prompt(given["template"], given.get("endpoint", CHAT))
    window = given.get("completion_window", "24h")
    return NewEvaluation(
        name=_name(given.get("name", "evaluation"), "name"),
        file_id=dataset.get("file_id"),
        bundled=dataset.get("bundled"),
        limit=limit,
        prompt=prompt,
        graders=parse_graders(
            given["graders"], code_allowed=code_allowed, memory_mb_max=memory_mb_max
        ),
        configurations=parse_configurations(given["configurations"]),
        completion_window=window,
        metadata=metadata_of(given.get("metadata", {}), "metadata"),
    )


def parse_prompt(value: Any, endpoint: Any) -> Prompt:
    """`template`: a text, or for chat a list of {role, content}. Raises InvalidParameter and its
    kinds.
    """
    if endpoint not in (CHAT, COMPLETIONS):
        raise InvalidParameter(f"endpoint must be {CHAT} or {COMPLETIONS}", param="endpoint")
    if isinstance(value, str):
        if not value:
            raise InvalidParameter("template is empty", param="template")
        return Prompt(endpoint, (("user", parse_template(value, "template")),), value)
    if endpoint == COMPLETIONS:
        raise InvalidParameter(f"template must be a string for {COMPLETIONS}", param="template")
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_MESSAGES:
        message = f"template must be a string, or a list of 1 to {MAX_MESSAGES} messages"
        raise InvalidParameter(message, param="template")
    messages = []
    for i, item in enumerate(value):
        at = f"template[{i}]"
        given = _known(item, at, ("role", "content"))
        if given.get("role") not in ROLES:
            raise InvalidParameter(
                f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role"
            )
        messages.append((given["role"], parse_template(given.get("content"), f"{at}.content")))
    return Prompt(endpoint, tuple(messages), value)


def parse_configurations(value: Any, at: str = "configurations") -> list[Configuration]:
    """Raises InvalidParameter and its kinds; generation fields are checked later, against the
    model.
    """
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_CONFIGURATIONS:
        raise InvalidParameter(f"{at} must be a list of 1 to {MAX_CONFIGURATIONS}", param=at)
    made: list[Configuration] = []
    for i, item in enumerate(value):
        made.append(_configuration(item, f"{at}[{i}]"))
        if made[-1].name in (c.name for c in made[:-1]):
            raise InvalidParameter(
                f"{at}[{i}].name: there is another {made[-1].name!r}", param=f"{at}[{i}].name"
            )
    return made


def _configuration(item: Any, at: str) -> Configuration:
    if not isinstance(item, dict):
        raise InvalidParameter(f"{at} must be an object", param=at)
    given = {k: v for k, v in item.items() if v is not None}
    for name in NOT_HERE:
        if (
            name in given
            and not is_nothing(given[name])
            and not changes_nothing(name, given[name], given)
        ):
            raise UnknownParameter(
                f"{at}.{name} is not a field of a configuration", param=f"{at}.{name}"
            )
        given.pop(name, None)
    for name in [name for name in given if name not in (*CONFIGURATION_FIELDS, *GENERATION_FIELDS)]:
        if changes_nothing(
            name, given[name], given
        ):  # so that two configurations that differ in nothing are the same
            del given[name]
    for name in ("name", "model"):
        if name not in given:
            raise MissingParameter(f"{at}.{name} is required", param=f"{at}.{name}")
    if not isinstance(given["model"], str) or not 1 <= len(given["model"]) <= 200:
        raise InvalidParameter(f"{at}.model must be a non-empty string", param=f"{at}.model")
    fields = {k: v for k, v in given.items() if k not in CONFIGURATION_FIELDS}
    return Configuration(
        _name(given["name"], f"{at}.name"), given["model"], fields, _seeds(given, at), at
    )


def _seeds(given: Mapping[str, Any], at: str) -> tuple[int, ...]:
    if "seeds" in given:
        if "repeats" in given or "seed" in given:
            raise InvalidParameter(
                f"{at}: seeds says it all; repeats and seed go without", param=f"{at}.seeds"
            )
        seeds = given["seeds"]
        if not isinstance(seeds, list) or not 1 <= len(seeds) <= MAX_REPEATS:
            message = f"{at}.seeds must be a list of 1 to {MAX_REPEATS} integers"
            raise InvalidParameter(message, param=f"{at}.seeds")
        if len(set(map(str, seeds))) != len(seeds):
            raise InvalidParameter(f"{at}.seeds: one is there twice", param=f"{at}.seeds")
        return tuple(
            checks.integer(seed, f"{at}.seeds[{i}]", 0, MAX_SEED) for i, seed in enumerate(seeds)
        )
    repeats = checks.integer(given.get("repeats", 1), f"{at}.repeats", 1, MAX_REPEATS)
    first = checks.integer(given.get("seed", 0), f"{at}.seed", 0, MAX_SEED - MAX_REPEATS)
    return tuple(range(first, first + repeats))
