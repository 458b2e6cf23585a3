"""Parameters of a request's diffusion: each field of `diffusion`, resolved for one model or refused
by its name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from shared import checks
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
from shared.errors import InvalidParameter
from shared.model_card import ModelCard

DEFAULT_BLOCK_LENGTH = 32

_APD = ("mixture_weight", "kv_window", "max_lookahead")  # also accepted inside `diffusion.apd`
_COMMON = (
    "algorithm",
    "block_length",
    "sub_block_length",
    "cache",
    "cfg_scale",
    "suppress_end",
    "suppress_token_ids",
    "visualize",
    "max_forwards",
    "draft_token_ids",
    "draft_noise",
)
DIFFUSION_FIELDS = (*_COMMON[:3], "apd", *PARAMETERS, *_COMMON[3:])


@dataclass(frozen=True, slots=True)
class DiffusionParams:
    """Parameters of denoising. None: the algorithm's default (`shared.algorithms`), or not used by
    it.
    """

    algorithm: str | None = None
    block_length: int | None = None  # tokens
    sub_block_length: int | None = (
        None  # tokens; a block is filled in such parts, from left to right
    )
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
    max_forwards: int | None = (
        None  # the answer ends after so many, with what is committed without a gap
    )
    draft_token_ids: tuple[int, ...] | None = None  # warm start: an earlier answer
    draft_noise: float = 0.5  # the share of the draft that is masked again
    visualize: bool = False

    def fields(self) -> dict[str, Any]:
        """Return the fields that are set, by name."""
        defaults = {name: field.default for name, field in self.__dataclass_fields__.items()}
        return {k: v for k, v in asdict(self).items() if v != defaults[k]}


def shown_diffusion(params: Mapping[str, Any]) -> dict[str, Any]:
    """The diffusion parameters of `SamplingParams.to_json()` that had a meaning."""
    shown = {
        k: v for k, v in params.get("diffusion", {}).items() if v is not None and v is not False
    }
    if shown.get("draft_token_ids") is None:
        shown.pop("draft_noise", None)
    return {
        k: v
        for k, v in shown.items()
        if not (k == "cfg_scale" and v == 0) and k != "draft_token_ids"
    }


def _flattened(given: Mapping[str, Any]) -> dict[str, Any]:
    """`diffusion.apd{...}` and its names written flat are the same; its errors are named
    `diffusion.apd.x`.
    """
    flat = {k: v for k, v in given.items() if k != "apd"}
    nested = given.get("apd", {})
    if not isinstance(nested, Mapping):
        raise InvalidParameter("diffusion.apd must be an object", param="diffusion.apd")
    for name, value in checks.known(nested, _APD, "diffusion.apd.").items():
        if flat.get(name, value) != value:
            raise InvalidParameter(
                f"diffusion.apd.{name} and diffusion.{name} differ", param=f"diffusion.apd.{name}"
            )
        flat[name] = value
    return flat


def _own_value(name: str, value: Any) -> int | float:
    bounds = PARAMETERS[name]
    param = f"diffusion.apd.{name}" if name in _APD else f"diffusion.{name}"
    if bounds.integer:
        return checks.integer(value, param, int(bounds.low), int(bounds.high))
    return checks.number(value, param, bounds.low, bounds.high, open_low=bounds.open_low)


def _algorithm(given: Mapping[str, Any], card: ModelCard, defaults: Mapping[str, Any]) -> str:
    regime = card.regime
    name = given.get("algorithm", defaults.get("algorithm", DEFAULT_ALGORITHM[regime]))
    served = tuple(card.capabilities["algorithms"])
    known = ALGORITHMS.get(name) if isinstance(name, str) else None
    if known is not None and known.verifier and regime in known.regimes and name not in served:
        message = f"diffusion.algorithm {name} needs a verifier; the worker of {card.name} was started without --verifier"
        raise InvalidParameter(message, param="diffusion.algorithm")
    if known is not None and name not in served:
        message = f"diffusion.algorithm {name} does not fit {card.name} ({regime}); it has {', '.join(served)}"
        raise InvalidParameter(message, param="diffusion.algorithm")
    return checks.choice(name, "diffusion.algorithm", served)


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
                f"{param} is the canvas of {card.name}, {card.block_length}; leave it out",
                param=param,
            )
        return card.block_length
    wanted = None
    if "block_length" in given:
        wanted = checks.integer(given["block_length"], param, 1, checks.MOST)
    if windowed:
        if wanted is not None and wanted != max_tokens:
            raise InvalidParameter(
                f"{param} has no effect here: decoding goes left to right without blocks",
                param=param,
            )
        return max_tokens
    if card.regime == FULL:
        if wanted is None:
            length = defaults.get("block_length", card.block_length)
            return max_tokens if length is None else min(int(length), max_tokens)
        if not lenient and (wanted > max_tokens or max_tokens % wanted):
            raise InvalidParameter(
                f"{param} {wanted} does not divide max_tokens {max_tokens}", param=param
            )
        return min(wanted, max_tokens)
    longest = card.capabilities.get("max_block_length")
    if wanted is not None and longest is not None and wanted > longest:
        raise InvalidParameter(
            f"{param} {wanted} is beyond what {card.name} was trained for, 1 to {longest}",
            param=param,
        )
    if wanted is not None and wanted > card.context_length:
        raise InvalidParameter(
            f"{param} {wanted} is beyond the context of {card.context_length}", param=param
        )
    return wanted or int(defaults.get("block_length") or card.block_length or DEFAULT_BLOCK_LENGTH)


def _sub_block_length(
    given: Mapping[str, Any], card: ModelCard, block_length: int | None, defaults: Mapping[str, Any]
) -> int | None:
    """Return the length of the parts that a block is filled in; None for models without them."""
    param, usual = "diffusion.sub_block_length", card.capabilities.get("sub_block_length")
    if usual is None or block_length is None:
        if "sub_block_length" in given:
            raise InvalidParameter(
                f"{param} has no effect on {card.name}: its blocks have no parts", param=param
            )
        return None
    if "sub_block_length" not in given:
        length = min(int(defaults.get("sub_block_length", usual)), block_length)
        return length if block_length % length == 0 else block_length
    length = checks.integer(given["sub_block_length"], param, 1, block_length)
    if block_length % length:
        raise InvalidParameter(
            f"{param} {length} does not divide diffusion.block_length {block_length}", param=param
        )
    return length


def _steps(
    values: dict[str, Any],
    given: Mapping[str, Any],
    card: ModelCard,
    max_tokens: int,
    defaults: Mapping[str, Any],
    lenient: bool,
) -> None:
    """`steps` counts the whole answer: a multiple of the blocks when explicit, adapted when it is a
    default.
    """
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
        raise InvalidParameter(
            f"{param} {cache} does not fit {card.name}; it has {', '.join(caches)}", param=param
        )
    cache = checks.choice(cache, param, caches)
    if cache == "window" and not windowed:
        message = f"{param} window needs diffusion.kv_window, with {' or '.join(users_of('kv_window', card.regime))}"
        raise InvalidParameter(message, param=param)
    if windowed and cache != "window":
        raise InvalidParameter(
            f"{param} {cache} contradicts diffusion.kv_window; leave one out", param=param
        )
    if ALGORITHMS[algorithm].verifier and cache not in ("none", "window"):
        raise InvalidParameter(
            f"{param} {cache} does not fit {algorithm}; it has none and window", param=param
        )
    return cache


def decide(
    given: Mapping[str, Any],
    card: ModelCard,
    max_tokens: int,
    *,
    defaults: Mapping[str, Any],
    lenient: bool = False,
) -> DiffusionParams:
    """Every diffusion parameter decided. `lenient`: already decided once, so adapted lengths are
    not errors.
    """
    given = _flattened(given)
    algorithm = _algorithm(given, card, defaults)
    regime, own = card.regime, own_parameters(algorithm, card.regime)
    for name in PARAMETERS:
        if name in given and name not in own:
            param = f"diffusion.{name}"
            users = ", ".join(users_of(name, regime)) or f"no algorithm of {card.name}"
            raise InvalidParameter(
                f"{param} has no effect with {algorithm}; it belongs to {users}", param=param
            )
    values: dict[str, Any] = {"algorithm": algorithm}
    windowed = given.get("kv_window") is not None
    leftward = ALGORITHMS[algorithm].verifier or windowed or given.get("max_lookahead") is not None
    values["block_length"] = _block_length(given, card, max_tokens, defaults, leftward, lenient)
    values["sub_block_length"] = _sub_block_length(given, card, values["block_length"], defaults)
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
        raise InvalidParameter(
            "diffusion.t_min must be at most diffusion.t_max", param="diffusion.t_min"
        )
    if values.get("low_threshold", 0) > values.get("threshold", 1):
        message = "diffusion.low_threshold must be at most diffusion.threshold"
        raise InvalidParameter(message, param="diffusion.low_threshold")
    values["cache"] = _cache(given, card, algorithm, windowed)
    if values["cache"] in ("prefix", "dual") and values.get("max_lookahead") is not None:
        message = f"diffusion.cache {values['cache']} does not go with diffusion.max_lookahead; leave one out"
        raise InvalidParameter(message, param="diffusion.cache")
    values["cfg_scale"] = checks.number(
        given.get("cfg_scale", defaults.get("cfg_scale", 0.0)), "diffusion.cfg_scale", 0.0, 100.0
    )
    if values["cfg_scale"] > 0 and not ALGORITHMS[algorithm].cfg:
        raise InvalidParameter(
            f"diffusion.cfg_scale has no effect with {algorithm}", param="diffusion.cfg_scale"
        )
    values.update(
        _suppression(given, card, algorithm), **_extras(given, card, max_tokens, algorithm)
    )
    return DiffusionParams(**values)


def _suppression(given: Mapping[str, Any], card: ModelCard, algorithm: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "suppress_end" in given:
        if card.regime == UNIFORM:
            message = f"diffusion.suppress_end has no effect on {card.name}"
            raise InvalidParameter(message, param="diffusion.suppress_end")
        values["suppress_end"] = checks.choice(
            given["suppress_end"], "diffusion.suppress_end", ("logits", "confidence")
        )
        if values["suppress_end"] == "confidence" and not ALGORITHMS[algorithm].by_confidence:
            message = (
                f"diffusion.suppress_end confidence has no effect with {algorithm}; logits has"
            )
            raise InvalidParameter(message, param="diffusion.suppress_end")
    if given.get("suppress_token_ids") == [] and "suppress_end" not in values:
        return values
    if "suppress_token_ids" in given:
        if "suppress_end" not in values:
            message = "diffusion.suppress_token_ids has no effect without diffusion.suppress_end"
            raise InvalidParameter(message, param="diffusion.suppress_token_ids")
        ids = checks.token_ids(
            given["suppress_token_ids"], "diffusion.suppress_token_ids", card.vocab_size
        )
        values["suppress_token_ids"] = ids
    elif "suppress_end" in values:
        values["suppress_token_ids"] = tuple(card.suppress_token_ids[values["suppress_end"]])
    return values


def _extras(
    given: Mapping[str, Any], card: ModelCard, max_tokens: int, algorithm: str
) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if "visualize" in given:
        values["visualize"] = checks.flag(given["visualize"], "diffusion.visualize")
    if "max_forwards" in given:
        values["max_forwards"] = checks.integer(
            given["max_forwards"], "diffusion.max_forwards", 1, 1_000_000
        )
    if "draft_token_ids" in given and given["draft_token_ids"] != []:
        param = "diffusion.draft_token_ids"
        if card.regime == UNIFORM:
            raise InvalidParameter(f"{param} has no effect on {card.name}", param=param)
        if ALGORITHMS[algorithm].verifier:
            raise InvalidParameter(
                f"{param} does not fit {algorithm}, which drafts by itself", param=param
            )
        ids = checks.token_ids(given["draft_token_ids"], param, card.vocab_size, longest=max_tokens)
        if card.mask_token_id in ids:
            raise InvalidParameter(f"{param} must not hold the mask token", param=param)
        values["draft_token_ids"] = ids
    if "draft_noise" in given:
        if "draft_token_ids" not in values:
            message = "diffusion.draft_noise has no effect without diffusion.draft_token_ids"
            raise InvalidParameter(message, param="diffusion.draft_noise")
        values["draft_noise"] = checks.number(
            given["draft_noise"], "diffusion.draft_noise", 0.0, 1.0
        )
    return values


def own_defaults(given: Mapping[str, Any], card: ModelCard) -> dict[str, Any]:
    """The model's diffusion defaults; its rule's parameters count only while its rule is used."""
    defaults = dict(card.defaults.get("diffusion", {}))
    usual = defaults.get("algorithm", DEFAULT_ALGORITHM[card.regime])
    if given.get("algorithm", usual) != usual:
        defaults = {
            k: v for k, v in defaults.items() if k in ("block_length", "steps", "cfg_scale")
        }
    return defaults
