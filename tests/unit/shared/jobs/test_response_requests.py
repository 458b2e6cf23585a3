"""The Responses API's body: what it becomes, and that everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from shared.errors import InvalidParameter, VDiffError
from shared.jobs.response_requests import job_id_of, next_messages, parse
from shared.jobs.tasks import ResponseTask, task_of
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper
from vdiff import bundled

CARD = ModelCard(
    name="m",
    family="llada",
    context_length=512,
    vocab_size=757,
    mask_token_id=752,
    end_token_ids=(751,),
    suppress_token_ids={},
    capabilities={"algorithms": ["low_confidence", "sequential"], "caches": ["none"]},
)
TOKENIZER = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))


def body(**more: Any) -> dict[str, Any]:
    return {"model": "m", "input": "hi", **more}


def test_input_instructions_and_earlier_turns_are_one_chat() -> None:
    items = [
        {"role": "developer", "content": "d"},
        {
            "type": "message",
            "role": "assistant",
            "id": "msg_1",
            "status": "completed",
            "content": [{"type": "output_text", "text": "a", "annotations": []}],
        },
        {
            "role": "user",
            "content": [{"type": "input_text", "text": "x"}, {"type": "input_text", "text": "y"}],
        },
    ]
    request = parse(body(input=items, instructions="be"), streaming=True)
    assert request.messages == (("system", "d"), ("assistant", "a"), ("user", "xy"))
    resolved = request.continuing((("user", "before"),)).resolve(CARD, TOKENIZER)
    wanted = "<|system|>be<|eot_id|><|user|>before<|eot_id|><|system|>d<|eot_id|><|assistant|>a<|eot_id|><|user|>xy<|eot_id|>"
    assert resolved.prompt_token_ids == TOKENIZER.encode(wanted + "<|assistant|>")
    task = task_of(resolved.params_json())
    assert task == resolved.task and isinstance(task, ResponseTask)
    answered = next_messages(task, [{"content": [{"text": "z"}]}])
    assert answered == (("user", "before"), *request.messages, ("assistant", "z"))


def test_an_empty_input_is_an_empty_message() -> None:
    request = parse(body(input=""), streaming=True)
    assert request.messages == (("user", ""),)
    assert request.resolve(CARD, TOKENIZER).prompt_token_ids == TOKENIZER.encode(
        "<|user|><|eot_id|><|assistant|>"
    )


def test_fields_get_our_names_and_errors_theirs() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    given = body(
        max_output_tokens=30, temperature=0.5, text={"format": form}, top_logprobs=3, seed=4
    )
    params = parse(given, streaming=True).resolve(CARD, TOKENIZER).params
    assert (params.max_tokens, params.temperature, params.logprobs, params.seed) == (30, 0.5, 3, 4)
    assert params.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": schema, "strict": True},
    }
    assert parse(body(), streaming=True).resolve(CARD, TOKENIZER).params.max_tokens == 256
    for more, param in (
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "schema": {}}}}, "text.format.name"),
        (
            {"text": {"format": {**form, "schema": {"items": {"not": {}}}}}},
            "text.format.schema.items.not",
        ),
        ({"diffusion": {"steps": 0}}, "diffusion.steps"),
        ({"logit_bias": {"x": 1}}, "logit_bias.x"),
    ):
        with pytest.raises(VDiffError) as wrong:
            parse(body(**more), streaming=True).resolve(CARD, TOKENIZER)
        assert (wrong.value.param, wrong.value.http_status) == (param, 400)
        assert "response_format" not in wrong.value.message


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"input": [{"type": "reasoning", "summary": [{"text": "x"}]}]}, "input[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": "x", "colour": 1}]}, "input[0].colour"),
        ({"model": None}, "model"),
        ({"instructions": 5}, "instructions"),
        ({"instructions": []}, "instructions"),
        ({"colour": 1}, "colour"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"conversation": "c"}, "conversation"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": "x"}, "include"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"text": "x"}, "text"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"stream": 1}, "stream"),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        (
            {"stream": True, "stream_options": {"include_usage": True}},
            "stream_options.include_usage",
        ),
        ({"background": True, "store": False}, "store"),
        ({"previous_response_id": "x"}, "previous_response_id"),
        ({"diffusion": {"visualize": True}}, "diffusion.visualize"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"n": 2}, "n"),
    ],
)
def test_bad_bodies(more: dict[str, Any], param: str) -> None:
    with pytest.raises(VDiffError) as wrong:
        parse(body(**more), streaming=True)
    assert (wrong.value.param, wrong.value.http_status) == (param, 400)


def test_what_has_no_place_in_a_job() -> None:
    for name, value in (("stream", True), ("background", True), ("store", False)):
        with pytest.raises(InvalidParameter) as wrong:
            parse(body(**{name: value}), streaming=False)
        assert wrong.value.param == name
    line = parse(body(previous_response_id="resp_" + "0" * 26), streaming=False)
    with pytest.raises(InvalidParameter, match="line of a batch"):
        line.resolve(CARD, TOKENIZER)


def test_ids() -> None:
    assert job_id_of("resp_" + "0" * 26) == "job_" + "0" * 26
    assert job_id_of("job_" + "0" * 26) == "job_" + "0" * 26  # is looked up, and is no response
    assert job_id_of("resp_x") == "resp_x"
