"""The shape of the endpoints' bodies: what is taken, and that everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import InvalidParameter, MissingParameter, UnknownParameter, VDiffError
from shared.jobs.bodies import Request, parse
from shared.jobs.responses import CHAT, COMPLETIONS
from shared.model_card import ModelCard
from shared.sampling_params import GENERATION_FIELDS
from shared.tokenizer import TokenizerWrapper
from vdiff import bundled

USER = [{"role": "user", "content": "hi"}]


def chat(streaming: bool = True, **more: Any) -> Request:
    return parse(CHAT, {"model": "m", "messages": USER, **more}, streaming=streaming)


def completion(streaming: bool = True, **more: Any) -> Request:
    return parse(COMPLETIONS, {"model": "m", "prompt": "x", **more}, streaming=streaming)


def param_of(
    error: type[VDiffError], endpoint: str, body: Any, streaming: bool = True
) -> str | None:
    with pytest.raises(error) as wrong:
        parse(endpoint, body, streaming=streaming)
    return wrong.value.param


def test_generation_fields_go_through_untouched() -> None:
    values = {name: object() for name in GENERATION_FIELDS if name != "logprobs"}
    assert chat(**values).fields == values
    assert completion(**values).fields == values


def test_null_is_absent() -> None:
    assert chat(seed=None, tools=None, stream=None, logit_bias=None, colour=None).fields == {}
    assert param_of(MissingParameter, CHAT, {"model": None, "messages": USER}) == "model"
    assert param_of(MissingParameter, CHAT, {"model": "m", "messages": None}) == "messages"
    assert param_of(MissingParameter, COMPLETIONS, {"model": "m", "prompt": None}) == "prompt"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0),
        ("presence_penalty", 0.0),
        ("frequency_penalty", 0),
        ("best_of", 1),
        ("echo", False),
        ("suffix", ""),
        ("store", False),
        ("tools", []),
        ("logprobs", False),
        ("parallel_tool_calls", True),
        ("modalities", ["text"]),
        ("user", "u"),
        ("service_tier", "auto"),
        ("safety_identifier", "s"),
        ("prompt_cache_key", "k"),
    ],
)
def test_openais_fields_are_taken_where_they_change_nothing(name: str, value: Any) -> None:
    assert set(completion(**{name: value}).fields) <= {"logprobs"}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("presence_penalty", 0.5),
        ("frequency_penalty", False),
        ("best_of", 2),
        ("echo", True),
        ("suffix", "x"),
        ("store", True),
        ("tools", [{}]),
        ("modalities", ["audio"]),
        ("tool_choice", "required"),
        ("functions", [{}]),
        ("reasoning_effort", "low"),
        ("audio", {}),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("prediction", {}),
        ("min_p", 0.1),
        ("repetition_penalty", 1.1),
        ("colour", 1),
    ],
)
def test_what_is_not_served_is_refused_by_name(name: str, value: Any) -> None:
    body = {"model": "m", "messages": USER, name: value}
    assert param_of(UnknownParameter, CHAT, body) == name


def test_each_endpoint_has_its_own_fields() -> None:
    assert (
        param_of(UnknownParameter, CHAT, {"model": "m", "messages": USER, "prompt": "x"})
        == "prompt"
    )
    assert (
        param_of(UnknownParameter, COMPLETIONS, {"model": "m", "prompt": "x", "messages": USER})
        == "messages"
    )
    assert param_of(
        UnknownParameter, COMPLETIONS, {"model": "m", "prompt": "x", "max_completion_tokens": 1}
    ) == ("max_completion_tokens")
    assert param_of(InvalidParameter, "/v1/none", {}) == "endpoint"
    for body in ([], "x", None, 5):
        assert param_of(InvalidParameter, CHAT, body) == "body"


def test_max_completion_tokens_is_max_tokens() -> None:
    assert chat(max_completion_tokens=5).fields == {"max_tokens": 5}
    assert chat(max_tokens=5, max_completion_tokens=5).fields == {"max_tokens": 5}
    both = {"model": "m", "messages": USER, "max_tokens": 5, "max_completion_tokens": 6}
    assert param_of(InvalidParameter, CHAT, both) == "max_completion_tokens"


def test_a_bad_value_carries_the_clients_own_name() -> None:
    tokenizer = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))
    card = ModelCard(
        name="m",
        family="llada",
        context_length=64,
        vocab_size=9,
        mask_token_id=8,
        end_token_ids=(7,),
        suppress_token_ids={},
        capabilities={"algorithms": ["low_confidence"]},
    )
    assert chat(max_completion_tokens=5).params(card, tokenizer, 10).max_tokens == 5
    for name in ("max_completion_tokens", "max_tokens"):
        for value in (0, 55, "x"):
            with pytest.raises(InvalidParameter, match=f"^{name} ") as wrong:
                chat(**{name: value}).params(card, tokenizer, 10)
            assert wrong.value.param == name


@pytest.mark.parametrize("model", [5, "", [], {"a": 1}])
def test_a_model_is_a_name(model: Any) -> None:
    assert param_of(InvalidParameter, CHAT, {"model": model, "messages": USER}) == "model"


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    made = parse(
        CHAT,
        {
            "model": "m",
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": parts, "name": "u"},
            ],
        },
        streaming=True,
    )
    assert made.messages == [
        {"role": "system", "content": "d"},
        {"role": "user", "content": "ab", "name": "u"},
    ]
    assert made.characters == len("systemduserabu")  # all that a template may render
    answer = {
        "role": "assistant",
        "content": "a",
        "refusal": None,
        "tool_calls": None,
    }  # as the SDK sends ours back
    assert chat(messages=[*USER, answer]).messages == [*USER, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ({}, "messages"),
        (USER * 1001, "messages"),
        (["x"], "messages[0]"),
        ([{"role": "user", "content": "x", "name": 5}], "messages[0].name"),
        ([*USER, {"role": "tool", "content": "x"}], "messages[1].role"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": {}}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content[0]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": 5}]}],
            "messages[0].content[0].text",
        ),
    ],
)
def test_bad_messages(messages: Any, param: str) -> None:
    assert param_of(InvalidParameter, CHAT, {"model": "m", "messages": messages}) == param


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [("x", "x", None), (["x"], "x", None), ([1, 2], None, [1, 2]), ([[1, 2]], None, [1, 2])],
)
def test_prompts(prompt: Any, text: str | None, ids: list[int] | None) -> None:
    made = completion(prompt=prompt)
    assert (made.prompt, made.prompt_token_ids) == (text, ids)


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [True], [1.5], 5, {}])
def test_bad_prompts(prompt: Any) -> None:
    assert param_of(InvalidParameter, COMPLETIONS, {"model": "m", "prompt": prompt}) == "prompt"


def test_streaming() -> None:
    assert not chat().stream
    assert chat(stream=True, stream_options={"include_usage": True}).include_usage
    assert not chat(stream=True, stream_options={"include_usage": False}).include_usage
    base = {"model": "m", "messages": USER}
    for more, param in (
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": []}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ):
        assert param_of(InvalidParameter, CHAT, {**base, **more}) == param
    assert param_of(InvalidParameter, CHAT, {**base, "stream": True}, streaming=False) == "stream"
    assert not chat(streaming=False, stream=False).stream


def test_metadata_is_bounded_as_openais() -> None:
    assert chat(metadata={"a": "b"}).metadata == {"a": "b"}
    base = {"model": "m", "messages": USER}
    for metadata, param in (
        ({str(i): "x" for i in range(17)}, "metadata"),
        ({"": "x"}, "metadata"),
        ({"k" * 65: "x"}, "metadata"),
        ({"a": "v" * 513}, "metadata.a"),
        ({"a": 1}, "metadata.a"),
        ([], "metadata"),
        ("x", "metadata"),
    ):
        assert param_of(InvalidParameter, CHAT, {**base, "metadata": metadata}) == param


def test_tokens_of_a_request() -> None:
    tokenizer = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))
    card = ModelCard(
        name="m",
        family="llada",
        context_length=64,
        vocab_size=757,
        mask_token_id=752,
        end_token_ids=(751,),
        suppress_token_ids={},
        capabilities={},
    )
    assert chat().tokens(card, tokenizer) == tokenizer.encode("<|user|>hi<|eot_id|><|assistant|>")
    assert completion(prompt="hi").tokens(card, tokenizer) == tokenizer.encode("hi")
    assert completion(prompt=[1, 756]).tokens(card, tokenizer) == [1, 756]
    for ids in ([757], [-1]):
        with pytest.raises(InvalidParameter, match="from 0 to 756"):
            completion(prompt=ids).tokens(card, tokenizer)


def test_a_field_that_is_nearly_one_is_told_so() -> None:
    with pytest.raises(
        UnknownParameter,
        match=r"mesages is not a field of /v1/chat/completions; did you mean messages\?",
    ):
        parse(CHAT, {"model": "m", "mesages": []}, streaming=False)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("threshold", "threshold"), ("treshold", "threshold"), ("algoritm", "algorithm")],
)
def test_a_field_that_belongs_inside_of_diffusion_is_told_so(name: str, meant: str) -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], name: ""}
    with pytest.raises(
        UnknownParameter, match=rf"^{name} is not a field of .*; did you mean diffusion\.{meant}\?$"
    ):
        parse(CHAT, body, streaming=False)
