"""Tasks of jobs beyond one answer to one prompt: fill holes, score, answer several prompts,
respond.

Frozen when the job is accepted. Stored beside the sampling parameters, as `task` in the job's
`params`, and read by the worker. The token ids are all in `prompt_token_ids`; a task says where in
them its pieces lie. A purge forgets both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shared.algorithms import CHAIN_RULE

TASK = "task"  # the key in a job's `params`


@dataclass(frozen=True, slots=True)
class InfillTask:
    """Holes in a text. `tokens` counts the tokens of each part; `prompt_token_ids` holds them all,
    masks in the holes.
    """

    parts: tuple[str | int, ...]  # fixed text, or a hole of so many tokens
    tokens: tuple[int, ...]

    def holes(self) -> list[tuple[int, int]]:
        """(begin, end) of each hole in `prompt_token_ids`."""
        found, at = [], 0
        for part, count in zip(self.parts, self.tokens, strict=True):
            if isinstance(part, int):
                found.append((at, at + count))
            at += count
        return found

    def to_json(self) -> dict[str, Any]:
        return {"kind": "infill", **asdict(self)}


@dataclass(frozen=True, slots=True)
class ScoreTask:
    """Continuations to score after their contexts, or prompts to score from their second token on
    (`echo`).
    """

    method: str
    pairs: tuple[
        tuple[int, int], ...
    ]  # tokens of each context and of its continuation, in `prompt_token_ids` in a row
    mc_num: int = 1
    cfg_scale: float = 0.0
    top: int = 0  # alternatives of each token
    echo: bool = False
    generate: bool = False  # echo: one token more after each prompt

    def pieces(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, continuation) of each pair."""
        at = 0
        for context, target in self.pairs:
            yield ids[at : at + context], ids[at + context : at + context + target]
            at += context + target

    def forwards_of(self, pair: int) -> int:
        """Noised sequences that the model computes for one pair."""
        return self.pairs[pair][1] if self.method == CHAIN_RULE else self.mc_num

    @property
    def forwards(self) -> int:
        more = len(self.pairs) if self.generate else 0
        return more + sum(self.forwards_of(i) for i in range(len(self.pairs)))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "score", **asdict(self)}


@dataclass(frozen=True, slots=True)
class PromptsTask:
    """Several prompts, each answered for itself; they stand in `prompt_token_ids` in a row."""

    tokens: tuple[int, ...]  # of each prompt

    def pieces(self, ids: list[int]) -> Iterator[list[int]]:
        at = 0
        for count in self.tokens:
            yield ids[at : at + count]
            at += count

    def to_json(self) -> dict[str, Any]:
        return {"kind": "prompts", **asdict(self)}


@dataclass(frozen=True, slots=True)
class ResponseTask:
    """An answer of the Responses API: what its object repeats of the request, and what the next
    turn goes on from.
    """

    shown: dict[str, Any]
    messages: tuple[
        tuple[str, str], ...
    ]  # role and content of all turns so far, without instructions

    def to_json(self) -> dict[str, Any]:
        return {"kind": "response", **asdict(self)}


Task = InfillTask | ScoreTask | PromptsTask | ResponseTask


def task_of(params: Mapping[str, Any]) -> Task | None:
    """The task of a job's `params`; None for one that writes an answer."""
    if params.get(TASK) is None:
        return None
    data = dict(params[TASK])
    kind = data.pop("kind")
    if kind == "infill":
        return InfillTask(tuple(data["parts"]), tuple(data["tokens"]))
    if kind == "prompts":
        return PromptsTask(tuple(data["tokens"]))
    if kind == "response":
        return ResponseTask(
            data["shown"], tuple((role, content) for role, content in data["messages"])
        )
    return ScoreTask(**{**data, "pairs": tuple((a, b) for a, b in data["pairs"])})
