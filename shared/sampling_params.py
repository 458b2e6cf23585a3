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

from shared.algorithms import (
    ALGORITHMS,
    CACHES,
    DEFAULT_ALGORITHM,
    FULL,
    PARAMETERS,
    UNIFORM,
    own_parameters,
    users_of,
)
from shared.errors import InvalidParameter, PromptTooLong, UnknownParameter
from shared.logit_bias import Bias, logit_bias_of
from shared.model_card import ModelCard
from shared.response_format import check_beside, response_format_of, with_order

DEFAULT_BLOCK_LENGTH = 32
DEFAULT_CHAT_TOKENS = 256
DEFAULT_COMPLETION_TOKENS = 16
MAX_N = 16
MAX_STOPS = 4
MAX_STOP_LENGTH = 256
MAX_LOGPROBS = 20

GENERATION_FIELDS = (
    "n", "max_tokens", "temperature", "top_p", "top_k", "stop", "seed", "ignore_eos", "stop_token_ids", "logprobs",
    "top_logprobs", "logit_bias", "response_format", "diffusion",
)  # fmt: skip
_APD = ("mixture_weight", "kv_window", "max_lookahead")  # also accepted inside `diffusion.apd`
_COMMON = (
    "algorithm", "block_length", "cache", "cfg_scale", "suppress_end", "suppress_token_ids", "visualize", "max_forwards",
    "draft_token_ids", "draft_noise",
)  # fmt: skip
DIFFUSION_FIELDS = (*_COMMON[:2], "apd", *PARAMETERS, *_COMMON[2:])


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """How the canvas is denoised. None: the algorithm's default (`shared.algorithms`), or not used by it."""

    algorithm: str | None = None
    block_length: int | None = None  # tokens
    steps: int | None = None  # of the whole answer
    denoising_steps: int | None = None  # of one block
    tokens_per_step: int | None = None
    threshold: float | None = None
    low_threshold: float | None = None
    factor: float | None = None
    gamma: float | None = None
    eps: float | None = None
    alg_temp: float | None = None
    credit_alpha: float | None = None
    edit_threshold: float | None = None
    max_post_edit_steps: int | None = None
    mixture_weight: float | None = None
    kv_window: int | None = None
    max_lookahead: int | None = None
    max_denoising_steps: int | None = None
    t_min: float | None = None
    t_max: float | None = None
    entropy_bound: float | None = None
    stability_threshold: int | None = None
    confidence_threshold: float | None = None
    cache: str | None = None
    cfg_scale: float = 0.0
    suppress_end: str | None = None  # "logits" or "confidence"
    suppress_token_ids: tuple[int, ...] | None = None
    max_forwards: int | None = None  # the answer ends after so many, with what is committed without a gap
    draft_token_ids: tuple[int, ...] | None = None  # warm start: an earlier answer
    draft_noise: float = 0.5  # the share of the draft that is masked again
    visualize: bool = False

    def fields(self) -> dict[str, Any]:
        """Those that are set, by name."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}


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
    logprobs: int | None = None  # how many alternatives beside the chosen token; None: no log-probabilities
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
        values["logit_bias"] = tuple((token, number) for token, number in values.get("logit_bias", ()))
        return cls(**values, diffusion=DiffusionParams(**diffusion))

    def completed(self, card: ModelCard) -> SamplingParams:
        """The same with every diffusion parameter decided for this model, as `resolve_params` leaves them.

        For parameters made in Python: the model's generation_config does not count here, only what is written.

        Raises:
            InvalidParameter: with the field's full name.
        """
        if self.max_tokens < 1:
            raise InvalidParameter("max_tokens must be at least 1", param="max_tokens")
        _no_mask(self.stop_token_ids, card)
        given, wanted = self.diffusion.fields(), self.response_format and response_format_of(self.response_format)
        if wanted is not None:
            given = with_order(given, card)
        diffusion = _diffusion(given, card, self.max_tokens, defaults={}, lenient=True)
        bias = logit_bias_of(self.logit_bias, card)
        made = replace(self, logit_bias=bias, response_format=wanted, diffusion=diffusion)
        if wanted is not None:
            check_beside(made)
        return made

    def with_seed(self, seed: int) -> SamplingParams:
        return replace(self, seed=seed)


def shown_diffusion(params: Mapping[str, Any]) -> dict[str, Any]:
    """The diffusion parameters of `SamplingParams.to_json()` that had a meaning."""
    shown = {k: v for k, v in params.get("diffusion", {}).items() if v is not None and v is not False}
    if shown.get("draft_token_ids") is None:
        shown.pop("draft_noise", None)
    return {k: v for k, v in shown.items() if not (k == "cfg_scale" and v == 0) and k != "draft_token_ids"}


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


def _token_ids(value: Any, param: str, vocab_size: int, *, longest: int = 256) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or len(value) > longest:
        raise InvalidParameter(f"{param} must be a list of at most {longest} token ids", param=param)
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


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """`diffusion.apd{...}` and its names written flat are the same; its errors are named `diffusion.apd.x`."""
    flat = {k: v for k, v in given.items() if k != "apd"}
    nested = given.get("apd", {})
    if not isinstance(nested, Mapping):
        raise InvalidParameter("diffusion.apd must be an object", param="diffusion.apd")
    for name, value in _known(nested, _APD, "diffusion.apd.").items():
        if flat.get(name, value) != value:
            raise InvalidParameter(f"diffusion.apd.{name} and diffusion.{name} differ", param=f"diffusion.apd.{name}")
        flat[name] = value
    return flat


def _own_value(name: str, value: Any) -> int | float:
    bounds = PARAMETERS[name]
    param = f"diffusion.apd.{name}" if name in _APD else f"diffusion.{name}"
    if bounds.integer:
        return _integer(value, param, int(bounds.low), None if bounds.high is None else int(bounds.high))
    high = math.inf if bounds.high is None else bounds.high
    return _number(value, param, bounds.low, high, open_low=bounds.open_low)


def _algorithm(given: Mapping[str, Any], card: ModelCard, defaults: Mapping[str, Any]) -> str:
    regime = card.regime
    name = given.get("algorithm", defaults.get("algorithm", DEFAULT_ALGORITHM[regime]))
    served = tuple(card.capabilities["algorithms"])
    known = ALGORITHMS.get(name) if isinstance(name, str) else None
    if known is not None and known.verifier and regime in known.regimes and name not in served:
        message = (
            f"diffusion.algorithm {name} needs a verifier; the worker of {card.name} was started without --verifier"
        )
        raise InvalidParameter(message, param="diffusion.algorithm")
    if known is not None and name not in served:
        message = f"diffusion.algorithm {name} does not fit {card.name} ({regime}); it has {', '.join(served)}"
        raise InvalidParameter(message, param="diffusion.algorithm")
    return _choice(name, "diffusion.algorithm", served)


def _block_length(
    given: Mapping[str, Any],
    card: ModelCard,
    max_tokens: int,
    defaults: Mapping[str, Any],
    windowed: bool,
    lenient: bool,
) -> int | None:
    param = "diffusion.block_length"
    if card.regime == UNIFORM:
        if "block_length" in given and given["block_length"] != card.block_length:
            raise InvalidParameter(
                f"{param} is the canvas of {card.name}, {card.block_length}; leave it out", param=param
            )
        return card.block_length
    wanted = None
    if "block_length" in given:
        wanted = _integer(given["block_length"], param, 1, None)
    if windowed:
        if wanted is not None and wanted != max_tokens:
            raise InvalidParameter(
                f"{param} has no effect here: decoding goes left to right without blocks", param=param
            )
        return max_tokens
    if card.regime == FULL:
        if wanted is None:
            length = defaults.get("block_length", card.block_length)
            return max_tokens if length is None else min(int(length), max_tokens)
        if not lenient and (wanted > max_tokens or max_tokens % wanted):
            raise InvalidParameter(f"{param} {wanted} does not divide max_tokens {max_tokens}", param=param)
        return min(wanted, max_tokens)
    if wanted is not None and wanted > card.context_length:
        raise InvalidParameter(f"{param} {wanted} is beyond the context of {card.context_length}", param=param)
    return wanted or int(defaults.get("block_length") or card.block_length or DEFAULT_BLOCK_LENGTH)


def _steps(
    values: dict[str, Any], given: Mapping[str, Any], card: ModelCard, max_tokens: int, defaults: Mapping[str, Any],
    lenient: bool,
) -> None:  # fmt: skip
    """`steps` counts the whole answer: a multiple of the blocks when explicit, adapted when it is a default."""
    if "steps" not in own_parameters(values["algorithm"], card.regime):
        return
    blocks = -(-max_tokens // values["block_length"])
    if "steps" in given:
        steps = int(_own_value("steps", given["steps"]))
        if steps % blocks and not lenient:
            message = f"diffusion.steps {steps} is no multiple of the number of blocks, {blocks}"
            raise InvalidParameter(message, param="diffusion.steps")
        values["steps"] = max(steps // blocks, 1) * blocks
    elif defaults.get("steps") is not None:
        # A server's default never fails: at least one step a block, at most one step a token.
        values["steps"] = max(1, min(int(defaults["steps"]), max_tokens) // blocks) * blocks


def _cache(given: Mapping[str, Any], card: ModelCard, algorithm: str, windowed: bool) -> str:
    caches = tuple(c for c in card.capabilities.get("caches", CACHES[card.regime]))
    param = "diffusion.cache"
    if "cache" not in given:
        return "window" if windowed and "window" in caches else caches[0]
    cache = given["cache"]
    if isinstance(cache, str) and cache not in caches and any(cache in c for c in CACHES.values()):
        raise InvalidParameter(f"{param} {cache} does not fit {card.name}; it has {', '.join(caches)}", param=param)
    cache = _choice(cache, param, caches)
    if cache == "window" and not windowed:
        message = f"{param} window needs diffusion.kv_window, with {' or '.join(users_of('kv_window', card.regime))}"
        raise InvalidParameter(message, param=param)
    if windowed and cache != "window":
        raise InvalidParameter(f"{param} {cache} contradicts diffusion.kv_window; leave one out", param=param)
    if ALGORITHMS[algorithm].verifier and cache not in ("none", "window"):
        raise InvalidParameter(f"{param} {cache} does not fit {algorithm}; it has none and window", param=param)
    return cache


def _diffusion(
    given: Mapping[str, Any], card: ModelCard, max_tokens: int, *, defaults: Mapping[str, Any], lenient: bool = False
) -> DiffusionParams:
    """Every diffusion parameter decided. `lenient`: already decided once, so adapted lengths are not errors."""
    given = _flattened(given)
    algorithm = _algorithm(given, card, defaults)
    regime, own = card.regime, own_parameters(algorithm, card.regime)
    for name in PARAMETERS:
        if name in given and name not in own:
            param = f"diffusion.{name}"
            users = ", ".join(users_of(name, regime)) or f"no algorithm of {card.name}"
            raise InvalidParameter(f"{param} has no effect with {algorithm}; it belongs to {users}", param=param)
    values: dict[str, Any] = {"algorithm": algorithm}
    windowed = given.get("kv_window") is not None
    leftward = ALGORITHMS[algorithm].verifier or windowed or given.get("max_lookahead") is not None
    values["block_length"] = _block_length(given, card, max_tokens, defaults, leftward, lenient)
    _steps(values, given, card, max_tokens, defaults, lenient)
    for name, default in own.items():
        if name == "steps":
            continue
        value = given.get(name, defaults.get(name, default))
        if value is not None:
            values[name] = _own_value(name, value)
    if "tokens_per_step" in given and "denoising_steps" in given:
        message = "give diffusion.tokens_per_step or diffusion.denoising_steps, not both"
        raise InvalidParameter(message, param="diffusion.tokens_per_step")
    if values.get("t_min", 0) > values.get("t_max", math.inf):
        raise InvalidParameter("diffusion.t_min must be at most diffusion.t_max", param="diffusion.t_min")
    if values.get("low_threshold", 0) > values.get("threshold", 1):
        message = "diffusion.low_threshold must be at most diffusion.threshold"
        raise InvalidParameter(message, param="diffusion.low_threshold")
    values["cache"] = _cache(given, card, algorithm, windowed)
    values["cfg_scale"] = _number(
        given.get("cfg_scale", defaults.get("cfg_scale", 0.0)), "diffusion.cfg_scale", 0.0, 100.0
    )
    if values["cfg_scale"] > 0 and not ALGORITHMS[algorithm].cfg:
        raise InvalidParameter(f"diffusion.cfg_scale has no effect with {algorithm}", param="diffusion.cfg_scale")
    values.update(_suppression(given, card, algorithm), **_extras(given, card, max_tokens, algorithm))
    return DiffusionParams(**values)


def _suppression(given: Mapping[str, Any], card: ModelCard, algorithm: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "suppress_end" in given:
        if card.regime == UNIFORM:
            message = f"diffusion.suppress_end has no effect on {card.name}"
            raise InvalidParameter(message, param="diffusion.suppress_end")
        values["suppress_end"] = _choice(given["suppress_end"], "diffusion.suppress_end", ("logits", "confidence"))
        if values["suppress_end"] == "confidence" and not ALGORITHMS[algorithm].by_confidence:
            message = f"diffusion.suppress_end confidence has no effect with {algorithm}; logits has"
            raise InvalidParameter(message, param="diffusion.suppress_end")
    if "suppress_token_ids" in given:
        if "suppress_end" not in values:
            message = "diffusion.suppress_token_ids has no effect without diffusion.suppress_end"
            raise InvalidParameter(message, param="diffusion.suppress_token_ids")
        ids = _token_ids(given["suppress_token_ids"], "diffusion.suppress_token_ids", card.vocab_size)
        values["suppress_token_ids"] = ids
    elif "suppress_end" in values:
        values["suppress_token_ids"] = tuple(card.suppress_token_ids[values["suppress_end"]])
    return values


def _extras(given: Mapping[str, Any], card: ModelCard, max_tokens: int, algorithm: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "visualize" in given:
        values["visualize"] = _flag(given["visualize"], "diffusion.visualize")
    if "max_forwards" in given:
        values["max_forwards"] = _integer(given["max_forwards"], "diffusion.max_forwards", 1, 1_000_000)
    if "draft_token_ids" in given:
        param = "diffusion.draft_token_ids"
        if card.regime == UNIFORM:
            raise InvalidParameter(f"{param} has no effect on {card.name}", param=param)
        if ALGORITHMS[algorithm].verifier:
            raise InvalidParameter(f"{param} does not fit {algorithm}, which drafts by itself", param=param)
        ids = _token_ids(given["draft_token_ids"], param, card.vocab_size, longest=max_tokens)
        if card.mask_token_id in ids:
            raise InvalidParameter(f"{param} must not hold the mask token", param=param)
        values["draft_token_ids"] = ids
    if "draft_noise" in given:
        if "draft_token_ids" not in values:
            message = "diffusion.draft_noise has no effect without diffusion.draft_token_ids"
            raise InvalidParameter(message, param="diffusion.draft_noise")
        values["draft_noise"] = _number(given["draft_noise"], "diffusion.draft_noise", 0.0, 1.0)
    return values


def _logprobs(given: Mapping[str, Any], chat: bool) -> int | None:
    """OpenAI's two spellings: chat has `logprobs: true` and `top_logprobs: k`, completions have `logprobs: k`."""
    if not chat:
        if "top_logprobs" in given:
            raise InvalidParameter("top_logprobs belongs to chat; here logprobs is a number", param="top_logprobs")
        value = given.get("logprobs", False)
        return None if value is False else _integer(value, "logprobs", 0, MAX_LOGPROBS)
    wanted = _flag(given.get("logprobs", False), "logprobs")
    if "top_logprobs" in given and not wanted:
        raise InvalidParameter("top_logprobs has no effect without logprobs: true", param="top_logprobs")
    return _integer(given.get("top_logprobs", 0), "top_logprobs", 0, MAX_LOGPROBS) if wanted else None


def _no_mask(stop_token_ids: tuple[int, ...], card: ModelCard) -> None:
    if card.mask_token_id in stop_token_ids:
        message = f"stop_token_ids must not hold the mask token, {card.mask_token_id}: no answer ever does"
        raise InvalidParameter(message, param="stop_token_ids")


def _own_defaults(given: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """The model's diffusion defaults; its rule's parameters count only while its rule is used."""
    defaults = dict(card.defaults.get("diffusion", {}))
    usual = defaults.get("algorithm", DEFAULT_ALGORITHM[card.regime])
    if given.get("algorithm", usual) != usual:
        defaults = {k: v for k, v in defaults.items() if k in ("block_length", "steps", "cfg_scale")}
    return defaults


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
    values: dict[str, Any] = {"max_tokens": _max_tokens(given, card, prompt_tokens, chat)}
    defaults = card.defaults
    values["logprobs"] = _logprobs(given, chat)
    values["n"] = _integer(given.get("n", 1), "n", 1, MAX_N)
    values["temperature"] = _number(given.get("temperature", defaults.get("temperature", 1.0)), "temperature", 0.0, 2.0)
    # The model's own top_p and top_k are part of its sampling recipe; who asks for temperature 0 does not sample.
    recipe = defaults if values["temperature"] > 0 else {}
    values["top_p"] = _number(given.get("top_p", recipe.get("top_p", 1.0)), "top_p", 0.0, 1.0, open_low=True)
    values["top_k"] = _integer(given.get("top_k", recipe.get("top_k", -1)), "top_k", -1, None) or -1  # 0 is off too
    if "stop" in given:
        values["stop"] = _stops(given["stop"])
    if "seed" in given:
        values["seed"] = _integer(given["seed"], "seed", -(2**63), 2**63 - 1)
    if "ignore_eos" in given:
        values["ignore_eos"] = _flag(given["ignore_eos"], "ignore_eos")
    if "stop_token_ids" in given:
        values["stop_token_ids"] = _token_ids(given["stop_token_ids"], "stop_token_ids", card.vocab_size)
        _no_mask(values["stop_token_ids"], card)
    if "logit_bias" in given:
        values["logit_bias"] = logit_bias_of(given["logit_bias"], card)
    diffusion = given.get("diffusion", {})
    if not isinstance(diffusion, Mapping):
        raise InvalidParameter("diffusion must be an object", param="diffusion")
    known = _known(diffusion, DIFFUSION_FIELDS, "diffusion.")
    values["response_format"] = response_format_of(given.get("response_format", {"type": "text"}))
    if values["response_format"] is not None:
        known = with_order(known, card)
    values["diffusion"] = _diffusion(known, card, values["max_tokens"], defaults=_own_defaults(known, card))
    if card.regime == UNIFORM:
        # Its draws follow t_min..t_max over whole canvases; temperature scales that, and nothing filters it.
        for name, off in (("top_p", 1.0), ("top_k", -1), ("logprobs", None)):
            if values[name] != off:
                raise InvalidParameter(f"{name} has no effect on {card.name}; leave it out", param=name)
    made = SamplingParams(**values)
    if made.response_format is not None:
        check_beside(made)
    return made
