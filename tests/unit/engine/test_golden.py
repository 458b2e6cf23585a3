"""The engine against numbers that the published programs computed: token for token, forward for
forward.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from shared.sampling_params import resolve_params
from tests.unit.engine.conftest import GetEngine, make_engine
from tests.unit.engine.golden_cases import ALL, FAMILIES, REFERENCES, Asked
from worker.engine import StepEvent, VDiffEngine
from worker.engine.batch import Pass
from worker.engine.likelihood import MONTE_CARLO, ScoreTask, draw_of

ATOL = 1e-3


def submit(engine: VDiffEngine, one: Asked, listener: Any = None) -> Any:
    params = resolve_params(one.fields, card=engine.card, prompt_tokens=len(one.prompt))
    return engine.submit(one.id, one.prompt, params, listener=listener)


def check(one: Asked, tokens: list[int], forwards: int) -> None:
    if one.prefix_only:
        assert tokens == one.wanted[: len(tokens)]
        assert tokens or not one.wanted
    else:
        assert tokens == one.wanted
    if one.forwards is not None:
        assert forwards == one.forwards


@pytest.mark.parametrize("one", ALL, ids=[one.id for one in ALL])
def test_tokens_and_forwards(engine_of: GetEngine, one: Asked) -> None:
    events: list[StepEvent] = []
    output = submit(engine_of(one.family), one, events.append).result(60).outputs[0]
    check(one, output.token_ids, output.forwards)
    if one.accepted is not None:
        assert [len(e.positions) for e in events] == one.accepted


@pytest.mark.parametrize("family", FAMILIES)
def test_all_cases_of_a_family_in_one_batch(engine_of: GetEngine, family: str) -> None:
    """Different rules, caches, lengths and blocks in shared forwards, in no order."""
    cases = [one for one in ALL if one.family == family]
    random.Random(5).shuffle(cases)
    engine = engine_of(family)
    before = engine.get_stats()
    handles = [(one, submit(engine, one)) for one in cases]
    for one, handle in handles:
        output = handle.result(120).outputs[0]
        check(one, output.token_ids, output.forwards)
    shared, steps = (
        engine.get_stats()[name] - before[name] for name in ("sequence_steps", "steps")
    )
    assert shared > 1.5 * steps


@pytest.mark.parametrize("family", ["llada2_moe", "sdar"])
def test_the_exact_cache_changes_nothing(engine_of: GetEngine, family: str) -> None:
    for one in ALL:
        if one.family == family:
            fields = {**one.fields, "diffusion": {**one.fields["diffusion"], "cache": "none"}}
            again = Asked(
                f"{one.id}/none",
                family,
                one.prompt,
                fields,
                one.wanted,
                one.forwards,
                one.prefix_only,
            )
            output = submit(engine_of(family), again).result(60).outputs[0]
            check(again, output.token_ids, output.forwards)


@pytest.mark.parametrize("family", ["llada2_moe", "sdar"])
def test_a_prompt_stored_in_pieces_changes_nothing(family: str) -> None:
    engine = make_engine(family, max_batched_tokens=40)
    try:
        cases = [one for one in ALL if one.family == family]
        handles = [(one, submit(engine, one)) for one in cases]
        stored = 0
        for one, handle in handles:
            output = handle.result(120).outputs[0]
            check(one, output.token_ids, output.forwards)
            stored += output.prefill_forwards
        assert stored > 0
    finally:
        engine.shutdown()


def test_padding_changes_nothing() -> None:
    """Accelerators pad similar sequences into one attention call. The test above covers the CPU."""
    for family in ("llada", "dream", "sdar"):
        engine = make_engine(family)
        engine.model.pads = True
        try:
            handles = [(one, submit(engine, one)) for one in ALL if one.family == family]
            for one, handle in handles:
                output = handle.result(120).outputs[0]
                check(one, output.token_ids, output.forwards)
        finally:
            engine.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_logits(engine_of: GetEngine, family: str) -> None:
    model = engine_of(family).model
    for entry in REFERENCES[family]["logits"]:
        ids = torch.tensor(entry["input_ids"]).flatten().tolist()
        block = entry.get("block_length", 0)
        with torch.inference_mode():
            [logits] = model.compute(
                [Pass(ids, list(range(len(ids))), 0, "block" if block else "full", block)]
            )
        compare(logits, entry)


def test_logits_of_the_verifier(engine_of: GetEngine) -> None:
    verifier = engine_of("dream").apd.verifier
    assert verifier is not None
    for entry in REFERENCES["dream"]["apd_verifier_logits"]:
        ids = torch.tensor(entry["input_ids"]).flatten().tolist()
        with torch.inference_mode():
            cache = verifier.new_cache(len(ids))
            [logits] = verifier.model.compute(
                [Pass(ids, list(range(len(ids))), 0, "causal", 0, cache, len(ids))]
            )
        compare(logits, entry)


def compare(logits: torch.Tensor, entry: dict[str, Any]) -> None:
    wanted = torch.tensor(entry["top5_logits"]).reshape(-1, 5)
    top = torch.tensor(entry["top5_ids"]).reshape(-1, 5)
    assert torch.allclose(logits.gather(-1, top), wanted, atol=ATOL)


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenizer(engine_of: GetEngine, family: str) -> None:
    tokenizer = engine_of(family).tokenizer
    for one in REFERENCES[family]["tokenizer_checks"]:
        assert tokenizer.encode(one["text"]) == one["ids"]
    for prompt in REFERENCES[family]["prompts"]:
        assert tokenizer.apply_chat_template(prompt["messages"]) == prompt["rendered"]
        assert tokenizer.encode_chat(prompt["messages"]) == prompt["ids"]


LIKELIHOODS = [case for case in REFERENCES["llada"]["cases"] if "log_likelihood" in case]


@pytest.mark.parametrize("case", LIKELIHOODS, ids=[case["id"] for case in LIKELIHOODS])
def test_log_likelihood(engine_of: GetEngine, case: dict[str, Any]) -> None:
    """LLaDA's estimate with the draws of the published program."""
    engine = engine_of("llada")
    context, target = case["prompt_ids"], case["answer_ids"]
    draws = []
    for draw in case["draws"]:
        for row in draw["perturbed"]:
            masked = [
                i
                for i, token in enumerate(row[len(context) :])
                if token == engine.card.mask_token_id
            ]
            draws.append(draw_of(masked, len(target)))
    task = ScoreTask(draws, target, MONTE_CARLO)
    found = engine.loglikelihood(context, target, task=task, cfg_scale=case["args"]["cfg_scale"])
    assert found.value == pytest.approx(case["log_likelihood"], rel=1e-4)
    assert found.forwards == case["args"]["mc_num"]
