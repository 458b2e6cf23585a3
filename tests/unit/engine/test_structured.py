"""`response_format`: whatever a model with random weights would like to say, the answer parses and
satisfies its schema.
"""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest
import torch

from scripts.tiny_tasks import evaluation_set
from shared.errors import InvalidParameter
from shared.sampling_params import SamplingParams, resolve_params
from tests.unit.engine.conftest import GetEngine, make_engine
from vdiff import bundled
from worker.engine import StepEvent, VDiffConfig, VDiffEngine

PROMPT = [5, 6, 7, 11]
PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {
            "type": "array",
            "items": {"enum": ["red", "green", "blue"]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
LIST = {"type": "array", "items": {"type": "string"}}
TREE = {
    "$ref": "#/$defs/node",
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "value": {"type": "number"},
                "next": {"$ref": "#/$defs/node"},
                "note": {"type": "string"},
            },
            "required": ["value"],
            "additionalProperties": False,
        }
    },
}
SCHEMAS: list[dict[str, Any]] = [
    PERSON,
    LIST,
    TREE,
    {},
    {"type": "integer"},
    {"type": "number", "minimum": -5, "maximum": 5},
    {"type": "boolean"},
    {"type": "null"},
    {"type": "string", "minLength": 3, "maxLength": 8},
    {"type": "string", "pattern": "^[a-c]{2}-[0-9]+$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "uuid"},
    {"const": {"a": [1, "x"]}},
    {"enum": ["one", 2, None, [True]]},
    {"type": ["string", "null"]},
    {
        "anyOf": [
            {"type": "array", "items": {"type": "integer"}, "minItems": 2},
            {"type": "boolean"},
        ]
    },
    {
        "type": "array",
        "prefixItems": [{"type": "integer"}, {"enum": ["x", "y"]}],
        "items": False,
        "minItems": 2,
    },
    {
        "type": "object",
        "properties": {"a": {}},
        "required": ["b"],
        "additionalProperties": {"type": "boolean"},
    },
    {
        "type": "object",
        "patternProperties": {"^k_": {"type": "integer"}},
        "additionalProperties": False,
    },
    {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"required": ["b"]},
        ]
    },
    {
        "type": "object",
        "properties": {k: {"type": "string"} for k in "abcdef"},
        "required": ["f", "b"],
    },
]


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "json_schema",
        "json_schema": {"name": "made", "strict": True, "schema": schema},
    }


def asked(engine: VDiffEngine, response_format: dict[str, Any], **more: Any) -> SamplingParams:
    fields = {
        "max_tokens": 96,
        "seed": 3,
        "temperature": 0.0,
        "response_format": response_format,
        **more,
    }
    return resolve_params(fields, card=engine.card, prompt_tokens=len(PROMPT))


def random_requests(engine: VDiffEngine, seed: int) -> list[tuple[dict[str, Any], SamplingParams]]:
    """Every schema with a way of decoding."""
    rng = random.Random(seed)
    made = []
    for schema in SCHEMAS:
        algorithm = rng.choice(["sequential", "threshold"])
        diffusion: dict[str, Any] = {
            "algorithm": algorithm,
            "block_length": rng.choice([8, 32, 96]),
        }
        if algorithm == "threshold":
            diffusion["threshold"] = rng.choice([0.02, 0.5])
        elif rng.random() < 0.5:
            diffusion["tokens_per_step"] = 3
        windowed = algorithm == "sequential" and engine.card.regime == "full" and rng.random() < 0.5
        if windowed:
            diffusion = {"algorithm": algorithm, "max_lookahead": 6, "kv_window": 4}
        elif engine.card.regime == "full":
            diffusion["cache"] = rng.choice(["none", "prefix", "dual"])
            if rng.random() < 0.2:
                diffusion["cfg_scale"] = 0.5
        more: dict[str, Any] = {
            "temperature": rng.choice([0.0, 1.0, 2.0]),
            "seed": rng.randrange(1000),
        }
        if more["temperature"] and rng.random() < 0.5:
            more |= {"top_p": 0.7, "top_k": 5}
        if rng.random() < 0.3:
            more["logit_bias"] = {str(t): rng.choice([-100, 3]) for t in rng.sample(range(400), 20)}
        made.append((schema, asked(engine, of_schema(schema), diffusion=diffusion, **more)))
    return made


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_every_output_satisfies_its_schema_whoever_shares_the_batch(
    engine_of: GetEngine, family: str
) -> None:
    engine = engine_of(family)
    requests = random_requests(engine, seed=17)
    free = resolve_params(
        {"max_tokens": 24, "seed": 4}, card=engine.card, prompt_tokens=len(PROMPT)
    )
    usual = engine.submit("free-alone", PROMPT, free).result(60).outputs[0].token_ids
    handles = [engine.submit(f"{i}", PROMPT, params) for i, (_, params) in enumerate(requests)]
    neighbour = engine.submit("free", PROMPT, free)
    for i, ((schema, params), handle) in enumerate(zip(requests, handles, strict=True)):
        output = handle.result(120).outputs[0]
        assert output.finish_reason == "stop", (schema, output.text)
        jsonschema.validate(
            json.loads(output.text), schema, format_checker=jsonschema.FormatChecker()
        )
        if i % 4 == 0:
            alone = engine.submit(f"alone-{i}", PROMPT, params).result(60).outputs[0]
            assert (alone.token_ids, alone.closed_early) == (output.token_ids, output.closed_early)
    assert neighbour.result(60).outputs[0].token_ids == usual


@pytest.mark.parametrize("max_tokens", range(14, 40, 3))
def test_the_end_is_written_before_the_tokens_run_out(
    engine_of: GetEngine, max_tokens: int
) -> None:
    """However few tokens there are: complete, or said to be cut; and no shorter than it must be."""
    engine = engine_of("llada")
    params = asked(engine, of_schema(PERSON), max_tokens=max_tokens, temperature=1.0, n=3)
    for output in engine.submit(f"short-{max_tokens}", PROMPT, params).result(60).outputs:
        assert len(output.token_ids) <= max_tokens
        if output.finish_reason == "stop":
            jsonschema.validate(json.loads(output.text), PERSON)
        else:
            assert max_tokens < 28, output.text  # {"name": "", "age": 0, "tags": ["red"]} has 28
            assert len(output.token_ids) == max_tokens
    assert (output.finish_reason == "stop") == (max_tokens >= 28)
    whole = asked(engine, {"type": "json_object"}, max_tokens=max_tokens, temperature=1.0, n=3)
    for output in engine.submit(f"object-{max_tokens}", PROMPT, whole).result(60).outputs:
        assert output.finish_reason == "stop" and isinstance(json.loads(output.text), dict)


def test_whatever_is_forced_costs_no_forward(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    fixed = {"const": {"greeting": "hello there", "numbers": [1, 2, 3, 4, 5, 6]}}
    output = engine.submit("const", PROMPT, asked(engine, of_schema(fixed))).result(60).outputs[0]
    assert json.loads(output.text) == fixed["const"]
    assert output.forwards <= 3 < len(output.token_ids)  # a block of 32 each
    assert not output.closed_early


def test_threshold_commits_what_the_model_is_sure_of_from_left_to_right(
    engine_of: GetEngine,
) -> None:
    engine = engine_of("llada")
    positions: list[int] = []

    def listen(event: StepEvent) -> None:
        positions.extend(event.positions)

    def forwards(threshold: float) -> int:
        positions.clear()
        diffusion = {"algorithm": "threshold", "threshold": threshold}
        params = asked(
            engine,
            of_schema({"type": "string", "minLength": 60}),
            max_tokens=64,
            diffusion=diffusion,
        )
        output = (
            engine.submit(f"t{threshold}", PROMPT, params, listener=listen).result(60).outputs[0]
        )
        assert positions == list(range(len(output.token_ids)))
        return output.forwards

    assert forwards(0.001) < forwards(1.0)


def test_log_probabilities_are_the_models_own(engine_of: GetEngine) -> None:
    engine = engine_of("sdar")
    output = (
        engine.submit("lp", PROMPT, asked(engine, of_schema(PERSON), logprobs=2))
        .result(60)
        .outputs[0]
    )
    assert output.logprobs is not None and len(output.logprobs) == len(output.token_ids)
    assert [t.token_id for t in output.logprobs] == output.token_ids
    assert all(t.logprob <= t.top[0][1] and len(t.top) == 2 for t in output.logprobs)
    assert any(
        t.token_id not in [i for i, _ in t.top] for t in output.logprobs
    )  # random weights know no JSON


def test_a_step_made_again_stands_where_it_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Running out of memory behind the walk: the step is made again in halves, and says the same."""
    engine = make_engine("llada")
    try:
        params = asked(engine, of_schema(PERSON), temperature=1.0)
        wanted = engine.submit("before", PROMPT, params).result(60).outputs[0].token_ids
        compute, fail = engine.model.compute, iter(range(10**6))

        def sometimes(passes: Any) -> Any:
            for i, logits in enumerate(compute(passes)):
                yield logits
                if i == 0 and len(passes) > 1 and next(fail) % 3 == 0:
                    raise torch.OutOfMemoryError("no room")

        monkeypatch.setattr(engine.model, "compute", sometimes, raising=False)
        handles = [engine.submit(f"again-{i}", PROMPT, params) for i in range(4)]
        assert [h.result(60).outputs[0].token_ids for h in handles] == [wanted] * 4
        assert next(fail) > 3
    finally:
        engine.shutdown()


def test_vdiff_tiny_writes_its_lists_of_words() -> None:
    """A model that knows the task: constrained it is right as often, in fewer forwards."""
    lines = [
        line
        for line in evaluation_set(per_kind=16)
        if line["metadata"]["kind"] == "json_list"  # type: ignore[index]
    ]
    config = VDiffConfig(model=str(bundled.folder(bundled.DEFAULT_MODEL)), num_threads=1)

    def right(engine: VDiffEngine, params: SamplingParams) -> tuple[int, int]:
        outputs = [o.outputs[0] for o in engine.generate([dict(line) for line in lines], params)]
        if params.response_format is not None:
            assert all(
                isinstance(word, str) for output in outputs for word in json.loads(output.text)
            )
        wanted = [line["metadata"]["answer"] for line in lines]  # type: ignore[index]
        return sum(o.text == w for o, w in zip(outputs, wanted, strict=True)), sum(
            o.forwards for o in outputs
        )

    with VDiffEngine(config) as engine:
        free, free_forwards = right(engine, SamplingParams(max_tokens=32, temperature=0.0))
        made, forwards = right(
            engine, SamplingParams(max_tokens=32, temperature=0.0, response_format=of_schema(LIST))
        )
    assert made >= free > len(lines) / 2
    assert forwards < free_forwards


def test_what_cannot_be_is_refused(engine_of: GetEngine) -> None:
    engine = engine_of("dream")
    format_ = {"type": "json_object"}
    for more, param in (
        ({"diffusion": {"algorithm": "entropy"}}, "diffusion.algorithm"),
        ({"diffusion": {"algorithm": "apd"}}, "diffusion.algorithm"),
        ({"stop": ["x"]}, "stop"),
        ({"stop_token_ids": [5]}, "stop_token_ids"),
        ({"ignore_eos": True}, "ignore_eos"),
        ({"diffusion": {"suppress_end": "logits"}}, "diffusion.suppress_end"),
        ({"diffusion": {"max_forwards": 3}}, "diffusion.max_forwards"),
        ({"diffusion": {"draft_token_ids": [5]}}, "diffusion.draft_token_ids"),
    ):
        with pytest.raises(InvalidParameter) as wrong:
            asked(engine, format_, **more)
        assert wrong.value.param == param
    holes = SamplingParams(max_tokens=2, response_format=format_)
    with pytest.raises(InvalidParameter, match="fits no holes"):
        engine.submit("holes", PROMPT, holes, canvas=[engine.card.mask_token_id] * 2)
    for bad in ({"type": "xml"}, of_schema({"type": "object", "not": {}})):
        with pytest.raises(InvalidParameter):
            engine.submit("python", PROMPT, SamplingParams(response_format=bad))
    with (
        make_engine("diffusion_gemma") as gemma,
        pytest.raises(InvalidParameter, match="left to right"),
    ):
        asked(gemma, format_)
