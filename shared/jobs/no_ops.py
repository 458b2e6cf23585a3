"""Values of a request that change nothing, by the names of all endpoints and of the servers that
clients are written for. Pure.

A client library sends its whole form: `presence_penalty: 0`, `tools: []`, `skip_special_tokens:
true`. Such a value is accepted on every endpoint, in jobs, batches, evaluations and lines of `vdiff
generate`, also where the field does not exist. A value that would have an effect is refused by
name. null is never an effect.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from shared.errors import InvalidParameter, UnknownParameter

# Fields of OpenAI's endpoints that vdiff does not serve; a test compares the lists with the SDK's
# own.
REFUSED = (
    "access_programs",
    "audio",
    "background_options",
    "conversation",
    "image",
    "max_tool_calls",
    "moderation",
    "prediction",
    "prompt",
    "web_search_options",
)
# The values at which a field changes nothing.
_VALUES: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (False,),
    "background": (False,),
    "bad_words": ([],),
    "chat_template_kwargs": ({},),
    "context_management": ([],),
    "continue_final_message": (False,),
    "documents": ([],),
    "early_stopping": (False,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "ignore_eos": (False,),
    "include": ([],),
    "include_reasoning": (True, False),
    "include_stop_str_in_output": (False,),
    "instructions": ("",),
    "length_penalty": (1,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "stop": ("", [], [""]),
    "stop_token_ids": ([],),
    "store": (False,),
    "stream": (False,),
    "suffix": ("",),
    "text": ({}, {"format": {"type": "text"}}),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "top_p": (1,),
    "truncation": ("disabled",),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
}
_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_REASONING = ("context", "effort", "generate_summary", "mode", "summary")


def is_nothing(value: Any) -> bool:
    """Return whether the value says nothing: null, an empty text, list or object, an object of
    nothing.
    """
    if isinstance(value, dict):
        return all(is_nothing(one) for one in value.values())
    return value is None or value == "" or value == []


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, bool) or isinstance(wanted, bool):
        return value is wanted
    if isinstance(value, dict) and isinstance(wanted, dict):
        return {k: v for k, v in value.items() if v is not None} == wanted
    return bool(value == wanted)


def _best_of(value: Any, body: Mapping[str, Any]) -> bool:
    n = body.get("n")
    return _same(value, 1 if n is None else n)


def _tools(value: Any, body: Mapping[str, Any]) -> bool:
    return isinstance(value, list) and (not value or body.get("tool_choice") == "none")


def _tool_choice(value: Any, body: Mapping[str, Any]) -> bool:
    return value == "none" or (value == "auto" and not body.get("tools"))


def _length(value: Any, body: Mapping[str, Any]) -> bool:
    others = [body[name] for name in _LENGTHS if body.get(name) is not None]
    return len(others) > 1 and all(_same(value, other) for other in others)


def _reasoning(value: Any, body: Mapping[str, Any]) -> bool:
    """Nothing reasons here, so only an effort would ask for something."""
    if not isinstance(value, dict):
        return False
    for name, one in value.items():
        if name not in _REASONING and one is not None:
            raise UnknownParameter(
                f"reasoning.{name[:80]} is not served; leave it out", param=f"reasoning.{name[:80]}"
            )
        if (name == "effort" and one not in (None, "none")) or (
            name == "mode" and one not in (None, "standard")
        ):
            raise UnknownParameter(
                f"reasoning.{name} is not served; leave it out", param=f"reasoning.{name}"
            )
    return True


_CHECKS: dict[str, Callable[[Any, Mapping[str, Any]], bool]] = {
    "background_options": lambda value, body: _same(value, {"completion_window": "soonest"}),
    "best_of": _best_of,
    "diffusion": lambda value, body: isinstance(value, dict) and is_nothing(value),
    "prompt_cache_options": lambda value, body: isinstance(
        value, dict
    ),  # no prompt is cached between requests
    "prompt_cache_retention": lambda value, body: isinstance(value, str),
    "reasoning": _reasoning,
    "stream_options": lambda value, body: not stream_options_of(value),
    "tool_choice": _tool_choice,
    "tools": _tools,
    **dict.fromkeys(_LENGTHS, _length),
}
NAMES = frozenset((*REFUSED, *_VALUES, *_CHECKS))


def changes_nothing(name: str, value: Any, body: Mapping[str, Any]) -> bool:
    """Return whether a field has no effect at this value, in a body that has the others too.

    Raises:
        InvalidParameter, UnknownParameter: inside of it something has an effect.
    """
    if value is None:
        return True
    check = _CHECKS.get(name)
    return (
        check(value, body)
        if check is not None
        else any(_same(value, one) for one in _VALUES.get(name, ()))
    )


def with_effect(
    body: Any,
    own: Collection[str],
    unknown: Callable[[str], str],
    *,
    refused: str = "is not served; leave it out",
) -> dict[str, Any]:
    """Return the fields of a body that say something.

    Args:
        own: fields that the endpoint has; what they may hold, its parser says.
        unknown: makes the message for a name that no endpoint has.
        refused: what is said of a field that others have, at a value with an effect.

    Raises:
        InvalidParameter, UnknownParameter: with the field's name.
    """
    if not isinstance(body, dict):
        raise InvalidParameter("body must be an object", param="body")
    given = {name: value for name, value in body.items() if value is not None}
    for name in list(given):
        if name in own:
            continue
        if name not in NAMES:
            raise UnknownParameter(unknown(name), param=name[:80])
        if not changes_nothing(name, given[name], body):
            raise UnknownParameter(f"{name} {refused}", param=name)
    return {name: value for name, value in given.items() if name in own}


def stream_options_of(value: Any) -> dict[str, bool]:
    """Return the options that are on. Raises InvalidParameter, UnknownParameter: with the option's
    full name.
    """
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidParameter("stream_options must be an object", param="stream_options")
    on = {}
    for name, flag in value.items():
        param = f"stream_options.{name[:80]}"
        if name not in ("include_usage", "include_obfuscation", "continuous_usage_stats"):
            if flag is not None:
                raise UnknownParameter(f"{param} is not served; leave it out", param=param)
            continue
        if flag is not None and not isinstance(flag, bool):
            raise InvalidParameter(f"{param} must be true or false", param=param)
        if flag and name != "include_usage":
            raise InvalidParameter(f"{param} must be false: it is not served", param=param)
        if flag:
            on[name] = True
    return on
