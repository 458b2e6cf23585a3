"""Sampling is exact: the first committed token follows its distribution, for rules of both kinds
and for APD.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shared.diffusion_params import DiffusionParams
from shared.sampling_params import SamplingParams
from tests.unit.engine.conftest import GetEngine
from worker.engine import VDiffEngine
from worker.engine.batch import Pass
from worker.engine.sampler import filter_logits

SEEDS = 10_000


def first_tokens(
    engine: VDiffEngine, prompt: list[int], params: SamplingParams, seeds: int = SEEDS
) -> torch.Tensor:
    """Return how often each token is committed at the only position, over many seeds, by the
    sampler's own method.
    """
    from worker.engine.engine import EngineRequest, end_tokens

    ends = end_tokens(params, (), engine.tokenizer)
    request = EngineRequest("r", None, prompt, params.completed(engine.card), 0, 0, 0.0, ends)
    request.make_sequences(engine.tokenizer, engine.card)
    [answer] = request.sequences
    plan = engine.sampler.plan(answer, 1 << 30)
    counts = torch.zeros(engine.card.vocab_size)
    with torch.inference_mode():
        [logits] = engine.model.compute(plan.passes)
        for seed in range(seeds):
            answer.seed = seed
            choice = engine.sampler.calculate_confidence(logits.clone(), answer, plan.wanted)
            counts[int(choice.tokens[0])] += 1
    return counts / seeds


def distribution(
    engine: VDiffEngine, prompt: list[int], temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    mask, shift = engine.card.mask_token_id, engine.facts.shift
    with torch.inference_mode():
        [logits] = engine.model.compute([Pass([*prompt, mask], [len(prompt) - shift])])
    logits = logits.index_fill(-1, torch.tensor([mask]), -torch.inf)
    return filter_logits(logits.double() / temperature, top_k, top_p).softmax(-1)[0]


@pytest.mark.parametrize(
    ("family", "algorithm", "temperature", "top_k", "top_p"),
    [
        ("llada", "low_confidence", 1.0, -1, 1.0),
        ("llada", "threshold", 0.7, 8, 1.0),
        ("dream", "entropy", 1.0, -1, 0.7),
    ],
)
def test_tokens_follow_the_tempered_filtered_distribution(
    engine_of: GetEngine, family: str, algorithm: str, temperature: float, top_k: int, top_p: float
) -> None:
    engine, prompt = engine_of(family), [5, 6, 7, 8]
    params = SamplingParams(
        max_tokens=1,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        diffusion=DiffusionParams(algorithm=algorithm),
    )
    wanted = distribution(engine, prompt, temperature, top_k, top_p)
    found = first_tokens(engine, prompt, params)
    assert bool((found[wanted == 0] == 0).all())
    # Pearson's statistic over tokens that are expected often enough; its mean is the number of
    # cells.
    often = wanted * SEEDS >= 5
    statistic = float((((found - wanted) ** 2 / wanted)[often] * SEEDS).sum())
    cells = int(often.sum())
    assert statistic < cells + 5 * (2 * cells) ** 0.5


def test_apds_draft_and_acceptance_follow_the_paper(engine_of: GetEngine) -> None:
    """Universal coupling: whatever is accepted after the first position is a sample of the mixture,
    and of the draft.
    """
    from worker.engine.apd import Draft
    from worker.engine.rules.base import gumbel

    engine = engine_of("dream")
    generator = torch.Generator().manual_seed(0)
    vocab, weight = 6, 0.6
    log_d = torch.randn(2, vocab, generator=generator).log_softmax(-1)
    log_ar = torch.randn(2, vocab, generator=generator).log_softmax(-1)
    diffusion = DiffusionParams(algorithm="apd", mixture_weight=weight)
    params = SamplingParams(temperature=1.0, diffusion=diffusion)
    agreed = torch.zeros(vocab)
    drafts = torch.zeros(vocab)
    for _ in range(SEEDS):
        noise = gumbel(torch.rand(2, vocab, generator=generator, dtype=torch.float64))
        draft = Draft(log_d, (log_d.double() + noise).argmax(-1), noise)
        accept = engine.apd.should_accept(draft, log_ar, params)
        assert bool(accept[0])
        token = int(draft.tokens[1])
        target = int(((weight * log_d[1] + (1 - weight) * log_ar[1]).double() + noise[1]).argmax())
        assert bool(accept[1]) == (token == target)
        drafts[token] += 1
        agreed[token] += bool(accept[1])
    assert torch.allclose(drafts / SEEDS, log_d[1].exp(), atol=0.02)
    # The maximal agreement of a coupling of p and q is the sum of min(p, q); this one is at least
    # its square-like bound.
    q = (weight * log_d[1] + (1 - weight) * log_ar[1]).softmax(-1)
    most = float(torch.minimum(log_d[1].exp(), q).sum())
    assert most / (2 - most) - 0.02 <= float(agreed.sum()) / SEEDS <= most + 0.02


def events_of(
    engine: VDiffEngine, prompt: list[int], params: SamplingParams
) -> tuple[Any, list[Any]]:
    events: list[Any] = []
    return engine.submit("logprobs", prompt, params, listener=events.append).result(60), events


@pytest.mark.parametrize("family", ["llada", "dream", "sdar"])
def test_logprobs_are_those_of_the_committing_step(engine_of: GetEngine, family: str) -> None:
    engine, prompt = engine_of(family), [5, 6, 7, 8]
    params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True, logprobs=3)
    output, events = events_of(engine, prompt, params)
    first = output.outputs[0]
    assert first.logprobs is not None
    assert [t.token_id for t in first.logprobs] == first.token_ids
    for t in first.logprobs:
        assert t.logprob <= 0
        assert len(t.top) == 3
        assert t.top[0][1] >= t.top[1][1] >= t.top[2][1]
        assert t.top[0] == (t.token_id, t.logprob)  # greedy: the chosen one is the likeliest
    # The first commit's log-probability is the model's own on the masked canvas.
    position, expected = events[0].positions[0], events[0].logprobs[0]
    mask, shift = engine.card.mask_token_id, engine.facts.shift
    block = engine.card.block_length or 0
    whole = [*prompt, *[mask] * 8]
    kind = "block" if engine.card.regime == "block_causal" else "full"
    with torch.inference_mode():
        [logits] = engine.model.compute(
            [Pass(whole, [len(prompt) + position - shift], 0, kind, block)]
        )
    assert float(logits.log_softmax(-1)[0, expected.token_id]) == pytest.approx(
        expected.logprob, abs=1e-4
    )


def test_without_being_asked_there_are_no_logprobs(engine_of: GetEngine) -> None:
    output = engine_of("llada").submit("plain", [5, 6], SamplingParams(max_tokens=4)).result(60)
    assert output.outputs[0].logprobs is None


def test_apd_gives_logprobs_too(engine_of: GetEngine) -> None:
    engine = engine_of("dream")
    diffusion = DiffusionParams(algorithm="apd", mixture_weight=0.8)
    params = SamplingParams(
        max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2, diffusion=diffusion
    )
    first = engine.submit("apd", [5, 6, 7], params).result(60)
    assert first.outputs[0].logprobs is not None
    assert [t.token_id for t in first.outputs[0].logprobs] == first.outputs[0].token_ids
    assert first.metrics.acceptance_rate is not None and 0 < first.metrics.acceptance_rate <= 1


@pytest.mark.parametrize("nucleus_first", [False, True])
def test_a_nucleus_of_nothing_keeps_the_likeliest_token(nucleus_first: bool) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0], [50.0, -50.0, 0.0]])
    kept = filter_logits(logits, -1, 0.0, nucleus_first=nucleus_first)
    assert kept.isfinite().tolist() == [[False, True, False], [True, False, False]]
