"""Infill, scores and echo without a server: what is resolved for which kind of model, and what
their answers look like.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shared.algorithms import BLOCK, FULL, UNIFORM, algorithms_of
from shared.errors import InvalidParameter, PromptTooLong
from shared.jobs import infill
from shared.jobs.bodies import parse
from shared.jobs.requests import Resolved
from shared.jobs.responses import COMPLETIONS, ENDPOINTS, INFILL, LOGLIKELIHOOD
from shared.jobs.tasks import InfillTask, ScoreTask, task_of
from shared.jobs.views import first_difference
from shared.model_card import ModelCard
from shared.tokenizer import TokenizerWrapper
from vdiff import bundled

TOKENIZER = TokenizerWrapper.from_folder(bundled.folder(bundled.DEFAULT_MODEL))
MASK, END = TOKENIZER.special_id("mask_token") or 0, TOKENIZER.special_id("eos_token") or 0
CARD = ModelCard(
    name="m",
    family="llada",
    context_length=64,
    vocab_size=757,
    mask_token_id=MASK,
    end_token_ids=(END,),
    suppress_token_ids={"logits": (END,), "confidence": (END,)},
    block_length=8,
    capabilities={
        "algorithms": list(algorithms_of(FULL, verifier=True)),
        "endpoints": list(ENDPOINTS),
    },
)
BLOCKS = replace(
    CARD,
    regime=BLOCK,
    capabilities={**CARD.capabilities, "algorithms": list(algorithms_of(BLOCK, verifier=False))},
)


def resolved(endpoint: str, card: ModelCard = CARD, **body: Any) -> Resolved:
    return parse(endpoint, {"model": "m", **body}, streaming=False).resolve(card, TOKENIZER)


def refused(
    endpoint: str, card: ModelCard = CARD, error: type[Exception] = InvalidParameter, **body: Any
) -> Any:
    with pytest.raises(error) as wrong:
        resolved(endpoint, card, **body)
    return wrong.value


def test_holes_lie_where_the_parts_say() -> None:
    made = resolved(
        INFILL, parts=["What is", {"hole": 2}, "+", {"hole": 3}], n=2, temperature=0, seed=4
    )
    task = made.task
    assert isinstance(task, InfillTask)
    head, plus = len(TOKENIZER.encode("What is")), len(TOKENIZER.encode("+"))
    assert task.holes() == [(head, head + 2), (head + 2 + plus, head + 5 + plus)]
    assert [made.prompt_token_ids[p] for hole in task.holes() for p in range(*hole)] == [MASK] * 5
    span = 5 + plus
    assert (made.params.max_tokens, made.params.n, made.tokens) == (span, 2, head + 2 * span)
    assert task_of(made.params_json()) == task  # as the worker reads it


def test_a_hole_ends_at_an_end_token() -> None:
    task = InfillTask(("a", 3, "b", 1), (1, 3, 1, 1))
    five, six = TOKENIZER.encode("56")
    (first, second), text, count = infill.filled(
        task, [7, MASK, MASK, MASK, 8, MASK], [five, END, six, 8, six], (END,), TOKENIZER
    )
    assert (first, second, text, count) == ("5", "6", "a5b6", 2)


def test_infill_speaks_of_no_field_that_it_lacks() -> None:
    wrong = refused(INFILL, parts=["a", {"hole": 7}], diffusion={"block_length": 5})
    assert wrong.param == "diffusion.block_length"
    assert "max_tokens" not in wrong.message
    assert refused(INFILL, error=PromptTooLong, parts=[{"hole": 65}]).param == "parts[0].hole"
    blind = {
        "algorithm": "sequential",
        "max_lookahead": 2,
    }  # what follows the hole would not be looked at
    assert (
        refused(INFILL, parts=["a", {"hole": 7}, "b"], diffusion=blind).param
        == "diffusion.max_lookahead"
    )


def test_what_a_score_asks_of_each_kind_of_model() -> None:
    pair = {"context": "What is", "continuation": "56"}
    full = resolved(LOGLIKELIHOOD, **pair).task
    assert isinstance(full, ScoreTask)
    assert (full.method, full.mc_num, full.forwards) == ("monte_carlo", 128, 128)
    blocks = resolved(LOGLIKELIHOOD, BLOCKS, **pair)
    assert isinstance(blocks.task, ScoreTask)
    assert (blocks.task.method, blocks.task.forwards, blocks.params.seed) == ("chain_rule", 2, 0)
    assert "chain_rule" in refused(LOGLIKELIHOOD, BLOCKS, method="monte_carlo", **pair).message
    assert refused(LOGLIKELIHOOD, BLOCKS, mc_num=4, **pair).param == "mc_num"
    many = resolved(LOGLIKELIHOOD, pairs=[pair, {"context": [5, 6], "continuation": [7]}], seed=3)
    assert isinstance(many.task, ScoreTask)
    assert list(many.task.pieces(many.prompt_token_ids))[1] == ([5, 6], [7])
    assert task_of(many.params_json()) == many.task
    assert (
        resolved(LOGLIKELIHOOD, **pair).params.seed is None
    )  # to be drawn once, when it is accepted


def test_echo_asks_for_every_token_but_the_first() -> None:
    made = resolved(
        COMPLETIONS, prompt=[[5, 6, 7], [8]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    assert isinstance(made.task, ScoreTask)
    assert (made.task.pairs, made.task.forwards, made.tokens) == (((1, 2), (1, 0)), 4, 6)
    uniform = replace(
        CARD, regime=UNIFORM, capabilities={**CARD.capabilities, "endpoints": [COMPLETIONS]}
    )
    assert refused(COMPLETIONS, uniform, prompt="a", echo=True, logprobs=1).param == "echo"
    assert (
        refused(
            COMPLETIONS, error=PromptTooLong, prompt=[5] * 64, echo=True, logprobs=1, max_tokens=1
        ).param
        == "prompt"
    )
    assert resolved(COMPLETIONS, prompt=[5] * 64, echo=True, logprobs=0).tokens == 64


def test_a_replay_of_a_score_compares_numbers() -> None:
    def scored(value: float) -> dict[str, Any]:
        return {"data": [{"loglikelihood": value}]}

    assert (
        first_difference(scored(-1.00001), scored(-1.00002)) is None
    )  # the last bits belong to the batch
    assert first_difference(scored(-1.0), scored(-1.1)) is not None
