"""Many scores as one handle of the engine: a few at a time, in order, all together when one fails
or somebody stops them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from shared.errors import InvalidParameter
from shared.jobs.tasks import ScoreTask
from shared.sampling_params import SamplingParams
from tests.unit.engine.golden_cases import GOLDEN
from worker.engine import VDiffConfig, VDiffEngine
from worker.engine.outputs import StepEvent
from worker.scores import Scores

PAIRS = [([5, 6, 7 + i], [8, 9 + i]) for i in range(7)]


@pytest.fixture(scope="module")
def engine() -> Iterator[VDiffEngine]:
    with VDiffEngine(
        VDiffConfig(model=str(GOLDEN / "llada"), num_threads=1, max_num_seqs=2)
    ) as made:
        yield made


class Counting:
    """The engine, and how many requests were in it at once."""

    def __init__(self, engine: VDiffEngine) -> None:
        self._engine = engine
        self.at_once = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def submit_score(self, *args: Any, **more: Any) -> Any:
        handle = self._engine.submit_score(*args, **more)
        self.at_once = max(self.at_once, len(self._engine._handles))
        return handle


def scores(
    engine: Any,
    pairs: list[tuple[list[int], list[int]]],
    listener: Any = lambda _: None,
    **more: Any,
) -> Scores:
    task = ScoreTask(
        "monte_carlo", tuple((len(a), len(b)) for a, b in pairs), **{"mc_num": 8, **more}
    )
    ids = [token for a, b in pairs for token in (*a, *b)]
    params = SamplingParams(max_tokens=sum(len(b) for _, b in pairs), temperature=0.0, seed=3)
    return Scores(engine, "job/1", ids, params, task, priority=0, listener=listener)


def test_each_gets_its_own_score_a_few_at_a_time(engine: VDiffEngine) -> None:
    counting, told = Counting(engine), list[StepEvent]()
    output = scores(counting, PAIRS, told.append).result()
    alone = [engine.loglikelihood(a, b, mc_num=8, seed=3).value for a, b in PAIRS]
    assert [s.value for s in output.scores if s is not None] == pytest.approx(alone, abs=1e-4)
    assert counting.at_once <= 2
    assert output.metrics.forwards == 7 * 8
    assert (told[-1].step, told[-1].tokens_committed, told[-1].tokens_total) == (56, 14, 14)
    assert [event.step for event in told] == sorted(event.step for event in told)


def test_a_timeout_may_be_followed_by_another_wait(engine: VDiffEngine) -> None:
    handle = scores(engine, PAIRS, mc_num=64)
    with pytest.raises(TimeoutError):
        handle.result(0.0)
    assert len(handle.result().scores) == 7


def test_stopping_ends_all_and_keeps_what_there_is(engine: VDiffEngine) -> None:
    first = threading.Event()
    handle = scores(engine, [([5, 6], [7] * 60)] * 40, lambda _: first.set(), mc_num=1024)
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(handle.result()))
    thread.start()
    assert first.wait(60)
    handle.abort()
    thread.join(60)
    assert not results[0].finished
    assert len(results[0].scores) < 40
    assert not engine.has_work


def test_one_that_cannot_be_takes_the_others_back(engine: VDiffEngine) -> None:
    wrong = [*PAIRS[:1], ([5], [10**6]), *PAIRS[1:]]
    with pytest.raises(InvalidParameter):
        scores(engine, wrong, mc_num=512).result()
    assert engine.drain(60) is True
