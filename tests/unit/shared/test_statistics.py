"""The statistics against values that others computed, or that can be worked out by hand."""

from __future__ import annotations

import math
import random
from statistics import fmean, stdev

import pytest

from shared import statistics


@pytest.mark.parametrize(
    "right,total,low,high",
    [
        (8, 10, 0.4902, 0.9433),  # Agresti and Coull's example
        (0, 20, 0.0, 0.1611),
        (20, 20, 0.8389, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson(right: int, total: int, low: float, high: float) -> None:
    assert statistics.wilson(right, total) == (
        pytest.approx(low, abs=1e-4),
        pytest.approx(high, abs=1e-4),
    )


def test_quantile_is_numpys() -> None:
    assert statistics.quantile([4, 1, 3, 2], 0.5) == 2.5
    assert statistics.quantile([1, 2, 3, 4, 5], 0.95) == pytest.approx(4.8)
    assert (statistics.quantile([7], 0.95), statistics.quantile([], 0.5)) == (7, None)


def test_independent_items_have_the_usual_error_and_wilsons_interval() -> None:
    scores = [[1.0]] * 81 + [[0.0]] * 182
    made = statistics.accuracy(scores, range(263))
    p = 81 / 263
    assert made.mean == pytest.approx(p)
    assert made.standard_error == pytest.approx(math.sqrt(p * (1 - p) / 262))
    assert (made.low, made.high) == pytest.approx(statistics.wilson(81, 263))
    assert (made.monte_carlo_error, made.item_error) == (None, None)


def test_items_with_the_same_input_count_as_one() -> None:
    """Each of 50 questions twice, both copies with the same end: as good as 50 questions, and not
    as 100.
    """
    once = [[1.0]] * 30 + [[0.0]] * 20
    single = statistics.accuracy(once, range(50))
    double = statistics.accuracy(once + once, [*range(50), *range(50)])
    assert double.standard_error == pytest.approx(single.standard_error)
    assert (double.items, double.clusters) == (100, 50)
    assert double.high - double.low == pytest.approx(single.high - single.low, rel=0.02)
    naive = statistics.accuracy(once + once, range(100))
    assert naive.high - naive.low < 0.75 * (double.high - double.low)


def test_clustered_error_by_hand() -> None:
    # Mean 1/2, sums of the clusters' deviations 1, 0, -1: sqrt(3/2 * 2) / 6.
    values, clusters = [1.0, 1.0, 1.0, 0.0, 0.0, 0.0], "aabbcc"
    assert statistics.clustered_error(values, clusters) == pytest.approx(math.sqrt(3 / 2 * 2) / 6)
    assert statistics.clustered_error([1.0, 0.0], "aa") is None


def test_chance_and_items_are_told_apart() -> None:
    # By hand: variances within are 1/2 and 0, of the means 1/4 and 0; fmean(1/4, 0) / 2.
    assert statistics.monte_carlo_error([[1.0, 0.0], [1.0, 1.0]]) == pytest.approx(
        math.sqrt(1 / 16)
    )
    # Every item always ends the same way: seeds change nothing, all error comes from the choice of
    # items.
    sure = statistics.accuracy([[1.0] * 4] * 30 + [[0.0] * 4] * 20, range(50))
    assert sure.monte_carlo_error == 0 and sure.item_error == sure.standard_error
    # Every item is a coin: the items are all alike, all error comes from the seeds.
    coin = random.Random(1)
    coins = statistics.accuracy(
        [[float(coin.random() < 0.5) for _ in range(8)] for _ in range(400)], range(400)
    )
    assert coins.monte_carlo_error == pytest.approx(math.sqrt(0.25 / 8 / 400), rel=0.05)
    assert coins.standard_error == pytest.approx(coins.monte_carlo_error, rel=0.15)


def test_the_interval_covers_as_often_as_it_says() -> None:
    """Clustered answers: the 95% interval has the truth about 95 times of 100; one that ignores
    clusters has not.
    """
    draw = random.Random(3)
    covered = naive = 0
    for _ in range(400):
        scores, clusters = [], []
        for cluster in range(60):
            right = float(draw.random() < 0.7)
            scores += [[right]] * 3
            clusters += [cluster] * 3
        made = statistics.accuracy(scores, clusters)
        covered += made.low <= 0.7 <= made.high
        alone = statistics.accuracy(scores, range(180))
        naive += alone.low <= 0.7 <= alone.high
    assert 0.92 <= covered / 400 <= 0.98
    assert naive / 400 < 0.85


@pytest.mark.parametrize(
    "b,c,p,method",
    [
        (1, 9, 22 / 1024, "exact"),
        (0, 0, 1.0, "exact"),
        (5, 5, 1.0, "exact"),
        (6, 16, 0.05248, "exact"),  # R: binom.test(6, 22)
        (121, 59, 4.44e-06, "exact"),  # R: binom.test(59, 180)
        (2000, 2100, 0.1220, "chi-square"),  # (100 - 1)^2 / 4100 = 2.3905
    ],
)
def test_mcnemar(b: int, c: int, p: float, method: str) -> None:
    made = statistics.mcnemar(b, c)
    assert (made.p_value, made.method) == (pytest.approx(p, rel=0.01), method)
    assert statistics.mcnemar(c, b).p_value == made.p_value


def test_mcnemars_two_ways_agree_where_they_meet() -> None:
    exact = statistics.mcnemar(460, 540).p_value
    chi = math.erfc(math.sqrt((80 - 1) ** 2 / 1000 / 2))
    assert exact == pytest.approx(chi, rel=0.05)


def test_bootstrap_against_one_made_item_by_item() -> None:
    values = [1.0] * 30 + [0.0] * 60 + [-1.0] * 10
    low, high = statistics.bootstrap_interval(values, range(100), seed=7, resamples=20_000)
    draw = random.Random(5)
    means = sorted(fmean(draw.choices(values, k=100)) for _ in range(4000))
    assert low == pytest.approx(means[100], abs=0.015)
    assert high == pytest.approx(means[3900], abs=0.015)
    assert statistics.bootstrap_interval(values, range(100), seed=7, resamples=20_000) == (
        low,
        high,
    )
    # Clusters of five that go together: as wide as a fifth of the items.
    together = [v for v in values for _ in range(5)]
    wide = statistics.bootstrap_interval(together, [i // 5 for i in range(500)], seed=7)
    assert wide == (pytest.approx(low, abs=0.02), pytest.approx(high, abs=0.02))


def test_minimum_detectable_effect() -> None:
    assert statistics.minimum_detectable_effect(0.01) == pytest.approx(
        0.02802, abs=1e-5
    )  # (1.95996 + 0.84162) / 100
    # It is what it says: with a true difference of that size four of five draws find it.
    draw, found = random.Random(2), 0
    for _ in range(2000):
        found += abs(draw.gauss(0.02802, 0.01)) / 0.01 > 1.95996
    assert found / 2000 == pytest.approx(0.8, abs=0.03)


def test_a_comparison_takes_what_both_answered() -> None:
    first = {i: [float(i % 2)] for i in range(100)}
    second = {i: [1.0] if i < 60 else [0.0] for i in range(20, 120)}
    made = statistics.compare(first, second, {i: i for i in range(120)}, resamples=2000)
    assert (made.items, made.first, made.second, made.difference) == (80, 0.5, 0.5, 0.0)
    assert (made.mcnemar.only_first, made.mcnemar.only_second, made.mcnemar.p_value) == (
        20,
        20,
        1.0,
    )
    assert made.low < 0 < made.high
    differences = [second[i][0] - first[i][0] for i in range(20, 100)]
    assert made.standard_error == pytest.approx(stdev(differences) / math.sqrt(80))
    assert made.monte_carlo_error is None


def test_pairing_finds_what_two_intervals_hide() -> None:
    """The second gets the same 300 right and 12 more: the intervals overlap, the paired test is
    sure.
    """
    first = {i: [float(i < 300)] for i in range(480)}
    second = {i: [float(i < 312)] for i in range(480)}
    made = statistics.compare(first, second, {i: i for i in range(480)})
    one, other = (statistics.accuracy(list(x.values()), range(480)) for x in (first, second))
    assert one.high > other.low
    assert made.mcnemar.p_value == pytest.approx(2 / 2**12) and made.low > 0


def test_no_difference_at_all_is_not_infinitely_sure() -> None:
    same = {i: [1.0] for i in range(50)}
    made = statistics.compare(same, same, {i: i for i in range(50)}, resamples=100)
    assert (made.difference, made.standard_error, made.mcnemar.p_value) == (0, 0, 1)
    assert made.minimum_detectable_effect == pytest.approx(2.8016 / 50, rel=0.001)
