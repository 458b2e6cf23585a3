"""A request's result is its own: tokens do not depend on who shares the batch, on arrival, or on
being set aside.
"""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
import torch

from shared.sampling_params import SamplingParams
from tests.unit.engine.conftest import GetEngine, make_engine
from tests.unit.engine.fuzz import fuzz_round, random_requests
from worker.engine import VDiffEngine

FAMILIES = ("llada", "dream", "llada2_moe", "sdar")
# until one that runs is set aside: on a busy machine all may be over before the urgent ones are
# sent
TRIES = 20


def run(
    engine: VDiffEngine, name: str, prompt: list[int], params: SamplingParams, priority: int = 0
) -> Any:
    return engine.submit(name, prompt, params, priority=priority)


@pytest.mark.parametrize("family", FAMILIES)
def test_batch_equals_alone(engine_of: GetEngine, family: str) -> None:
    engine = engine_of(family)
    requests = random_requests(engine, 24, seed=7)
    alone = [
        run(engine, f"alone-{i}", *r).result(60).outputs[0].token_ids
        for i, r in enumerate(requests)
    ]
    rng = random.Random(1)
    order = list(range(len(requests)))
    rng.shuffle(order)
    handles = {}
    for i in order:  # joining at different steps of the others
        handles[i] = run(engine, f"together-{i}", *requests[i], priority=rng.randrange(3))
        if rng.random() < 0.3:
            time.sleep(0.01)
    assert [handles[i].result(60).outputs[0].token_ids for i in range(len(requests))] == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_being_set_aside_changes_nothing(family: str) -> None:
    """One slot and little K/V memory: bulk answers are set aside and swapped out whenever something
    urgent arrives.
    """
    engine = make_engine(family, max_num_seqs=2, cache_tokens=150)
    try:
        requests = random_requests(engine, 10, seed=11)
        alone = [
            run(engine, f"alone-{i}", *r).result(60).outputs[0].token_ids
            for i, r in enumerate(requests)
        ]
        for again in range(TRIES):
            bulk = [
                run(engine, f"bulk-{again}-{i}", *r, priority=2) for i, r in enumerate(requests)
            ]
            urgent = []
            for i, request in enumerate(requests):
                time.sleep(0.004)
                urgent.append(run(engine, f"urgent-{again}-{i}", *request))
            assert [h.result(60).outputs[0].token_ids for h in bulk] == alone
            assert [h.result(60).outputs[0].token_ids for h in urgent] == alone
            stats = engine.get_stats()
            if stats["preemptions"]:
                break
        assert stats["preemptions"] > 0
        assert (stats["running"], stats["waiting"], stats["cache_tokens_in_use"]) == (0, 0, 0)
    finally:
        engine.shutdown()


def test_the_same_seed_says_the_same_and_answers_differ(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    params = SamplingParams(n=3, max_tokens=12, temperature=1.0, seed=5, ignore_eos=True)
    first, second = (engine.submit(f"seed-{i}", [5, 6, 7], params).result(60) for i in range(2))
    texts = [o.token_ids for o in first.outputs]
    assert texts == [o.token_ids for o in second.outputs]
    assert len({tuple(t) for t in texts}) == 3
    other = engine.submit("seed-2", [5, 6, 7], params.with_seed(6)).result(60)
    assert [o.token_ids for o in other.outputs] != texts


def test_one_slow_or_poisoned_request_is_alone_with_its_trouble(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = make_engine("llada")
    try:
        good = SamplingParams(max_tokens=8, temperature=0.0)
        wanted = engine.submit("before", [5, 6, 7], good).result(60).outputs[0].token_ids
        compute = engine.model.compute

        def poisoned(passes: Any) -> Any:
            for p, logits in zip(passes, compute(passes), strict=True):
                yield torch.full_like(logits, torch.nan) if p.ids[0] == 9 else logits

        def memory(passes: Any) -> Any:
            if any(p.ids[0] == 9 for p in passes):
                raise torch.OutOfMemoryError("no room")
            yield from compute(passes)

        def broken(passes: Any) -> Any:
            if any(p.ids[0] == 9 for p in passes):
                raise ZeroDivisionError("a bug")
            yield from compute(passes)

        for fault, code in (
            (poisoned, "not_finite"),
            (memory, "out_of_memory"),
            (broken, "engine_error"),
        ):
            monkeypatch.setattr(engine.model, "compute", fault, raising=False)
            bad = engine.submit(f"bad-{code}", [9, 6, 7], good)
            others = [engine.submit(f"{code}-{i}", [5, 6, 7], good) for i in range(5)]
            assert [h.result(60).outputs[0].token_ids for h in others] == [wanted] * 5
            with pytest.raises(Exception) as wrong:  # the code tells
                bad.result(60)
            assert getattr(wrong.value, "code", None) == code
        assert engine.get_health().healthy
    finally:
        engine.shutdown()


@pytest.mark.parametrize("family", FAMILIES)
def test_fuzz_with_joins_aborts_and_preemptions(family: str) -> None:
    """Invariants at every step; slots and memory all come back."""
    engine = make_engine(family, max_num_seqs=4, cache_tokens=400)
    try:
        for seed in range(23, 23 + TRIES):
            fuzz_round(engine, seed=seed, count=60)
            if engine.get_stats()["preemptions"]:
                break
        assert engine.get_stats()["preemptions"] > 0
    finally:
        engine.shutdown()


def test_an_abort_frees_the_slot_within_a_step() -> None:
    engine = make_engine("llada", max_num_seqs=1)
    try:
        steps: list[int] = []
        slow = SamplingParams(max_tokens=400, temperature=0.0, ignore_eos=True)
        long = engine.submit("long", [5, 6, 7], slow, listener=lambda e: steps.append(e.step))
        while len(steps) < 3:
            time.sleep(0.001)
        long.abort()
        output = long.result(60).outputs[0]
        assert output.finish_reason == "abort"
        assert len(output.token_ids) <= len(steps)
        assert engine.submit("next", [5, 6, 7], SamplingParams(max_tokens=4)).result(60).finished
    finally:
        engine.shutdown()
