"""What a request asks of the sampler, and the one place that decides whether it may.

`resolve_params` turns the generation fields of a request body into `SamplingParams`, for the API, for `vdiff generate`
and for the Python API alike: request over the model's generation_config over the defaults here. Nothing is accepted and
ignored: a field that the chosen algorithm does not use is an error that says so. No torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from shared.errors import InvalidParameter, PromptTooLong, UnknownParameter
from shared.model_card import ModelCard

DEFAULT_BLOCK_LENGTH = 32
DEFAULT_CHAT_TOKENS = 256
DEFAULT_COMPLETION_TOKENS = 16
MAX_N = 16
MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_FACTOR = 64.0

GENERATION_FIELDS = (
    "n", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "ignore_eos", "stop_token_ids", "logprobs",
    "diffusion",
)  # fmt: skip
DIFFUSION_FIELDS = (
    "algorithm", "steps", "block_length", "threshold", "factor", "cache", "cfg_scale", "suppress_end",
    "suppress_token_ids", "visualize",
)  # fmt: skip
# Which of the rules' own parameters each rule reads; everything else is shared by all of them.
RULE_PARAMETERS: dict[str, tuple[str, ...]] = {
    "low_confidence": ("steps",),
    "random": ("steps",),
    "threshold": ("threshold",),
    "factor": ("factor",),
}
_OWN = ("steps", "threshold", "factor")
CACHES = ("none",)


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """How the canvas is denoised. None means: not used by the algorithm, or decided by max_tokens (block_length, steps)."""

    algorithm: str = "low_confidence"
    steps: int | None = None  # of the whole answer; None: one token per step
    block_length: int | None = None  # tokens; None: DEFAULT_BLOCK_LENGTH, at most max_tokens
    threshold: float = 0.9
    factor: float = 1.0
    cache: str = "none"
    cfg_scale: float = 0.0
    suppress_end: str | None = None  # "logits" or "confidence"
    suppress_token_ids: tuple[int, ...] | None = None
    visualize: bool = False


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
    diffusion: DiffusionParams = field(default_factory=DiffusionParams)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplingParams:
        diffusion = dict(data.get("diffusion") or {})
        if diffusion.get("suppress_token_ids") is not None:
            diffusion["suppress_token_ids"] = tuple(diffusion["suppress_token_ids"])
        values = {k: v for k, v in data.items() if k != "diffusion"}
        for name in ("stop", "stop_token_ids"):
            if name in values:
                values[name] = tuple(values[name])
        return cls(**values, diffusion=DiffusionParams(**diffusion))

    def blocks(self) -> tuple[int, ...]:
        """Lengths of the blocks that the answer is decoded in, left to right; they add up to max_tokens."""
        length = min(self.diffusion.block_length or DEFAULT_BLOCK_LENGTH, self.max_tokens)
        full, rest = divmod(self.max_tokens, length)
        return (length,) * full + ((rest,) if rest else ())

    def with_seed(self, seed: int) -> SamplingParams:
        return replace(self, seed=seed)


def shown_diffusion(params: Mapping[str, Any]) -> dict[str, Any]:
    """The diffusion parameters of `SamplingParams.to_json()` that had a meaning: set, and read by the algorithm."""
    diffusion = params.get("diffusion", {})
    own = RULE_PARAMETERS.get(diffusion.get("algorithm", ""), ())
    return {k: v for k, v in diffusion.items() if v is not None and (k not in _OWN or k in own)}


def _integer(value: Any, param: str, low: int, high: int | None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidParameter(f"{param} must be an integer", param=param)
    if value < low or (high is not None and value > high):
        bounds = f"from {low} to {high}" if high is not None else f"at least {low}"
        raise InvalidParameter(f"{param} must be {bounds}, not {value}", param=param)
    return value


def _number(value: Any, param: str, low: float, high: float, *, open_low: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidParameter(f"{param} must be a number", param=param)
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number > high or number < low or (open_low and number == low):
        bounds = f"{'above' if open_low else 'from'} {low:g} {'and at most' if open_low else 'to'} {high:g}"
        raise InvalidParameter(f"{param} must be {bounds}", param=param)
    return number


def _flag(value: Any, param: str) -> bool:
    if not isinstance(value, bool):
        raise InvalidParameter(f"{param} must be true or false", param=param)
    return value


def _choice(value: Any, param: str, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise InvalidParameter(f"{param} must be one of {', '.join(choices)}, not {str(value)[:80]!r}", param=param)
    return value


def _token_ids(value: Any, param: str, vocab_size: int) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > 256:
        raise InvalidParameter(f"{param} must be a list of at most 256 token ids", param=param)
    return tuple(_integer(v, f"{param}[{i}]", 0, vocab_size - 1) for i, v in enumerate(value))


def _stops(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list | tuple) or any(not isinstance(v, str) for v in values):
        raise InvalidParameter("stop must be a string or a list of strings", param="stop")
    if len(values) > MAX_STOPS:
        raise InvalidParameter(f"stop takes at most {MAX_STOPS} strings, not {len(values)}", param="stop")
    if any(not 1 <= len(v) <= MAX_STOP_LENGTH for v in values):
        raise InvalidParameter(f"each stop string must have 1 to {MAX_STOP_LENGTH} characters", param="stop")
    return tuple(values)


def _known(fields: Mapping[str, Any], allowed: tuple[str, ...], prefix: str) -> dict[str, Any]:
    for name in fields:
        if name not in allowed:
            param = f"{prefix}{str(name)[:80]}"
            raise UnknownParameter(f"{param} is not supported; known here: {', '.join(allowed)}", param=param)
    return {k: v for k, v in fields.items() if v is not None}


def _max_tokens(given: dict[str, Any], card: ModelCard, prompt_tokens: int, chat: bool) -> int:
    room = card.context_length - prompt_tokens
    where = "messages" if chat else "prompt"
    if room < 1:
        raise PromptTooLong(
            f"{where} has {prompt_tokens} tokens; the context of {card.name} is {card.context_length}, answer included",
            param=where,
        )
    if "max_tokens" in given:
        wanted = _integer(given["max_tokens"], "max_tokens", 1, None)
        if wanted > room:
            message = (
                f"max_tokens {wanted} and {prompt_tokens} prompt tokens exceed the context of {card.context_length}"
            )
            raise InvalidParameter(message, param="max_tokens")
        return wanted
    fallback = DEFAULT_CHAT_TOKENS if chat else DEFAULT_COMPLETION_TOKENS
    return min(int(card.defaults.get("max_tokens", fallback)), room)


def _diffusion(given: dict[str, Any], card: ModelCard, max_tokens: int) -> DiffusionParams:
    defaults: dict[str, Any] = dict(card.defaults.get("diffusion", {}))
    algorithms = tuple(card.capabilities["algorithms"])
    caches = tuple(card.capabilities.get("caches", CACHES))
    algorithm = _choice(
        given.get("algorithm", defaults.get("algorithm", "low_confidence")), "diffusion.algorithm", algorithms
    )
    for name in _OWN:
        if name in given and name not in RULE_PARAMETERS[algorithm]:
            param = f"diffusion.{name}"
            users = ", ".join(rule for rule, names in RULE_PARAMETERS.items() if name in names)
            raise InvalidParameter(f"{param} has no effect with {algorithm}; it belongs to {users}", param=param)
    values: dict[str, Any] = {"algorithm": algorithm}
    if "block_length" in given:
        length = _integer(given["block_length"], "diffusion.block_length", 1, None)
        if length > max_tokens or max_tokens % length:
            message = f"diffusion.block_length {length} does not divide max_tokens {max_tokens}"
            raise InvalidParameter(message, param="diffusion.block_length")
    else:
        length = min(int(defaults.get("block_length", DEFAULT_BLOCK_LENGTH)), max_tokens)
    values["block_length"] = length
    blocks = -(-max_tokens // length)
    if "steps" in given:
        steps = _integer(given["steps"], "diffusion.steps", 1, 1_000_000)
        if steps % blocks:
            message = f"diffusion.steps {steps} is no multiple of the number of blocks, {blocks}"
            raise InvalidParameter(message, param="diffusion.steps")
        values["steps"] = steps
    elif "steps" in RULE_PARAMETERS[algorithm] and "steps" in defaults:
        # A server's default never fails: at least one step a block, at most one step a token.
        values["steps"] = max(1, min(int(defaults["steps"]), max_tokens) // blocks) * blocks
    for name, high in (("threshold", 1.0), ("factor", MAX_FACTOR)):
        value = given.get(name, defaults.get(name) if name in RULE_PARAMETERS[algorithm] else None)
        if value is not None:
            values[name] = _number(value, f"diffusion.{name}", 0.0, high, open_low=True)
    values["cache"] = _choice(given.get("cache", "none"), "diffusion.cache", caches)
    values["cfg_scale"] = _number(
        given.get("cfg_scale", defaults.get("cfg_scale", 0.0)), "diffusion.cfg_scale", 0.0, 100.0
    )
    if "suppress_end" in given:
        values["suppress_end"] = _choice(given["suppress_end"], "diffusion.suppress_end", ("logits", "confidence"))
    if "suppress_token_ids" in given:
        if "suppress_end" not in values:
            message = "diffusion.suppress_token_ids has no effect without diffusion.suppress_end"
            raise InvalidParameter(message, param="diffusion.suppress_token_ids")
        ids = _token_ids(given["suppress_token_ids"], "diffusion.suppress_token_ids", card.vocab_size)
        values["suppress_token_ids"] = ids
    elif "suppress_end" in values:
        values["suppress_token_ids"] = tuple(card.suppress_token_ids[values["suppress_end"]])
    if "visualize" in given:
        values["visualize"] = _flag(given["visualize"], "diffusion.visualize")
    return DiffusionParams(**values)


def resolve_params(
    fields: Mapping[str, Any], *, card: ModelCard, prompt_tokens: int, chat: bool = False
) -> SamplingParams:
    """The parameters of one request, complete and checked against the model.

    Args:
        fields: the generation fields of the body (`GENERATION_FIELDS`); null means absent.
        card: the model that will run it.
        prompt_tokens: length of the prompt, tokens.
        chat: whether the prompt came as messages (decides the default of max_tokens and the name in errors).

    Raises:
        UnknownParameter, InvalidParameter, PromptTooLong: with the field's full name in `param`.
    """
    given = _known(fields, GENERATION_FIELDS, "")
    if "logprobs" in given and given["logprobs"] is not False:
        raise InvalidParameter("logprobs are not served yet", param="logprobs")
    values: dict[str, Any] = {"max_tokens": _max_tokens(given, card, prompt_tokens, chat)}
    defaults = card.defaults
    values["n"] = _integer(given.get("n", 1), "n", 1, MAX_N)
    values["temperature"] = _number(given.get("temperature", defaults.get("temperature", 1.0)), "temperature", 0.0, 2.0)
    values["top_p"] = _number(given.get("top_p", defaults.get("top_p", 1.0)), "top_p", 0.0, 1.0, open_low=True)
    top_k = _integer(given.get("top_k", defaults.get("top_k", -1)), "top_k", -1, None)
    if top_k == 0:
        raise InvalidParameter("top_k must be -1 (off) or at least 1", param="top_k")
    values["top_k"] = top_k
    if "stop" in given:
        values["stop"] = _stops(given["stop"])
    if "seed" in given:
        values["seed"] = _integer(given["seed"], "seed", -(2**63), 2**63 - 1)
    if "ignore_eos" in given:
        values["ignore_eos"] = _flag(given["ignore_eos"], "ignore_eos")
    if "stop_token_ids" in given:
        values["stop_token_ids"] = _token_ids(given["stop_token_ids"], "stop_token_ids", card.vocab_size)
    diffusion = given.get("diffusion", {})
    if not isinstance(diffusion, Mapping):
        raise InvalidParameter("diffusion must be an object", param="diffusion")
    values["diffusion"] = _diffusion(_known(diffusion, DIFFUSION_FIELDS, "diffusion."), card, values["max_tokens"])
    return SamplingParams(**values)
