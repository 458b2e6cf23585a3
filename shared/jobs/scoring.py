"""`/v1/loglikelihood`: how likely a text is after another. Its body, checked; and its answer. Pure.

`monte_carlo` is LLaDA's own estimate, with its standard error; `chain_rule` scores the tokens from
left to right, each with all that follow masked. What they mean is in `worker.engine.likelihood`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shared import checks
from shared.algorithms import BLOCK, CHAIN_RULE, FULL, MONTE_CARLO
from shared.diffusion_params import DiffusionParams
from shared.errors import InvalidParameter, MissingParameter, PromptTooLong, UnknownParameter
from shared.jobs.fields import labels_of, model_of, opened
from shared.jobs.requests import Resolved, prompt_of, refuse_without_text
from shared.jobs.responses import LOGLIKELIHOOD, response_id, usage_of
from shared.jobs.tasks import ScoreTask
from shared.model_card import ModelCard
from shared.prompt_ids import PARSE_SPECIAL, parse_special_of, prompt_ids
from shared.sampling_params import SamplingParams
from shared.tokenizer import TokenizerWrapper

FIELDS = (
    "model",
    "context",
    "continuation",
    "pairs",
    "method",
    "mc_num",
    "seed",
    "cfg_scale",
    PARSE_SPECIAL,
)
METHODS = (MONTE_CARLO, CHAIN_RULE)
MAX_PAIRS = 128
DEFAULT_MC_NUM, MAX_MC_NUM = 128, 1024
MAX_CFG = 100.0

Text = str | list[int]


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """Pairs to score. `paths` name the fields that a pair came from."""

    endpoint: str
    model: str
    pairs: tuple[tuple[Text, Text], ...]
    paths: tuple[tuple[str, str], ...]
    metadata: dict[str, str]
    method: str | None = None
    mc_num: int | None = None
    seed: int | None = None
    cfg_scale: float = 0.0
    stream: bool = False
    include_usage: bool = False
    parse_special: bool | None = None

    @property
    def characters(self) -> int:
        return sum(len(text) for pair in self.pairs for text in pair if isinstance(text, str))

    def resolve(self, card: ModelCard, tokenizer: TokenizerWrapper) -> Resolved:
        """Raises InvalidParameter, PromptTooLong."""
        method = self._method(card)
        ids: list[int] = []
        sizes = []
        for pair, paths in zip(self.pairs, self.paths, strict=True):
            context, target = (
                self.tokens(text, path, card, tokenizer)
                for text, path in zip(pair, paths, strict=True)
            )
            if len(context) + len(target) > card.context_length:
                message = f"{len(context)} and {len(target)} tokens exceed the context of {card.name}, {card.context_length}"
                raise PromptTooLong(message, param=paths[1])
            ids += [*context, *target]
            sizes.append((len(context), len(target)))
        monte_carlo = method == MONTE_CARLO
        mc_num = (self.mc_num or DEFAULT_MC_NUM) if monte_carlo else 1
        task = ScoreTask(method, tuple(sizes), mc_num, self.cfg_scale)
        # The method stands where other jobs have their algorithm, so that metrics and the job
        # object tell it.
        diffusion = DiffusionParams(algorithm=method, cache="none", cfg_scale=self.cfg_scale)
        scored = sum(target for _, target in sizes)
        seed = self.seed if monte_carlo else 0  # the chain rule draws nothing
        params = SamplingParams(max_tokens=scored, temperature=0.0, seed=seed, diffusion=diffusion)
        return Resolved(ids, params, len(ids), task)

    def tokens(
        self, text: Text, path: str, card: ModelCard, tokenizer: TokenizerWrapper
    ) -> list[int]:
        """Return the token ids of a text, at least one. Raises InvalidParameter."""
        ids = prompt_ids(text, path, card, tokenizer, parse_special=self.parse_special)
        if not ids:
            raise InvalidParameter(f"{path} is empty", param=path)
        return ids

    def _method(self, card: ModelCard) -> str:
        method = self.method or (MONTE_CARLO if card.regime == FULL else CHAIN_RULE)
        if method == MONTE_CARLO and card.regime == BLOCK:
            message = f"method {MONTE_CARLO} needs full attention; {card.name} is block-causal and has {CHAIN_RULE}"
            raise InvalidParameter(message, param="method")
        for name in ("mc_num", "seed"):
            if method == CHAIN_RULE and getattr(self, name) is not None:
                raise InvalidParameter(
                    f"{name} has no effect with {CHAIN_RULE}, which draws nothing", param=name
                )
        return method


def parse(body: Any) -> ScoreRequest:
    """Raises InvalidParameter, UnknownParameter, MissingParameter."""
    given = opened(LOGLIKELIHOOD, body, FIELDS)
    model, labels = model_of(given), labels_of(given)
    pairs, paths = _pairs(given)
    method = given.get("method")
    if method is not None and method not in METHODS:
        raise InvalidParameter(f"method must be {' or '.join(METHODS)}", param="method")
    parse_special = checked_parse_special(given, pairs)
    mc_num, seed, cfg = given.get("mc_num"), given.get("seed"), given.get("cfg_scale", 0.0)
    return ScoreRequest(
        LOGLIKELIHOOD,
        model,
        pairs,
        paths,
        labels,
        method=method,
        mc_num=None if mc_num is None else checks.integer(mc_num, "mc_num", 1, MAX_MC_NUM),
        seed=None if seed is None else checks.integer(seed, "seed", -(2**63), 2**63 - 1),
        cfg_scale=checks.number(cfg, "cfg_scale", 0.0, MAX_CFG),
        parse_special=parse_special,
    )


def checked_parse_special(
    given: Mapping[str, Any], pairs: Sequence[tuple[Text, Text]]
) -> bool | None:
    """Return the request's `parse_special`. Raises InvalidParameter: it has no effect on these
    texts.
    """
    value = parse_special_of(given)
    if value is False and not any(isinstance(text, str) for pair in pairs for text in pair):
        refuse_without_text()
    return value


def _pairs(
    given: Mapping[str, Any],
) -> tuple[tuple[tuple[Text, Text], ...], tuple[tuple[str, str], ...]]:
    """The pairs with the names of their fields: one in the body itself, or a list under `pairs`."""
    if "pairs" not in given:
        return (_pair(given, ""),), (("context", "continuation"),)
    for name in ("context", "continuation"):
        if name in given:
            raise InvalidParameter(
                f"give pairs, or context and continuation; not {name} too", param=name
            )
    value = given["pairs"]
    if not isinstance(value, list) or not 1 <= len(value) <= MAX_PAIRS:
        raise InvalidParameter(f"pairs must be a list of 1 to {MAX_PAIRS} pairs", param="pairs")
    made, paths = [], []
    for i, pair in enumerate(value):
        at = f"pairs[{i}]"
        if not isinstance(pair, dict):
            raise InvalidParameter(f"{at} must be an object of context and continuation", param=at)
        for name, value in pair.items():
            if name not in ("context", "continuation") and value is not None:
                raise UnknownParameter(
                    f"{at}.{name[:80]} is not a field of a pair", param=f"{at}.{name[:80]}"
                )
        made.append(_pair(pair, f"{at}."))
        paths.append((f"{at}.context", f"{at}.continuation"))
    return tuple(made), tuple(paths)


def _pair(given: Mapping[str, Any], prefix: str) -> tuple[Text, Text]:
    texts = []
    for name in ("context", "continuation"):
        if given.get(name) is None:
            raise MissingParameter(f"{prefix}{name} is required", param=f"{prefix}{name}")
        text, ids = prompt_of(given[name], f"{prefix}{name}")
        texts.append(text if text is not None else ids or [])
    return texts[0], texts[1]


@dataclass(frozen=True, slots=True)
class Score:
    """The score of one pair; natural logarithms."""

    value: float
    standard_error: float
    token_logprobs: list[float] | None
    greedy: bool | None


def build_result(
    *,
    job_id: str,
    model: str,
    created: int,
    task: ScoreTask,
    scores: Sequence[Score],
    extras: Mapping[str, Any],
) -> dict[str, Any]:
    """The response object. One draw has no standard error; whether a text is greedy only the chain
    rule knows.
    """
    data = [
        {
            "index": i,
            "loglikelihood": score.value,
            "standard_error": score.standard_error if math.isfinite(score.standard_error) else None,
            "tokens": target,
            "is_greedy": score.greedy,
            "token_logprobs": score.token_logprobs,
        }
        for i, (score, (_, target)) in enumerate(zip(scores, task.pairs, strict=True))
    ]
    how = {"method": task.method, "mc_num": task.mc_num if task.method == MONTE_CARLO else None}
    return {
        "id": response_id(LOGLIKELIHOOD, job_id),
        "object": "loglikelihood",
        "created": created,
        "model": model,
        "data": data,
        "usage": usage_of(sum(a + b for a, b in task.pairs), 0),
        "vdiff": {**extras, **how},
    }
