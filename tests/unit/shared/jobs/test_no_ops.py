"""Values that change nothing, on every endpoint and in lines of `vdiff generate`; and what clients
send back of our answers.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any, cast

import pytest
from openai.types.chat import ChatCompletion
from openai.types.responses import Response

from shared.errors import VDiffError
from shared.evaluations.requests import parse_configurations
from shared.jobs import response_objects
from shared.jobs.bodies import parse
from shared.jobs.fields import metadata_of
from shared.jobs.no_ops import changes_nothing, is_nothing
from shared.jobs.requests import ParsedRequest, Resolved
from shared.jobs.responses import CHAT, COMPLETIONS, INFILL, LOGLIKELIHOOD, RESPONSES, build_result
from shared.sampling_params import SamplingParams
from tests.unit.shared.test_prompt_ids import CARD, TOKENIZER
from vdiff.client import calls
from worker import offline

USER = {"role": "user", "content": "hi"}
LINES, ECHO, PROMPTS = "vdiff generate", "echo", "prompts"
FACES: dict[str, tuple[str, dict[str, Any]]] = {
    CHAT: (CHAT, {"messages": [USER]}),
    COMPLETIONS: (COMPLETIONS, {"prompt": "hi"}),
    PROMPTS: (COMPLETIONS, {"prompt": ["hi", "ho"]}),
    ECHO: (COMPLETIONS, {"prompt": "hi", "echo": True, "logprobs": 0, "max_tokens": 0}),
    RESPONSES: (RESPONSES, {"input": "hi"}),
    INFILL: (INFILL, {"parts": ["hi", {"hole": 2}]}),
    LOGLIKELIHOOD: (LOGLIKELIHOOD, {"context": "hi", "continuation": "ho"}),
    LINES: (LINES, {"messages": [USER]}),
}
NOTHING: list[dict[str, Any]] = [
    {"presence_penalty": 0},
    {"frequency_penalty": 0.0},
    {"repetition_penalty": 1},
    {"repetition_penalty": 1.0},
    {"min_p": 0},
    {"min_tokens": 0},
    {"length_penalty": 1},
    {"best_of": 1},
    {"n": 1, "best_of": 1},
    {"n": 1},
    {"suffix": ""},
    {"tools": []},
    {"tool_choice": "auto"},
    {"tool_choice": "none"},
    {"tools": [], "tool_choice": "auto"},
    {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
    {"parallel_tool_calls": False},
    {"functions": []},
    {"function_call": "auto"},
    {"modalities": ["text"]},
    {"stop": ""},
    {"stop": []},
    {"stop": [""]},
    {"stop_token_ids": []},
    {"ignore_eos": False},
    {"logit_bias": {}},
    {"top_logprobs": 0},
    {"stream": False},
    {"stream_options": {}},
    {"stream_options": {"include_usage": False}},
    {
        "stream_options": {
            "include_usage": None,
            "include_obfuscation": False,
            "continuous_usage_stats": False,
        }
    },
    {"skip_special_tokens": True},
    {"spaces_between_special_tokens": True},
    {"include_stop_str_in_output": False},
    {"use_beam_search": False},
    {"add_generation_prompt": True},
    {"continue_final_message": False},
    {"reasoning_effort": "none"},
    {"verbosity": "medium"},
    {"reasoning": {}},
    {"reasoning": {"effort": None, "summary": "auto"}},
    {"reasoning": {"effort": "none"}},
    {"prompt_cache_retention": "24h"},
    {"prompt_cache_options": {"mode": "implicit"}},
    {"service_tier": "auto"},
    {"user": "u"},
    {"safety_identifier": "s"},
    {"prompt_cache_key": "k"},
    {"metadata": {}},
    {"metadata": {"a": None}},
    {"include_reasoning": False},
    {"truncation": "disabled"},
    {"context_management": []},
    {"chat_template_kwargs": {}},
    {"chat_template_kwargs": None},
    {"diffusion": {}},
    {"diffusion": {"apd": None}},
    {"diffusion": {"apd": {}}},
    {"include": []},
    {"instructions": ""},
    {"text": {}},
    {"background": False},
    {"response_format": {"type": "text"}},
    {"documents": []},
    {"bad_words": []},
    {"parse_special": None},
    *(
        {name: None}
        for name in (
            "audio",
            "function_call",
            "functions",
            "guided_json",
            "logit_bias",
            "logprobs",
            "max_completion_tokens",
            "n",
            "prediction",
            "reasoning_effort",
            "response_format",
            "seed",
            "stop",
            "store",
            "stream",
            "stream_options",
            "temperature",
            "tool_choice",
            "tools",
            "top_k",
            "top_logprobs",
            "top_p",
            "user",
            "web_search_options",
        )
    ),
]
EFFECT: list[tuple[dict[str, Any], str]] = [
    ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"presence_penalty": False}, "presence_penalty"),
    ({"repetition_penalty": 1.1}, "repetition_penalty"),
    ({"min_p": 0.1}, "min_p"),
    ({"best_of": 2}, "best_of"),
    ({"suffix": "x"}, "suffix"),
    ({"tools": [{"type": "function"}]}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [{}], "tool_choice": "auto"}, "tools"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"modalities": ["audio"]}, "modalities"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"skip_special_tokens": 1}, "skip_special_tokens"),
    ({"reasoning_effort": "low"}, "reasoning_effort"),
    ({"verbosity": "high"}, "verbosity"),
    ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
    ({"reasoning": {"colour": 1}}, "reasoning.colour"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"stream_options": {"colour": 1}}, "stream_options.colour"),
    ({"prediction": {}}, "prediction"),
    ({"audio": {}}, "audio"),
    ({"stream_options": {"include_obfuscation": True}}, "stream_options.include_obfuscation"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"service_tier": "priority"}, "service_tier"),
    ({"colour": 1}, "colour"),
]


def resolved(face: str, more: dict[str, Any]) -> Any:
    """Return the resolved request: equal for two requests that mean the same."""
    endpoint, body = FACES[face]
    if endpoint != LINES:
        made: Resolved = parse(endpoint, {"model": "m", **body, **more}, streaming=True).resolve(
            CARD, TOKENIZER
        )
        return made
    sent: list[Any] = []

    def submit(name: str, ids: list[int], params: SamplingParams, prompt: str | None) -> None:
        sent.extend((ids, params, prompt))

    line, data = offline.parse_line(json.dumps({**body, **more}), 1, {})
    if line.error is None:
        offline.submit(
            cast(Any, SimpleNamespace(card=CARD, tokenizer=TOKENIZER, submit=submit)), line, data
        )
    if line.error is not None:
        raise line.error
    return sent


@pytest.mark.parametrize("more", NOTHING, ids=json.dumps)
@pytest.mark.parametrize("face", FACES)
def test_a_value_that_changes_nothing_is_accepted(face: str, more: dict[str, Any]) -> None:
    if face == ECHO and "logprobs" in more:
        pytest.skip("echo needs logprobs")
    made, plain = resolved(face, more), resolved(face, {})
    if face == RESPONSES:  # its object repeats labels of the request
        assert (made.prompt_token_ids, made.params) == (plain.prompt_token_ids, plain.params)
    else:
        assert made == plain


@pytest.mark.parametrize(("more", "param"), EFFECT, ids=lambda value: json.dumps(value))
@pytest.mark.parametrize("face", FACES)
def test_a_value_with_an_effect_is_refused_by_name(
    face: str, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(VDiffError) as wrong:
        resolved(face, more)
    assert (wrong.value.param, wrong.value.http_status) == (param, 400)


def test_equal_lengths_are_one() -> None:
    for face in (CHAT, LINES):
        assert resolved(face, {"max_tokens": 8, "max_completion_tokens": 8}) == resolved(
            face, {"max_tokens": 8}
        )
        assert resolved(face, {"max_completion_tokens": 8}) == resolved(face, {"max_tokens": 8})
        with pytest.raises(VDiffError) as wrong:
            resolved(face, {"max_tokens": 8, "max_completion_tokens": 9})
        assert wrong.value.param == "max_completion_tokens"
    assert resolved(RESPONSES, {"max_output_tokens": 8, "max_tokens": 8}).params.max_tokens == 8
    assert (
        resolved(COMPLETIONS, {"max_tokens": 8, "max_completion_tokens": 8}).params.max_tokens == 8
    )
    with pytest.raises(VDiffError):
        resolved(COMPLETIONS, {"max_completion_tokens": 8})
    assert resolved(CHAT, {"n": 2, "best_of": 2}).params.n == 2
    assert resolved(LINES, {"model": CARD.name}) == resolved(LINES, {})
    with pytest.raises(VDiffError) as wrong:
        resolved(LINES, {"model": "other"})
    assert wrong.value.param == "model"


def test_a_nucleus_of_nothing_is_the_likeliest_token() -> None:
    assert resolved(CHAT, {"top_p": 0}).params.top_p == 0.0


EMPTY = [
    "",
    [],
    [{"type": "text", "text": ""}],
    [{"type": "text", "text": "", "annotations": [], "cache_control": None}],
]


@pytest.mark.parametrize("content", EMPTY, ids=json.dumps)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "developer"])
def test_empty_content_is_an_empty_text(role: str, content: Any) -> None:
    messages = [{"role": role, "content": content}, USER]
    plain = [{"role": "system" if role == "developer" else role, "content": ""}, USER]
    wanted = TOKENIZER.encode_chat(plain)
    assert (
        parse(CHAT, {"model": "m", "messages": messages}, streaming=True)
        .resolve(CARD, TOKENIZER)
        .prompt_token_ids
        == wanted
    )
    text = json.dumps(messages).replace('"text", "text"', '"input_text", "text"')
    made = parse(RESPONSES, {"model": "m", "input": json.loads(text)}, streaming=True)
    assert made.resolve(CARD, TOKENIZER).prompt_token_ids == wanted
    assert parse(INFILL, {"model": "m", "parts": ["", {"hole": 2}, "a"]}, streaming=True).resolve(
        CARD, TOKENIZER
    )


HISTORY: list[dict[str, Any]] = [
    {
        "role": "assistant",
        "content": "it is",
        "refusal": None,
        "annotations": [],
        "audio": None,
        "function_call": None,
        "tool_calls": None,
    },  # the openai package's model_dump()
    {
        "role": "assistant",
        "content": "it is",
        "tool_calls": [],
        "function_call": None,
        "name": None,
    },  # LangChain
    {
        "role": "assistant",
        "content": "it is",
        "tool_calls": None,
        "provider_specific_fields": {"refusal": None},
        "annotations": [],
        "thinking_blocks": None,
        "reasoning_content": None,
    },  # LiteLLM
    {
        "role": "assistant",
        "content": [{"type": "text", "text": "it is"}],
        "reasoning_content": "",
    },  # the AI SDK
    {
        "role": "assistant",
        "content": "it is",
        "refusal": "",
        "reasoning_details": [],
        "tool_call_id": None,
    },
]


@pytest.mark.parametrize("answer", HISTORY, ids=lambda answer: str(len(json.dumps(answer))))
def test_answers_come_back_as_clients_send_them(answer: dict[str, Any]) -> None:
    wanted = TOKENIZER.encode_chat([USER, {"role": "assistant", "content": "it is"}, USER])
    messages = {"messages": [USER, answer, USER]}
    assert (
        parse(CHAT, {"model": "m", **messages}, streaming=True)
        .resolve(CARD, TOKENIZER)
        .prompt_token_ids
        == wanted
    )
    assert resolved(LINES, messages)[0] == wanted


def test_our_own_chat_answer_comes_back() -> None:
    choice = {"index": 0, "text": "it is", "token_ids": [5], "finish_reason": "stop"}
    result = build_result(
        endpoint=CHAT,
        job_id="job_1",
        model="m",
        created=1,
        choices=[choice],
        prompt_tokens=1,
        extras={},
    )
    wanted = TOKENIZER.encode_chat([USER, {"role": "assistant", "content": "it is"}, USER])
    read = ChatCompletion.model_validate(result).choices[0].message
    for message in (
        result["choices"][0]["message"],
        read.model_dump(),
        read.model_dump(exclude_unset=True),
    ):
        body = {"model": "m", "messages": [USER, message, USER]}
        assert parse(CHAT, body, streaming=True).resolve(CARD, TOKENIZER).prompt_token_ids == wanted


def test_our_own_response_comes_back() -> None:
    asked = parse(RESPONSES, {"model": "m", "input": "hi"}, streaming=True).resolve(CARD, TOKENIZER)
    tops = [
        {"token": "it", "bytes": [105, 116], "logprob": -0.5, "top": [["it", [105, 116], -0.5]]}
    ]
    result = response_objects.build_result(
        job_id="job_1",
        model="m",
        created=1,
        completed=2,
        params=asked.params_json(),
        choice={"text": "it is", "token_ids": [5], "finish_reason": "stop", "logprobs": tops},
        prompt_tokens=1,
        extras={},
    )
    read = Response.model_validate(result).output[0]
    wanted = TOKENIZER.encode_chat([USER, {"role": "assistant", "content": "it is"}, USER])
    for item in (result["output"][0], read.model_dump(), read.model_dump(exclude_unset=True)):
        body = {
            "model": "m",
            "input": [USER, item, {"type": "reasoning", "id": "rs_1", "summary": []}, USER],
        }
        assert (
            parse(RESPONSES, body, streaming=True).resolve(CARD, TOKENIZER).prompt_token_ids
            == wanted
        )


def test_reasoning_reaches_the_template() -> None:
    for name in ("reasoning_content", "reasoning"):
        answer = {"role": "assistant", "content": None, name: "because"}
        request = parse(CHAT, {"model": "m", "messages": [USER, answer]}, streaming=True)
        assert isinstance(request, ParsedRequest) and request.messages is not None
        said = {
            "role": "assistant",
            "content": "",
            "reasoning_content": "because",
            "reasoning": "because",
        }
        assert request.messages[1] == said


@pytest.mark.parametrize(
    ("endpoint", "body", "param"),
    [
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "colour": 1}]}
                ]
            },
            "messages[0].content[0].colour",
        ),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "annotations": [1]}]}
                ]
            },
            "messages[0].content[0].annotations",
        ),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": 1}]}
                ]
            },
            "messages[0].content[0].cache_control",
        ),
        (
            CHAT,
            {
                "messages": [
                    {"role": "user", "content": [{"type": "text", "text": "a", "logprobs": []}]}
                ]
            },
            "messages[0].content[0].logprobs",
        ),
        (CHAT, {"messages": [{**USER, "colour": 1}]}, "messages[0].colour"),
        (CHAT, {"messages": [{**USER, "reasoning_content": "x"}]}, "messages[0].reasoning_content"),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "", "reasoning": 5}]},
            "messages[0].reasoning",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "a", "tool_calls": [{}, 1]}]},
            "messages[0].tool_calls",
        ),
        (
            CHAT,
            {"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]},
            "messages[0].refusal",
        ),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content"),
        (
            RESPONSES,
            {
                "input": [
                    {"role": "user", "content": [{"type": "input_text", "text": "a", "colour": 1}]}
                ]
            },
            "input[0].content[0].colour",
        ),
        (RESPONSES, {"input": [{**USER, "colour": 1}]}, "input[0].colour"),
        (RESPONSES, {"input": [{**USER, "status": 5}]}, "input[0].status"),
        (
            RESPONSES,
            {"input": "a", "text": {"format": {"type": "text", "colour": 1}}},
            "text.format.colour",
        ),
        (
            CHAT,
            {"messages": [USER], "response_format": {"type": "text", "colour": 1}},
            "response_format.colour",
        ),
        (
            CHAT,
            {
                "messages": [USER],
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "a", "schema": {}, "colour": 1},
                },
            },
            "response_format.json_schema.colour",
        ),
        (
            CHAT,
            {"messages": [USER], "stream": True, "stream_options": {"colour": 1}},
            "stream_options.colour",
        ),
        (CHAT, {"messages": [USER], "diffusion": {"apd": {"colour": 1}}}, "diffusion.apd.colour"),
        (CHAT, {"messages": [USER], "diffusion": {"colour": 1}}, "diffusion.colour"),
        (
            CHAT,
            {"messages": [USER], "chat_template_kwargs": {"colour": 1}},
            "chat_template_kwargs.colour",
        ),
        (INFILL, {"parts": ["a", {"hole": 1, "colour": 1}]}, "parts[1].colour"),
        (
            LOGLIKELIHOOD,
            {"pairs": [{"context": "a", "continuation": "b", "colour": 1}]},
            "pairs[0].colour",
        ),
    ],
)
def test_an_unknown_key_inside_an_object_is_named_in_full(
    endpoint: str, body: dict[str, Any], param: str
) -> None:
    with pytest.raises(VDiffError) as wrong:
        parse(endpoint, {"model": "m", **body}, streaming=True).resolve(CARD, TOKENIZER)
    assert (wrong.value.param, wrong.value.http_status) == (param, 400)


def test_evaluations_take_what_changes_nothing() -> None:
    plain = {"name": "a", "model": "m"}
    more = {
        "n": 1,
        "stream": False,
        "presence_penalty": 0,
        "tools": [],
        "seed": None,
        "logprobs": False,
        "user": "",
        "stop": None,
        "messages": None,
        "skip_special_tokens": True,
        "metadata": {},
    }
    assert parse_configurations([{**plain, **more}]) == parse_configurations([plain])
    for name, value in (("n", 2), ("stream", True), ("messages", [USER]), ("metadata", {"a": "b"})):
        with pytest.raises(VDiffError) as wrong:
            parse_configurations([{**plain, name: value}])
        assert wrong.value.param == f"configurations[0].{name}"


def test_the_client_sends_no_nulls_for_what_is_absent() -> None:
    body = calls.job_body({"messages": None, "prompt": "x", "model": None}, {}, "m")
    assert (body["endpoint"], body["body"]["model"], body["body"]["prompt"]) == (
        COMPLETIONS,
        "m",
        "x",
    )
    assert not calls.names_model(
        {"model": None, "prompt": "x"}, {"model": None, "extra_body": {"model": None}}
    )
    ids = calls.job_body({"prompt": None, "prompt_token_ids": [5, 6]}, {}, "m")["body"]
    assert ids["prompt"] == [5, 6] and "prompt_token_ids" not in ids


def test_the_parts() -> None:
    assert (
        is_nothing({"a": None, "b": {"c": []}})
        and not is_nothing({"a": 0})
        and not is_nothing(False)
    )
    assert changes_nothing("best_of", 3, {"n": 3}) and not changes_nothing("echo", 0, {})
    assert metadata_of({"a": None, "b": "c"}, "metadata") == {"b": "c"}
