"""`logit_bias`: a banned token never appears, a boosted one does, and whoever shares the batch is
left alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from shared.errors import InvalidParameter
from shared.sampling_params import SamplingParams, resolve_params
from tests.unit.engine.conftest import GetEngine, make_engine
from worker.engine import VDiffEngine

PROMPT = [5, 6, 7, 11]
TOKENS = 12


@pytest.fixture(scope="module")
def gemma() -> Iterator[VDiffEngine]:
    made = make_engine("diffusion_gemma")
    yield made
    made.shutdown()


def asked(engine: VDiffEngine, algorithm: str, **more: Any) -> SamplingParams:
    diffusion: dict[str, Any] = {"algorithm": algorithm}
    if algorithm == "renoise":
        diffusion |= {"max_denoising_steps": 4, "entropy_bound": 1.0}
    fields = {
        "max_tokens": TOKENS,
        "seed": 3,
        "temperature": 1.0,
        "ignore_eos": True,
        "diffusion": diffusion,
        **more,
    }
    return resolve_params(fields, card=engine.card, prompt_tokens=len(PROMPT))


def tokens(engine: VDiffEngine, name: str, params: SamplingParams) -> list[int]:
    return engine.submit(name, PROMPT, params).result(60).outputs[0].token_ids


def check(engine: VDiffEngine, algorithm: str) -> None:
    plain = asked(engine, algorithm)
    usual = tokens(engine, f"{algorithm}-plain", plain)
    banned = asked(engine, algorithm, logit_bias={str(t): -100 for t in set(usual)})
    wanted = next(
        t
        for t in range(engine.card.vocab_size)
        if t not in usual and t != engine.card.mask_token_id
    )
    boosted = asked(engine, algorithm, logit_bias={str(wanted): 100})
    nudged = asked(engine, algorithm, logit_bias={str(t): 0.01 for t in range(50, 90)})
    handles = [
        engine.submit(f"{algorithm}-{i}", PROMPT, p)
        for i, p in enumerate((banned, plain, boosted, plain, nudged))
    ]
    without, first, only, second, hardly = (h.result(60).outputs[0].token_ids for h in handles)
    assert not set(without) & set(usual), algorithm
    assert only == [wanted] * TOKENS, algorithm
    assert first == second == usual, algorithm
    assert hardly == tokens(engine, f"{algorithm}-nudged", nudged)


@pytest.mark.parametrize("family", ["llada", "dream", "llada2_moe", "sdar"])
def test_every_algorithm_of_a_masked_family(engine_of: GetEngine, family: str) -> None:
    engine = engine_of(family)
    for algorithm in engine.card.capabilities["algorithms"]:
        check(engine, algorithm)


def test_a_uniform_family(gemma: VDiffEngine) -> None:
    check(gemma, "renoise")


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_apd_follows_it_on_both_sides(engine_of: GetEngine, weight: float) -> None:
    """Boosting one token makes both models say it, so that the verifier accepts the whole draft in
    one step.
    """
    engine = engine_of("dream")
    diffusion = {"algorithm": "apd", "mixture_weight": weight}
    params = asked(engine, "apd", logit_bias={"17": 100}, diffusion=diffusion, temperature=0.0)
    answer = engine.submit(f"apd-{weight}", PROMPT, params).result(60).outputs[0]
    assert answer.token_ids == [17] * TOKENS
    assert answer.forwards == 1


def test_logprobs_are_those_of_the_biased_logits(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    params = asked(engine, "sequential", logit_bias={"17": 100, "18": -100}, logprobs=20)
    answer = engine.submit("logprobs", PROMPT, params).result(60).outputs[0]
    assert answer.logprobs is not None
    assert all(
        t.token_id == 17 and t.logprob == pytest.approx(0.0, abs=1e-4) for t in answer.logprobs
    )
    assert "Infinity" not in json.dumps([t.top for t in answer.logprobs])


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([1], "logit_bias"),
        ("x", "logit_bias"),
        ({"x": 1}, "logit_bias.x"),
        ({"-1": 1}, "logit_bias.-1"),
        ({"1.0": 1}, "logit_bias.1.0"),
        ({"999999999999": 1}, "logit_bias.999999999999"),
        ({"5": 101}, "logit_bias.5"),
        ({"5": "1"}, "logit_bias.5"),
        ({"5": True}, "logit_bias.5"),
        ({"5": float("nan")}, "logit_bias.5"),
        ({"5": 1, "05": 2}, "logit_bias.5"),
        ({str(i): 1 for i in range(1025)}, "logit_bias"),
        ({"５": 1}, "logit_bias.５"),
    ],
)
def test_bad_values_are_named(engine_of: GetEngine, value: Any, param: str) -> None:
    with pytest.raises(InvalidParameter) as wrong:
        asked(engine_of("llada"), "random", logit_bias=value)
    assert wrong.value.param == param


def test_neither_the_mask_nor_everything(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    for value in (
        {str(engine.card.mask_token_id): 1},
        {str(i): -100 for i in range(engine.card.vocab_size)},
    ):
        value.pop(str(engine.card.mask_token_id)) if len(value) > 1 else None
        with pytest.raises(InvalidParameter, match="logit_bias"):
            asked(engine, "random", logit_bias=value)


def test_it_survives_json_and_python(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    params = asked(engine, "random", logit_bias={"17": -100, "5": 3, "6": 0})
    assert params.logit_bias == ((5, 3.0), (17, -100.0))
    assert SamplingParams.from_json(json.loads(json.dumps(params.to_json()))) == params
    with pytest.raises(InvalidParameter, match="logit_bias"):
        engine.submit("python", PROMPT, SamplingParams(logit_bias=((10**6, 1.0),)))
