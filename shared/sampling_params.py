"""Sampling parameters of a request, and the checks that accept or refuse them.

`resolve_params` turns the generation fields of a request body into `SamplingParams`, for the API,
for `vdiff generate` and for the Python API alike: request over the model's generation_config over
the defaults here. Nothing is accepted and ignored: a field that the chosen algorithm does not use
is an error that says so. No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shared import checks
from shared.algorithms import UNIFORM
from shared.diffusion_params import DIFFUSION_FIELDS, DiffusionParams, decide, own_defaults
from shared.errors import InvalidParameter, PromptTooLong
from shared.logit_bias import Bias, logit_bias_of
from shared.model_card import ModelCard
from shared.response_format import check_beside, response_format_of, with_order

DEFAULT_CHAT_TOKENS = 256
DEFAULT_COMPLETION_TOKENS = 16
MAX_N = 16
MAX_STOPS = 16  # OpenAI takes 4; the few-shot tasks of lm-eval send more
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20

GENERATION_FIELDS = (
    "n",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "stop",
    "seed",
    "ignore_eos",
    "stop_token_ids",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "response_format",
    "diffusion",
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Parameters of one request; the names are vLLM's."""

    n: int = 1
    max_tokens: int = DEFAULT_COMPLETION_TOKENS
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    stop: tuple[str, ...] = ()
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: tuple[int, ...] = ()
    logprobs: int | None = (
        None  # how many alternatives beside the chosen token; None: no log-probabilities
    )
    logit_bias: Bias = ()  # (token id, -100 to 100) each
    response_format: dict[str, Any] | None = None  # OpenAI's object; None: plain text
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplingParams:
        """From `to_json`, or a job's `params`, which may hold a task beside (`shared.jobs.tasks`)."""
        diffusion = dict(data.get("diffusion") or {})
        for name in ("suppress_token_ids", "draft_token_ids"):
            if diffusion.get(name) is not None:
                diffusion[name] = tuple(diffusion[name])
        values = {k: v for k, v in data.items() if k not in ("diffusion", "task")}
        for name in ("stop", "stop_token_ids"):
            if name in values:
                values[name] = tuple(values[name])
        values["logit_bias"] = tuple(
            (token, number) for token, number in values.get("logit_bias", ())
        )
        return cls(**values, diffusion=DiffusionParams(**diffusion))

    def completed(self, card: ModelCard) -> SamplingParams:
        """The same with every diffusion parameter decided for this model, as `resolve_params`
        leaves them.

        For parameters made in Python: the model's generation_config does not count here, only what
        is written.

        Raises:
            InvalidParameter: with the field's full name.
        """
        if self.max_tokens < 1:
            raise InvalidParameter("max_tokens must be at least 1", param="max_tokens")
        _no_mask(self.stop_token_ids, card)
        given, wanted = (
            self.diffusion.fields(),
            self.response_format and response_format_of(self.response_format),
        )
        if wanted is not None:
            given = with_order(given, card)
        diffusion = decide(given, card, self.max_tokens, defaults={}, lenient=True)
        bias = logit_bias_of(self.logit_bias, card)
        made = replace(self, logit_bias=bias, response_format=wanted, diffusion=diffusion)
        if wanted is not None:
            check_beside(made)
        return made

    def with_seed(self, seed: int) -> SamplingParams:
        return replace(self, seed=seed)


def changes_nothing(given: Mapping[str, Any], name: str, off: int) -> bool:
    """Return whether a field is absent or has the value that turns it off."""
    value = given.get(name)
    return value is None or (type(value) in (int, float) and value == off)


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if isinstance(values, list | tuple):
        values = [v for v in values if v != ""]  # an empty string stops nothing
    if not isinstance(values, list | tuple) or any(not isinstance(v, str) for v in values):
        raise InvalidParameter("stop must be a string or a list of strings", param="stop")
    if len(values) > MAX_STOPS:
        raise InvalidParameter(
            f"stop takes at most {MAX_STOPS} strings, not {len(values)}", param="stop"
        )
    if any(not 1 <= len(v) <= MAX_STOP_LENGTH for v in values):
        raise InvalidParameter(
            f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop"
        )
    return tuple(values)


def _max_tokens(given: dict[str, Any], card: ModelCard, prompt_tokens: int, chat: bool) -> int:
    room = card.context_length - prompt_tokens
    where = "messages" if chat else "prompt"
    if room < 1:
        raise PromptTooLong(
            f"{where} has {prompt_tokens} tokens; the context of {card.name} is {card.context_length}, answer included",
            param=where,
        )
    if "max_tokens" in given:
        wanted = checks.integer(given["max_tokens"], "max_tokens", 1, checks.MOST)
        if wanted > room:
            message = f"max_tokens {wanted} and {prompt_tokens} prompt tokens exceed the context of {card.context_length}"
            raise InvalidParameter(message, param="max_tokens")
        return wanted
    fallback = DEFAULT_CHAT_TOKENS if chat else DEFAULT_COMPLETION_TOKENS
    return min(int(card.defaults.get("max_tokens", fallback)), room)


def _logprobs(given: Mapping[str, Any], chat: bool) -> int | None:
    """OpenAI's two spellings: chat has `logprobs: true` and `top_logprobs: k`, completions have
    `logprobs: k`.
    """
    if not chat:
        if not changes_nothing(given, "top_logprobs", 0):
            raise InvalidParameter(
                "top_logprobs belongs to chat; here logprobs is a number", param="top_logprobs"
            )
        value = given.get("logprobs", False)
        return None if value is False else checks.integer(value, "logprobs", 0, MAX_LOGPROBS)
    wanted = checks.flag(given.get("logprobs", False), "logprobs")
    if not wanted and not changes_nothing(given, "top_logprobs", 0):
        raise InvalidParameter(
            "top_logprobs has no effect without logprobs: true", param="top_logprobs"
        )
    return (
        checks.integer(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_LOGPROBS)
        if wanted
        else None
    )


def _no_mask(stop_token_ids: tuple[int, ...], card: ModelCard) -> None:
    if card.mask_token_id in stop_token_ids:
        message = f"stop_token_ids must not hold the mask token, {card.mask_token_id}: no answer ever does"
        raise InvalidParameter(message, param="stop_token_ids")


def resolve_params(
    fields: Mapping[str, Any], *, card: ModelCard, prompt_tokens: int, chat: bool = False
) -> SamplingParams:
    """The parameters of one request, complete and checked against the model.

    Args:
        fields: the generation fields of the body (`GENERATION_FIELDS`); null means absent.
        card: the model that will run it.
        prompt_tokens: length of the prompt, tokens.
        chat: whether the prompt came as messages (decides the default of max_tokens and the name in
            errors).

    Raises:
        UnknownParameter, InvalidParameter, PromptTooLong: with the field's full name in `param`.
    """
    given = checks.known(fields, GENERATION_FIELDS, "")
    values: dict[str, Any] = {"max_tokens": _max_tokens(given, card, prompt_tokens, chat)}
    defaults = card.defaults
    values["logprobs"] = _logprobs(given, chat)
    values["n"] = checks.integer(given.get("n", 1), "n", 1, MAX_N)
    values["temperature"] = checks.number(
        given.get("temperature", defaults.get("temperature", 1.0)), "temperature", 0.0, 2.0
    )
    # The model's own top_p and top_k are part of its sampling recipe; who asks for temperature 0
    # does not sample.
    recipe = defaults if values["temperature"] > 0 else {}
    values["top_p"] = checks.number(given.get("top_p", recipe.get("top_p", 1.0)), "top_p", 0.0, 1.0)
    values["top_k"] = (
        checks.integer(given.get("top_k", recipe.get("top_k", -1)), "top_k", -1, checks.MOST) or -1
    )  # 0 is off too
    if "stop" in given:
        values["stop"] = _stops(given["stop"])
    if "seed" in given:
        values["seed"] = checks.integer(given["seed"], "seed", -(2**63), 2**63 - 1)
    if "ignore_eos" in given:
        values["ignore_eos"] = checks.flag(given["ignore_eos"], "ignore_eos")
    if "stop_token_ids" in given:
        values["stop_token_ids"] = checks.token_ids(
            given["stop_token_ids"], "stop_token_ids", card.vocab_size
        )
        _no_mask(values["stop_token_ids"], card)
    if "logit_bias" in given:
        values["logit_bias"] = logit_bias_of(given["logit_bias"], card)
    diffusion = given.get("diffusion", {})
    if not isinstance(diffusion, Mapping):
        raise InvalidParameter("diffusion must be an object", param="diffusion")
    known = checks.known(diffusion, DIFFUSION_FIELDS, "diffusion.")
    values["response_format"] = response_format_of(given.get("response_format", {"type": "text"}))
    if values["response_format"] is not None:
        known = with_order(known, card)
    values["diffusion"] = decide(
        known, card, values["max_tokens"], defaults=own_defaults(known, card)
    )
    if card.regime == UNIFORM:
        # Its draws follow t_min..t_max over whole canvases; temperature scales that, and nothing
        # filters it.
        for name, off in (("top_p", 1.0), ("top_k", -1), ("logprobs", None)):
            if values[name] != off:
                raise InvalidParameter(
                    f"{name} has no effect on {card.name}; leave it out", param=name
                )
    made = SamplingParams(**values)
    if made.response_format is not None:
        check_beside(made)
    return made
