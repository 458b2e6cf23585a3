"""The rules as pure functions: what each commits, by hand-made numbers and by properties that all
share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shared.algorithms import ALGORITHMS, own_parameters
from shared.diffusion_params import DiffusionParams
from worker.engine.rules import RULES, RuleInput
from worker.engine.schedule import dream, even, quotas, times


def params(name: str, **more: Any) -> DiffusionParams:
    regime = ALGORITHMS[name].regimes[0]
    own = {k: v for k, v in own_parameters(name, regime).items() if v is not None}
    return DiffusionParams(algorithm=name, **{**own, **more})


def seen(
    confidence: list[float],
    name: str,
    *,
    quota: int = 1,
    memory: dict[str, Any] | None = None,
    **more: Any,
) -> RuleInput:
    """An input of masked positions 0, 1, ...; `more`: parameters, or the statistics that a rule
    needs.
    """
    statistics = {
        k: torch.tensor(more.pop(k))
        for k in ("margin", "entropy", "divergence", "masked", "changed")
        if k in more
    }
    positions = more.pop("positions", list(range(len(confidence))))
    slack = more.pop("slack", RULES[name].slack)
    uniform: Callable[[int], Tensor] = more.pop(
        "uniform", lambda stream: torch.linspace(0.1, 0.9, len(confidence))
    )
    return RuleInput(
        positions=positions,
        confidence=torch.tensor(confidence),
        quota=quota,
        block_steps=more.pop("block_steps", len(confidence)),
        params=params(name, **more),
        uniform=uniform,
        slack=slack,
        memory={} if memory is None else memory,
        **statistics,
    )


def picked(given_: RuleInput) -> list[int]:
    assert given_.params.algorithm is not None
    return sorted(RULES[given_.params.algorithm].select(given_).tolist())


def test_low_confidence_takes_the_surest_and_of_equals_the_leftmost() -> None:
    assert picked(seen([0.2, 0.9, 0.5, 0.9], "low_confidence", quota=2)) == [1, 3]
    assert picked(seen([0.5, 0.5, 0.5], "low_confidence", quota=1)) == [0]


def test_random_goes_by_its_numbers_alone() -> None:
    assert picked(
        seen([0.9, 0.1, 0.1], "random", uniform=lambda s: torch.tensor([0.1, 0.8, 0.3]))
    ) == [1]


def test_threshold_takes_what_reaches_it_else_the_best() -> None:
    assert picked(seen([0.9, 0.89, 0.95], "threshold")) == [0, 2]
    assert picked(seen([0.1, 0.3, 0.2], "threshold")) == [1]


def test_factor_takes_a_run_of_ranks() -> None:
    # sorted .95 .8 .6 .5; rank 2 wants 1 - 1/3, rank 3 wants .75
    assert picked(seen([0.6, 0.95, 0.5, 0.8], "factor", factor=1.0)) == [1, 3]
    assert picked(seen([0.1, 0.05], "factor", factor=1.0)) == [
        0,
        1,
    ]  # only the last fails: accepted too
    assert picked(seen([0.1, 0.05, 0.01], "factor", factor=1.0)) == [0]


def test_entropy_bound_counts_all_but_the_largest() -> None:
    entropy = [0.05, 0.5, 0.04, 0.06]
    assert picked(seen([0.9] * 4, "entropy_bound", entropy=entropy, gamma=0.1)) == [0, 2, 3]
    assert picked(seen([0.9] * 4, "entropy_bound", entropy=entropy, gamma=0.0)) == [2]


def test_hierarchical_takes_the_best_of_each_run() -> None:
    confidence = [0.5, 0.6, 0.3, 0.2, 0.45]
    # runs 0-1, 4-5, 9
    chosen = picked(seen(confidence, "hierarchical", positions=[0, 1, 4, 5, 9]))
    assert chosen == [1, 4]  # run 4-5 has nothing above low_threshold
    assert picked(seen([0.1, 0.2], "hierarchical")) == [1]


def test_klass_waits_until_distributions_stand_still() -> None:
    memory: dict[str, Any] = {}
    still = [0.001, 0.001, 0.5]
    common: dict[str, Any] = {"memory": memory, "divergence": still}
    assert picked(
        seen([0.95, 0.5, 0.99], "klass", **{**common, "divergence": [float("inf")] * 3})
    ) == [2]
    assert picked(seen([0.95, 0.5, 0.99], "klass", **common)) == [2]  # still for one step only
    assert picked(seen([0.95, 0.5, 0.99], "klass", **common)) == [0]


def test_credit_takes_equals_of_the_best_too_and_threshold_where_it_is_told() -> None:
    confidence = [0.5, 0.3, 0.499995, 0.4999]
    assert picked(seen(confidence, "credit")) == [0, 2]
    assert picked(seen(confidence, "threshold")) == [0]
    assert picked(seen(confidence, "threshold", slack=1e-5)) == [0, 2]
    assert picked(seen(confidence, "threshold", slack=1e-5, threshold=0.4)) == [0, 2, 3]


def test_sequential_is_leftmost() -> None:
    assert picked(seen([0.1, 0.9, 0.9], "sequential", quota=2)) == [0, 1]


def test_dreams_scores() -> None:
    assert picked(seen([0.4, 0.6], "maskgit_plus")) == [1]
    assert picked(seen([0.4, 0.6], "topk_margin", margin=[0.3, 0.1])) == [0]
    assert picked(seen([0.4, 0.6], "entropy", entropy=[0.2, 0.9])) == [0]


def test_dreams_alg_temp_draws_in_proportion() -> None:
    """Positions by softmax(score / alg_temp): exact probabilities against many draws."""
    confidence, temperature = [0.9, 0.5, 0.1], 0.5
    wanted = torch.softmax(torch.tensor(confidence, dtype=torch.float64) / temperature, -1)
    generator, counts, draws = torch.Generator().manual_seed(0), torch.zeros(3), 20_000
    for _ in range(draws):
        numbers = torch.rand(3, generator=generator, dtype=torch.float64)
        counts[
            picked(
                seen(
                    confidence, "maskgit_plus", alg_temp=temperature, uniform=lambda s, n=numbers: n
                )
            )[0]
        ] += 1
    assert torch.allclose(counts.double() / draws, wanted, atol=0.015)


def test_origin_commits_each_with_its_probability_and_all_at_last() -> None:
    numbers = torch.tensor([0.01, 0.5, 0.99])
    memory: dict[str, Any] = {}
    first = picked(
        seen([0.5] * 3, "origin", uniform=lambda s: numbers, memory=memory, block_steps=4)
    )
    assert first == [0]  # 1 - s/t is .25, then .33, .5, 1
    memory = {"step": 3}
    assert picked(
        seen([0.5] * 3, "origin", uniform=lambda s: numbers, memory=memory, block_steps=4)
    ) == [0, 1, 2]


def test_dynamic_is_strict_and_falls_back_to_the_quota() -> None:
    assert picked(seen([0.9, 0.91, 0.95], "low_confidence_dynamic", quota=2)) == [1, 2]
    assert picked(seen([0.9, 0.91, 0.2], "low_confidence_dynamic", quota=2)) == [0, 1]
    assert picked(seen([0.3, 0.2], "low_confidence_static", quota=1)) == [0]


def test_joint_threshold_edits_and_ends() -> None:
    rule = RULES["joint_threshold"]
    common: dict[str, Any] = {"masked": [False, True, False], "changed": [True, True, False]}
    given_ = seen([0.95, 0.5, 0.99], "joint_threshold", **common)
    assert picked(given_) == [0, 1]  # an edit, and the best mask
    done = {"masked": [False] * 3, "memory": {}}
    edits = seen(
        [0.95, 0.5, 0.99],
        "joint_threshold",
        changed=[True, False, False],
        max_post_edit_steps=2,
        **done,
    )
    assert picked(edits) == [0]
    assert not rule.is_done(edits, torch.tensor([0]))
    assert rule.is_done(edits, torch.tensor([0]))  # the second such step is the last
    quiet = seen([0.5] * 3, "joint_threshold", changed=[True] * 3, **{**done, "memory": {}})
    assert rule.is_done(quiet, RULES["joint_threshold"].select(quiet))


def test_credit_remembers_who_won() -> None:
    rule, memory = RULES["credit"], dict[str, Any]()
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    once = rule.adjust(logits, [3], params("credit"), memory)
    p = logits.softmax(-1)[0, 0]
    assert once[0, 0] == pytest.approx(float(2 + 0.7 * torch.log1p(p**0.2)))
    twice = rule.adjust(logits, [3], params("credit"), memory)
    assert twice[0, 0] == pytest.approx(float(2 + 0.7 * torch.log1p(0.8 * p**0.2 + p**0.2)))
    assert twice[0, 1] == 1.0


PURE = [name for name in RULES if name != "joint_threshold"]


@given(data=st.data(), name=st.sampled_from(PURE))
def test_every_rule_commits_at_least_one_and_each_once(data: st.DataObject, name: str) -> None:
    n = data.draw(st.integers(1, 12))
    unit = st.floats(0.0, 1.0, width=32)
    confidence = data.draw(st.lists(unit, min_size=n, max_size=n))
    statistics = {k: data.draw(st.lists(unit, min_size=n, max_size=n)) for k in RULES[name].needs}
    numbers = torch.tensor(data.draw(st.lists(st.floats(1e-6, 1 - 1e-6), min_size=n, max_size=n)))
    quota = data.draw(st.integers(1, n))
    chosen = picked(seen(confidence, name, quota=quota, uniform=lambda s: numbers, **statistics))
    assert 1 <= len(chosen) <= n
    assert len(set(chosen)) == len(chosen)
    assert set(chosen) <= set(range(n))
    if name in (
        "low_confidence",
        "random",
        "sequential",
        "low_confidence_static",
        "maskgit_plus",
        "topk_margin",
        "entropy",
    ):
        assert len(chosen) == quota


# Schedules


def test_even_gives_the_remainder_to_the_first_steps() -> None:
    assert even(10, 4) == [3, 3, 2, 2]
    assert even(3, 5) == [1, 1, 1]
    assert sum(even(64, 20)) == 64


def test_dreams_times_are_torchs() -> None:
    for steps in (1, 2, 7, 16, 32, 33, 512):
        for eps in (1e-3, 0.05):
            assert [float(t) for t in times(steps, eps)] == torch.linspace(
                1, eps, steps + 1
            ).tolist()


@given(masked=st.integers(1, 300), steps=st.integers(1, 400))
def test_dreams_schedule_commits_everything_and_skips_empty_steps(masked: int, steps: int) -> None:
    made = dream(masked, steps, 1e-3)
    assert sum(made) == masked
    assert min(made) >= 1
    assert len(made) <= steps


def test_block_causal_schedules_count_the_whole_block() -> None:
    assert (
        quotas(
            DiffusionParams(algorithm="low_confidence_static", denoising_steps=4),
            "block_causal",
            8,
            16,
            3,
        )
        == [4] * 4
    )
    assert quotas(DiffusionParams(algorithm="low_confidence", steps=6), "full", 8, 8, 3) == [4, 4]
    assert quotas(DiffusionParams(algorithm="sequential", tokens_per_step=3), "full", 8, 8, 1) == [
        3
    ]
