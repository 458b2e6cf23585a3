"""AsyncVDiffEngine and `generate_async`: the same answers, and whoever stops waiting leaves the
others alone.
"""

from __future__ import annotations

import asyncio
import json
import math
from dataclasses import asdict

import pytest

from shared.diffusion_params import DiffusionParams
from shared.errors import InvalidParameter
from shared.sampling_params import SamplingParams
from tests.unit.engine.conftest import GetEngine
from worker.engine import AsyncVDiffEngine
from worker.engine.models import transformer
from worker.engine.outputs import StepEvent
from worker.engine.report import event_of

LONG = SamplingParams(max_tokens=192, temperature=0.0, ignore_eos=True)
SHORT = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
PROMPT = {"prompt_token_ids": [5, 6, 7, 8]}


async def test_many_at_once_are_each_their_own(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    prompts = [{"prompt_token_ids": [5, 6, i]} for i in range(10, 16)]
    together = await AsyncVDiffEngine(engine).generate(prompts, SHORT)
    alone = [engine.generate(prompt, SHORT) for prompt in prompts]
    assert [o.outputs[0].token_ids for o in together] == [o.outputs[0].token_ids for o in alone]


async def test_a_cancelled_wait_drops_its_request_alone(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    aborted = engine.get_stats()["requests_aborted"]
    other = engine.submit_prompt(PROMPT, LONG)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(engine.generate_async(PROMPT, LONG), 0.02)
    task = asyncio.create_task(AsyncVDiffEngine(engine).generate(PROMPT, LONG))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len((await asyncio.to_thread(other.result, 60)).outputs[0].token_ids) == LONG.max_tokens
    assert (await engine.generate_async(PROMPT, SHORT)).outputs[0].finish_reason == "length"
    assert engine.get_health().healthy
    assert engine.get_stats()["requests_aborted"] == aborted + 2


async def test_leaving_a_stream_drops_its_request(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    aborted = engine.get_stats()["requests_aborted"]
    stream = AsyncVDiffEngine(engine).stream(PROMPT, LONG)
    async for event in stream:
        assert event is not None
        break
    await stream.aclose()
    await engine.generate_async(PROMPT, SHORT)  # at least a step later
    assert engine.get_stats()["requests_aborted"] == aborted + 1


def test_a_step_makes_no_event_when_nobody_listens(
    engine_of: GetEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of("llada")
    events: list[StepEvent] = []
    monkeypatch.setattr(
        "worker.engine.engine.event_of",
        lambda *given: events.append(made := event_of(*given)) or made,
    )
    engine.generate(PROMPT, SHORT)
    assert not events
    engine.submit("heard", PROMPT["prompt_token_ids"], SHORT, listener=lambda event: None).result(
        60
    )
    assert len(events) == SHORT.max_tokens


def test_one_bad_prompt_leaves_none_of_its_list_behind(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    with pytest.raises(InvalidParameter, match="token ids must be"):
        engine.generate([PROMPT, {"prompt_token_ids": [10**6]}], LONG)
    engine.generate(PROMPT, SHORT)
    assert not engine.has_work


def test_logprobs_are_numbers_whatever_is_suppressed(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    suppressed: set[int] = set()
    for _ in range(20):  # until one of them is chosen all the same, with confidence 0
        diffusion = DiffusionParams(
            suppress_end="confidence", suppress_token_ids=tuple(suppressed) or None
        )
        asked = SamplingParams(
            max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3, diffusion=diffusion
        )
        output = engine.generate(PROMPT, asked).outputs[0]
        if suppressed & set(output.token_ids):
            break
        suppressed |= set(output.token_ids)
    else:
        pytest.fail("no suppressed token was chosen")
    assert output.logprobs is not None
    assert all(
        -50 < t.logprob <= 0 and all(math.isfinite(v) for _, v in t.top) for t in output.logprobs
    )
    json.dumps([asdict(t) for t in output.logprobs], allow_nan=False)


@pytest.mark.parametrize(
    "algorithm", ["low_confidence", "entropy_bound", "random", "klass", "credit", "apd"]
)
def test_rows_go_through_the_head_in_bounded_runs(
    engine_of: GetEngine, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    engine = engine_of("dream" if algorithm == "apd" else "llada")
    params = SamplingParams(
        max_tokens=48,
        temperature=0.8,
        seed=3,
        ignore_eos=True,
        logprobs=2,
        top_p=0.9,
        diffusion=DiffusionParams(algorithm=algorithm, block_length=48),
    )
    whole = engine.generate(PROMPT, params).outputs[0]
    rows: list[int] = []
    head = engine.model.logits

    def counted(hidden: object) -> object:
        rows.append(len(hidden))  # type: ignore[arg-type]
        return head(hidden)

    monkeypatch.setattr(engine.model, "logits", counted)
    monkeypatch.setattr(transformer, "HEAD_ROWS", 5)
    monkeypatch.setattr("worker.engine.sampler.CHOICE_NUMBERS", 5 * engine.card.vocab_size)
    cut = engine.generate(PROMPT, params).outputs[0]
    assert cut.token_ids == whole.token_ids
    if algorithm not in ("klass", "credit", "apd"):  # which keep all rows of a step in any case
        assert rows and max(rows) <= 5
