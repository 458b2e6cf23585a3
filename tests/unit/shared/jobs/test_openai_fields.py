"""Every field that the installed `openai` SDK can send works, or is refused by name. A new field of
a new SDK fails here.
"""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as completions
from openai.types.chat import completion_create_params as chat
from openai.types.chat.chat_completion_stream_options_param import ChatCompletionStreamOptionsParam
from openai.types.responses import response_create_params as responses

from shared.errors import InvalidRequest
from shared.jobs.bodies import parse
from shared.jobs.requests import ParsedRequest
from shared.jobs.response_requests import ResponseRequest
from shared.jobs.responses import CHAT, COMPLETIONS, RESPONSES

BASE: dict[str, dict[str, Any]] = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "x"}]},
    COMPLETIONS: {"model": "m", "prompt": "x"},
    RESPONSES: {"model": "m", "input": "x"},
}
PARAMS: dict[str, Any] = {
    CHAT: chat.CompletionCreateParamsBase,
    COMPLETIONS: completions.CompletionCreateParamsBase,
    RESPONSES: responses.ResponseCreateParamsBase,
}
FORMAT = {"type": "json_object"}
# A value that has an effect.
WORKS: dict[str, dict[str, Any]] = {
    CHAT: {
        "logit_bias": {"5": 1},
        "logprobs": True,
        "top_logprobs": 2,
        "max_completion_tokens": 5,
        "max_tokens": 5,
        "n": 2,
        "response_format": FORMAT,
        "seed": 5,
        "stop": ["a"],
        "temperature": 0.5,
        "top_p": 0.5,
        "metadata": {"a": "b"},
        "messages": [{"role": "user", "content": "y", "name": "n"}],
        "model": "other",
    },
    COMPLETIONS: {
        "logit_bias": {"5": 1},
        "logprobs": 2,
        "max_tokens": 5,
        "n": 2,
        "seed": 5,
        "stop": "a",
        "temperature": 0.5,
        "top_p": 0.5,
        "prompt": "y",
        "model": "other",
        "echo": True,
    },
    RESPONSES: {
        "background": True,
        "include": ["message.output_text.logprobs"],
        "input": "y",
        "instructions": "y",
        "max_output_tokens": 5,
        "metadata": {"a": "b"},
        "model": "other",
        "previous_response_id": "resp_" + "0" * 26,
        "store": False,
        "temperature": 0.5,
        "text": {"format": FORMAT},
        "top_logprobs": 2,
        "top_p": 0.5,
    },
}
# Labels, and fields whose usual value changes nothing: that value, and one that would ask for
# something (None: there is none).
USUAL: dict[str, tuple[Any, Any]] = {
    "user": ("u", None),
    "safety_identifier": ("s", None),
    "prompt_cache_key": ("k", None),
    "service_tier": ("auto", "priority"),
    "frequency_penalty": (0, 0.5),
    "presence_penalty": (0.0, -1),
    "parallel_tool_calls": (True, None),
    "store": (False, True),
    "tools": ([], [{"type": "function"}]),
    "modalities": (["text"], ["audio"]),
    "best_of": (1, 2),
    "suffix": ("", "x"),
    "truncation": ("disabled", "auto"),
    "tool_choice": ("auto", "required"),
    "function_call": ("none", {"name": "f"}),
    "functions": ([], [{"name": "f"}]),
    "verbosity": ("medium", "low"),
    "reasoning_effort": ("none", "low"),
    "context_management": ([], [{"type": "x"}]),
    "prompt_cache_options": ({"mode": "implicit"}, None),
    "prompt_cache_retention": ("24h", None),
    "background_options": ({"completion_window": "soonest"}, {"completion_window": "2h"}),
}
REFUSED: dict[str, dict[str, Any]] = {
    CHAT: {
        "audio": {},
        "moderation": {},
        "prediction": {},
        "web_search_options": {},
    },
    COMPLETIONS: {},
    RESPONSES: {
        "access_programs": {},
        "conversation": "c",
        "image": {},
        "max_tool_calls": 1,
        "moderation": {},
        "prompt": {},
        "reasoning": {"effort": "low"},
    },
}
STREAM = ("stream_options",)  # below; `stream` itself is in the SDK's other classes


@pytest.mark.parametrize("endpoint", PARAMS)
def test_every_field_of_the_sdk_is_known_here(endpoint: str) -> None:
    sent = set(PARAMS[endpoint].__annotations__)
    works, refused = set(WORKS[endpoint]), set(REFUSED[endpoint])
    assert sent - works - refused - set(USUAL) - set(STREAM) == set(), (
        "new fields of the SDK: serve or refuse them"
    )
    assert (works | refused) - sent - {"model"} == set()
    assert works & refused == set()


@pytest.mark.parametrize(("endpoint", "name"), [(e, n) for e in PARAMS for n in WORKS[e]])
def test_what_works_changes_the_request(endpoint: str, name: str) -> None:
    base = dict(BASE[endpoint])
    if name == "top_logprobs" and endpoint == CHAT:
        base["logprobs"] = True
    if name == "echo":  # scores the prompt
        base["logprobs"] = 1
    made = parse(endpoint, {**base, name: WORKS[endpoint][name]}, streaming=True)
    assert made != parse(endpoint, base, streaming=True)


@pytest.mark.parametrize(("endpoint", "name"), [(e, n) for e in PARAMS for n in REFUSED[e]])
def test_what_is_not_served_is_refused_by_name(endpoint: str, name: str) -> None:
    with pytest.raises(InvalidRequest, match="not served; leave it out") as wrong:
        parse(endpoint, {**BASE[endpoint], name: REFUSED[endpoint][name]}, streaming=True)
    assert wrong.value.param in (name, f"{name}.effort")


def usual_of(endpoint: str) -> list[str]:
    own = set(PARAMS[endpoint].__annotations__) - set(WORKS[endpoint]) - set(REFUSED[endpoint])
    return [name for name in USUAL if name in own]


@pytest.mark.parametrize(("endpoint", "name"), [(e, n) for e in PARAMS for n in usual_of(e)])
def test_usual_values_change_nothing_and_others_are_refused(endpoint: str, name: str) -> None:
    usual, other = USUAL[name]
    plain, made = (
        parse(endpoint, body, streaming=True)
        for body in (BASE[endpoint], {**BASE[endpoint], name: usual})
    )
    assert isinstance(made, ParsedRequest | ResponseRequest) and isinstance(
        plain, ParsedRequest | ResponseRequest
    )
    assert (made.fields, made.stream, made.metadata) == (plain.fields, plain.stream, plain.metadata)
    if other is not None:
        with pytest.raises(InvalidRequest) as wrong:
            parse(endpoint, {**BASE[endpoint], name: other}, streaming=True)
        assert wrong.value.param == name


def test_stream_options() -> None:
    assert set(ChatCompletionStreamOptionsParam.__annotations__) == {
        "include_usage",
        "include_obfuscation",
    }
    assert set(responses.StreamOptions.__annotations__) == {"include_obfuscation"}
    for endpoint in PARAMS:
        for value, good in ((False, True), (True, False)):
            body = {
                **BASE[endpoint],
                "stream": True,
                "stream_options": {"include_obfuscation": value},
            }
            if good:
                assert parse(endpoint, body, streaming=True).stream
                continue
            with pytest.raises(InvalidRequest) as wrong:
                parse(endpoint, body, streaming=True)
            assert (wrong.value.param or "").startswith("stream_options")
