"""Beyond generation: infill, likelihoods, warm start, forwards as a budget; stopping; states and
the watchdog.
"""

from __future__ import annotations

import itertools
import math
import random
import time

import pytest
import torch

from shared.diffusion_params import DiffusionParams
from shared.errors import InvalidParameter
from shared.sampling_params import SamplingParams
from tests.unit.engine.conftest import GetEngine, make_engine
from vdiff import bundled
from worker.engine import EngineState, StepEvent, VDiffConfig, VDiffEngine
from worker.engine.batch import Pass
from worker.engine.likelihood import CHAIN_RULE, MONTE_CARLO, Draw, ScoreTask


def greedy(max_tokens: int, **more: object) -> SamplingParams:
    diffusion = DiffusionParams(
        **{k: v for k, v in more.items() if k in DiffusionParams.__dataclass_fields__}  # type: ignore[arg-type]
    )
    rest = {k: v for k, v in more.items() if k not in DiffusionParams.__dataclass_fields__}
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, diffusion=diffusion, **rest)  # type: ignore[arg-type]


# Infill


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("cache", ["none", "prefix", "dual"])
def test_infill_keeps_what_was_given(engine_of: GetEngine, family: str, cache: str) -> None:
    engine = engine_of(family)
    parts: list[str | int] = ["The cat ", 3, " on the ", 5, " today."]
    filled = engine.infill(parts, greedy(1, cache=cache))
    assert len(filled.holes) == 2
    assert filled.text == f"The cat {filled.holes[0]} on the {filled.holes[1]} today."
    before = engine.tokenizer.encode("The cat ")
    ids = before + filled.output.outputs[0].token_ids
    middle = engine.tokenizer.encode(" on the ")
    assert ids[len(before) + 3 : len(before) + 3 + len(middle)] == middle
    assert engine.card.mask_token_id not in ids
    assert filled.output.outputs[0].forwards <= 8


def test_infill_may_begin_with_a_hole_and_sees_what_follows(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    first = engine.infill([4, " eight legs."]).output.outputs[0].token_ids
    second = engine.infill([4, " no wheels at all."]).output.outputs[0].token_ids
    assert first[:4] != second[:4]


def test_infill_refuses_what_cannot_be(engine_of: GetEngine) -> None:
    for parts, param in ((["no hole"], "parts"), (["x", 0], "parts[1]")):
        with pytest.raises(InvalidParameter) as wrong:
            engine_of("llada").infill(parts)  # type: ignore[arg-type]
        assert wrong.value.param == param
    with pytest.raises(InvalidParameter, match="cannot see what follows"):
        engine_of("sdar").infill(["a", 2, "b"])


# Likelihoods


def test_a_monte_carlo_estimate_has_an_honest_error(engine_of: GetEngine) -> None:
    """For a short answer the exact value is an average over all masks; the estimate agrees within
    its error.
    """
    engine, context, target = engine_of("llada"), [5, 6, 7], [8, 9, 10]
    masks = [m for k in range(1, 4) for m in itertools.combinations(range(3), k)]
    draws = [Draw(m, m, 3 / len(m)) for m in masks]
    weights = [1 / (3 * math.comb(3, len(m))) for m in masks]  # the size is uniform, then the set
    values = []
    for draw in draws:
        values.append(
            engine.loglikelihood(context, target, task=ScoreTask([draw], target, MONTE_CARLO)).value
        )
    exact = sum(w * v for w, v in zip(weights, values, strict=True))
    found = engine.loglikelihood(context, target, mc_num=600, seed=3)
    assert found.standard_error > 0
    assert abs(found.value - exact) < 4 * found.standard_error
    assert engine.loglikelihood(context, target, mc_num=64, seed=3) == engine.loglikelihood(
        context, target, mc_num=64, seed=3
    )
    assert found.forwards == 600


@pytest.mark.parametrize("family", ["llada", "dream", "sdar", "llada2_moe"])
def test_the_chain_rule_token_by_token(engine_of: GetEngine, family: str) -> None:
    engine, context, target = engine_of(family), [5, 6, 7, 11, 12], [8, 9, 10, 3]
    found = engine.loglikelihood(context, target, method=CHAIN_RULE)
    mask, shift, block = (
        engine.card.mask_token_id,
        engine.facts.shift,
        engine.card.block_length or 0,
    )
    is_block = engine.card.regime == "block_causal"
    wanted = []
    for i, token in enumerate(target):
        ids = context + target[:i] + [mask] * (len(target) - i)
        position = len(context) + i
        if is_block:
            ids = (ids + [mask] * block)[: position // block * block + block]
        one = Pass(ids, [position - shift], 0, "block" if is_block else "full", block)
        with torch.inference_mode():
            [logits] = engine.model.compute([one])
        wanted.append(float(logits.log_softmax(-1)[0, token]))
    assert found.token_logprobs == pytest.approx(wanted, abs=1e-4)
    assert found.value == pytest.approx(sum(wanted), abs=1e-3)
    assert found.standard_error == 0
    assert found.greedy is False


def test_scores_and_generation_share_the_engine(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    alone = engine.loglikelihood([5, 6], [7, 8, 9], mc_num=40, seed=1)
    running = [engine.submit(f"g{i}", [5, 6, 7], greedy(24)) for i in range(4)]
    scores = [engine.submit_score(f"s{i}", [5, 6], [7, 8, 9], mc_num=40, seed=1) for i in range(4)]
    for handle in scores:
        likelihood = handle.result(60).likelihood
        assert likelihood is not None and likelihood.value == pytest.approx(alone.value, rel=1e-4)
    assert all(h.result(60).finished for h in running)


def test_scores_refuse_what_does_not_fit(engine_of: GetEngine) -> None:
    for family, options, param in (
        ("llada", {"method": "guess"}, "method"),
        ("llada", {"mc_num": 0}, "mc_num"),
        ("sdar", {"method": MONTE_CARLO}, "method"),
    ):
        with pytest.raises(InvalidParameter) as wrong:
            engine_of(family).loglikelihood([5], [6], **options)
        assert wrong.value.param == param
    with pytest.raises(InvalidParameter):
        engine_of("llada").loglikelihood([5], [])


# Drafts, budgets, stopping


def test_a_warm_start_keeps_most_of_the_draft(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    draft = tuple(random.Random(0).randrange(10, 400) for _ in range(16))
    whole = greedy(16, draft_token_ids=draft, draft_noise=0.25, ignore_eos=True)
    output = engine.submit("warm", [5, 6, 7], whole.with_seed(1)).result(60).outputs[0]
    assert sum(a == b for a, b in zip(output.token_ids, draft, strict=True)) >= 12
    assert output.forwards <= 4
    kept = engine.submit(
        "kept", [5, 6, 7], greedy(16, draft_token_ids=draft, draft_noise=0.0, ignore_eos=True)
    )
    assert kept.result(60).outputs[0].forwards == 1  # at least one token is predicted anew
    short = engine.submit(
        "short", [5, 6, 7], greedy(20, draft_token_ids=draft, draft_noise=0.0, ignore_eos=True)
    )
    assert short.result(60).outputs[0].token_ids[:16] == list(draft)


def test_max_forwards_is_a_budget(engine_of: GetEngine) -> None:
    full = (
        engine_of("llada")
        .submit("full", [5, 6, 7], greedy(16, block_length=4, ignore_eos=True))
        .result(60)
    )
    cut = engine_of("llada").submit(
        "cut", [5, 6, 7], greedy(16, block_length=4, max_forwards=6, ignore_eos=True)
    )
    output = cut.result(60).outputs[0]
    assert (output.forwards, output.finish_reason) == (6, "length")
    assert 4 <= len(output.token_ids) <= 6
    assert output.token_ids == full.outputs[0].token_ids[: len(output.token_ids)]


def test_an_end_token_in_the_prompt_stops_nothing(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    end = engine.card.end_token_ids[0]
    output = (
        engine.submit("end", [5, end, 7], greedy(8, stop_token_ids=(end,))).result(60).outputs[0]
    )
    assert output.forwards >= 1


def test_nothing_behind_an_end_token_is_computed(engine_of: GetEngine) -> None:
    engine = engine_of("llada")
    plain = (
        engine.submit("plain", [5, 6, 7], greedy(32, algorithm="sequential", ignore_eos=True))
        .result(60)
        .outputs[0]
    )
    end = plain.token_ids[10]
    first = plain.token_ids.index(end)
    stopped = engine.submit(
        "stopped",
        [5, 6, 7],
        greedy(32, algorithm="sequential", ignore_eos=True, stop_token_ids=(end,)),
    )
    output = stopped.result(60).outputs[0]
    assert output.token_ids == plain.token_ids[:first]
    assert (output.finish_reason, output.forwards) == ("stop", first + 1)


@pytest.mark.parametrize("family", ["sdar", "llada2_moe"])
def test_block_causal_models_finish_the_block_of_an_end_token(
    engine_of: GetEngine, family: str
) -> None:
    engine, prompt = (
        engine_of(family),
        [5, 6, 7],
    )  # five tokens of the answer are in the first block
    asked = {"algorithm": "sequential", "block_length": 8, "ignore_eos": True}
    whole = engine.submit("whole", prompt, greedy(32, **asked)).result(60).outputs[0].token_ids
    for end in set(whole[:5]):
        cut = (
            engine.submit("cut", prompt, greedy(32, **asked, stop_token_ids=(end,)))
            .result(60)
            .outputs[0]
        )
        assert (cut.token_ids, cut.finish_reason, cut.forwards) == (
            whole[: whole.index(end)],
            "stop",
            5,
        )


@pytest.mark.parametrize(
    "family,algorithm",
    [
        ("llada", "low_confidence"),
        ("llada", "random"),
        ("llada", "hierarchical"),
        ("llada", "credit"),
        ("llada", "klass"),
        ("llada", "entropy_bound"),
        ("dream", "entropy"),
        ("dream", "maskgit_plus"),
        ("dream", "origin"),
        ("dream", "apd"),
    ],
)
def test_an_end_token_cuts_an_answer_and_changes_nothing_before_it(
    engine_of: GetEngine, family: str, algorithm: str
) -> None:
    """Tokens are committed out of order: an end token that is there early must not be seen as the
    answer's end by the rest.
    """
    engine, early = engine_of(family), 0
    for prompt in ([5, 6, 7], [40, 41, 42, 43], [100, 3, 9]):
        asked = {"algorithm": algorithm, "block_length": 32, "seed": 5, "ignore_eos": True}
        events: list[StepEvent] = []
        whole = (
            engine.submit("whole", prompt, greedy(32, **asked), listener=events.append)
            .result(60)
            .outputs[0]
            .token_ids
        )
        order = {position: event.step for event in events for position in event.positions}
        cuts = {
            at: engine.submit(f"cut-{at}", prompt, greedy(32, **asked, stop_token_ids=(whole[at],)))
            for at in sorted({whole.index(token) for token in whole})
        }
        for at, handle in cuts.items():
            early += any(order[before] > order[at] for before in range(at))
            cut = handle.result(60).outputs[0]
            assert (cut.token_ids, cut.finish_reason) == (whole[:at], "stop")
    assert early or algorithm in ("apd",)


def test_stop_strings_cut_the_text() -> None:
    with VDiffEngine(
        VDiffConfig(model=str(bundled.folder("vdiff-tiny")), device="cpu", num_threads=1)
    ) as engine:
        ask = {"messages": [{"role": "user", "content": "Sort the numbers: 3 1 2"}]}
        assert engine.generate(ask, greedy(16)).outputs[0].text == "1 2 3"
        output = engine.generate(ask, greedy(16, stop=(" 2",))).outputs[0]
        assert (output.text, output.finish_reason) == ("1", "stop")


# States


def test_states_and_drain() -> None:
    engine = make_engine("llada", max_num_seqs=1)
    assert engine.state is EngineState.READY
    handle = engine.submit("long", [5, 6, 7], greedy(200, ignore_eos=True))
    while engine.state is EngineState.READY:
        time.sleep(0.001)
    assert engine.state is EngineState.BUSY
    assert not engine.drain(0.0)
    assert engine.state is EngineState.DRAINING
    with pytest.raises(Exception, match="takes no requests"):
        engine.submit("late", [5], greedy(4))
    assert engine.drain(60)
    assert handle.result(0).finished
    engine.shutdown()
    assert engine.state is EngineState.SHUTDOWN
    engine.shutdown()


def test_the_watchdog_calls_a_standstill_unhealthy(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llada", watchdog_seconds=0.05)
    compute, release = engine.model.compute, __import__("threading").Event()

    def stuck(passes: object) -> object:
        release.wait(30)
        return compute(passes)

    monkeypatch.setattr(engine.model, "compute", stuck, raising=False)
    try:
        assert engine.get_health().healthy
        handle = engine.submit("stuck", [5, 6], greedy(2))
        deadline = time.monotonic() + 30
        while engine.get_health().healthy:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert "no step" in engine.get_health().detail
        release.set()
        handle.result(60)
        assert engine.get_health().healthy
    finally:
        release.set()
        engine.shutdown()


def test_a_dead_loop_is_unhealthy_and_says_so_to_everybody(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llada")

    def dies() -> object:
        raise SystemExit("gone")

    monkeypatch.setattr(engine._scheduler, "schedule", dies)
    monkeypatch.setattr("threading.excepthook", lambda args: None)
    handle = engine.submit("r", [5, 6], greedy(2))
    with pytest.raises(Exception, match="engine stopped"):
        handle.result(60)
    assert engine.state is EngineState.ERROR
    assert not engine.get_health().healthy
    engine.shutdown()


# What would be accepted and ignored, or would make a step twice


def test_a_verifier_that_fails_ends_only_the_answers_that_it_verifies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one forward with other rules: those have made their step, and must not make it again."""
    engine = make_engine("dream")
    try:
        plain = greedy(12, algorithm="entropy", ignore_eos=True)
        wanted = engine.submit("alone", [5, 6, 7], plain).result(60).outputs[0]
        assert engine.apd.verifier is not None

        def broken(passes: object) -> object:
            raise ZeroDivisionError("a bug in the verifier")

        monkeypatch.setattr(engine.apd.verifier, "score", broken)
        told: dict[str, list[int]] = {}

        def listen(event: StepEvent) -> None:
            told.setdefault(event.request_id, []).extend(event.positions)

        others = [engine.submit(f"plain-{i}", [5, 6, 7], plain, listener=listen) for i in range(3)]
        bad = engine.submit(
            "apd", [5, 6, 7], greedy(12, algorithm="apd", mixture_weight=0.5, ignore_eos=True)
        )
        more = engine.submit("last", [5, 6, 7], plain, listener=listen)
        with pytest.raises(Exception, match="a bug in the verifier"):
            bad.result(60)
        for handle in (*others, more):
            output = handle.result(60).outputs[0]
            assert (output.token_ids, output.forwards) == (wanted.token_ids, wanted.forwards)
        assert len(told) == 4
        assert all(
            sorted(positions) == list(range(12)) for positions in told.values()
        )  # no commit went untold
    finally:
        engine.shutdown()


def test_suppressed_ends_come_last_also_when_sampling(engine_of: GetEngine) -> None:
    """On a block-causal model the tempered distribution judges: suppression reaches it too."""
    engine = engine_of("sdar")
    asked: dict[str, object] = {"block_length": 4, "suppress_end": "confidence"}
    everything = tuple(range(engine.card.vocab_size - 1))
    params = greedy(
        4, algorithm="low_confidence_static", suppress_token_ids=everything[:256], **asked
    )
    warm = SamplingParams(
        max_tokens=4, temperature=1.0, seed=1, ignore_eos=True, diffusion=params.diffusion
    )
    events: list[StepEvent] = []
    engine.submit("warm", [5, 6, 7, 8], warm, listener=events.append).result(60)
    pairs = [p for e in events for p in zip(e.token_ids, e.confidences, strict=True)]
    assert any(token < 256 for token, _ in pairs)  # else this shows nothing
    assert all((confidence == 0) == (token < 256) for token, confidence in pairs)


@pytest.mark.parametrize("algorithm", ["random", "origin", "sequential"])
def test_suppression_by_confidence_is_refused_where_none_decides(
    engine_of: GetEngine, algorithm: str
) -> None:
    with pytest.raises(InvalidParameter, match="has no effect") as wrong:
        engine_of("llada").submit(
            "x", [5], greedy(4, algorithm=algorithm, suppress_end="confidence")
        )
    assert wrong.value.param == "diffusion.suppress_end"


def test_apd_takes_neither_a_draft_nor_holes(engine_of: GetEngine) -> None:
    engine = engine_of("dream")
    with pytest.raises(InvalidParameter) as wrong:
        engine.submit("draft", [5], greedy(4, algorithm="apd", draft_token_ids=(7, 8)))
    assert wrong.value.param == "diffusion.draft_token_ids"
    with pytest.raises(InvalidParameter, match="fills no holes"):
        engine.infill(["a", 2, "b"], greedy(1, algorithm="apd"))
