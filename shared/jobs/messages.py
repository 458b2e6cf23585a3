"""Chat messages of a body, checked: what a client writes, and what it sends back of our answers.
Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shared.errors import InvalidParameter, MissingParameter, UnknownParameter
from shared.jobs.no_ops import is_nothing

ROLES = ("system", "user", "assistant", "developer")
MAX_MESSAGES = 1000
MAX_NAME = 256
REASONING = (
    "reasoning_content",
    "reasoning",
)  # two names of one field; the chat template decides what it does with it
# What answers of ours and of other servers carry beside their text: accepted while it says nothing.
_EMPTY = (
    "annotations",
    "audio",
    "function_call",
    "provider_specific_fields",
    "reasoning_details",
    "refusal",
    "thinking_blocks",
    "tool_call_id",
    "tool_calls",
)
_CACHE_HINTS = (
    "cache_control",
    "prompt_cache_breakpoint",
)  # no prompt is cached between requests: nothing to control


def messages_of(value: Any) -> list[dict[str, str]]:
    """Return chat messages with text content. Raises InvalidParameter, UnknownParameter,
    MissingParameter.
    """
    if not isinstance(value, list) or not value:
        raise InvalidParameter("messages must be a list of at least one message", param="messages")
    if len(value) > MAX_MESSAGES:
        raise InvalidParameter(f"messages takes at most {MAX_MESSAGES} messages", param="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(value)]


def _message(message: Any, at: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise InvalidParameter(f"{at} must be an object", param=at)
    given = {k: v for k, v in message.items() if v is not None}
    role = role_of(given, at)
    known = ("role", "content", "name", *(REASONING if role == "assistant" else ()))
    for name, one in given.items():
        if name not in known and not (name in (*_EMPTY, *REASONING) and is_nothing(one)):
            raise UnknownParameter(
                f"{at}.{name[:80]} is not supported; leave it out", param=f"{at}.{name[:80]}"
            )
    name = given.get("name", "")
    if not isinstance(name, str) or len(name) > MAX_NAME:
        raise InvalidParameter(
            f"{at}.name must be a string of at most {MAX_NAME} characters", param=f"{at}.name"
        )
    made = {"role": role, "content": content_of(given, at, ("text",))}
    if name:
        made["name"] = name  # whether it is said, the chat template decides
    thoughts = [given[field] for field in REASONING if field in given]
    for field in REASONING:
        if not isinstance(given.get(field, ""), str):
            raise InvalidParameter(f"{at}.{field} must be a string", param=f"{at}.{field}")
    if any(thoughts):
        made |= dict.fromkeys(REASONING, next(filter(None, thoughts)))
    return made


def role_of(given: Mapping[str, Any], at: str) -> str:
    """Return the role by the name that templates know. Raises InvalidParameter."""
    role = given.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidParameter(f"{at}.role must be one of {', '.join(ROLES)}", param=f"{at}.role")
    return "system" if role == "developer" else role


def content_of(given: Mapping[str, Any], at: str, types: tuple[str, ...]) -> str:
    """Return a message's text, which may be empty; an assistant's may be absent.

    Raises:
        InvalidParameter, UnknownParameter, MissingParameter: with the full name of the part's
            field.
    """
    content, at = given.get("content"), f"{at}.content"
    if content is None:
        if given.get("role") != "assistant":
            raise MissingParameter(f"{at} is required", param=at)
        return ""
    if isinstance(content, list):
        return "".join(_part(part, f"{at}[{j}]", types) for j, part in enumerate(content))
    if not isinstance(content, str):
        raise InvalidParameter(f"{at} must be a string or a list of text parts", param=at)
    return content


def _part(part: Any, at: str, types: tuple[str, ...]) -> str:
    if not isinstance(part, dict) or part.get("type") not in types:
        raise InvalidParameter(f"{at} must be a text part, of type {' or '.join(types)}", param=at)
    for name, one in part.items():
        hint = name in _CACHE_HINTS and isinstance(one, dict)
        sent_back = name == "logprobs" and part["type"] == "output_text" and isinstance(one, list)
        if name not in ("type", "text") and not (
            one is None or hint or sent_back or (name == "annotations" and one == [])
        ):
            raise UnknownParameter(
                f"{at}.{name[:80]} is not supported; leave it out", param=f"{at}.{name[:80]}"
            )
    if not isinstance(part.get("text"), str):
        raise InvalidParameter(f"{at}.text must be a string", param=f"{at}.text")
    text: str = part["text"]
    return text
