"""The statistics of evaluations: a share with its interval, errors apart by where they come from,
paired comparisons. Pure.

An evaluation has items (questions), each answered once or several times (repeats: other seeds). A
score is 0 to 1.

    standard error      what another draw of questions would change, and other seeds with it;
                        questions with the same input are one cluster, since they are right or wrong
                        together (CR1, Liang and Zeger 1986)
    Monte Carlo error   what other seeds alone would change, on these very questions; only known
                        with repeats
    item error          the rest: sqrt(standard error^2 - Monte Carlo error^2)

Everything needs the standard library alone, but for the bootstrap, which needs numpy.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, variance

Z95 = 1.96
EXACT_PAIRS_MAX = 1_000  # McNemar: above so many discordant pairs chi-square is as good
RESAMPLES = 10_000
_BLOCK = 2_000_000  # numbers that one block of the bootstrap holds


def wilson(successes: float, total: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval of a proportion (E. B. Wilson 1927, JASA 22:209-212).

    Args:
        total: positive; an effective size need not be whole.
    """
    p = successes / total
    centre = p + z * z / (2 * total)
    spread = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max((centre - spread) / scale, 0.0), min((centre + spread) / scale, 1.0)


def quantile(values: Sequence[float], share: float) -> float | None:
    """Linear between the neighbours (numpy's and R's default); None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def clustered_error(values: Sequence[float], clusters: Sequence[Hashable]) -> float | None:
    """The standard error of the mean of `values` when those of a cluster go together; None with
    fewer than two clusters.
    """
    mean = fmean(values)
    sums: dict[Hashable, float] = defaultdict(float)
    for value, cluster in zip(values, clusters, strict=True):
        sums[cluster] += value - mean
    groups = len(sums)
    if groups < 2:
        return None
    return math.sqrt(groups / (groups - 1) * math.fsum(s * s for s in sums.values())) / len(values)


def monte_carlo_error(scores: Sequence[Sequence[float]]) -> float | None:
    """Return the standard error of the mean of the items' means, from the spread between repeats of
    an item; None when no item has two.
    """
    within = [variance(repeats) / len(repeats) for repeats in scores if len(repeats) > 1]
    return math.sqrt(fmean(within) / len(scores)) if within else None


@dataclass(frozen=True, slots=True)
class Accuracy:
    """A mean of scores, and how far it may be off."""

    mean: float
    # 95%: Wilson's, at the size that independent questions with this standard error would have
    low: float
    high: float
    standard_error: float | None
    monte_carlo_error: float | None
    item_error: float | None
    items: int
    clusters: int
    samples: int


def accuracy(scores: Sequence[Sequence[float]], clusters: Sequence[Hashable]) -> Accuracy:
    """Args: scores: of every item, each with at least one; clusters: what each item's input is."""
    means = [fmean(repeats) for repeats in scores]
    mean, items, samples = fmean(means), len(scores), sum(len(repeats) for repeats in scores)
    groups = len(set(clusters))
    error, by_chance = clustered_error(means, clusters), monte_carlo_error(scores)
    size = float(groups)
    if error and 0 < mean < 1:
        # The design effect: how much worse than as many independent questions.
        size = min(
            max(items * mean * (1 - mean) / ((items - 1) * error * error), 1.0), float(samples)
        )
    low, high = wilson(mean * size, size)
    rest = None
    if error is not None and by_chance is not None:
        rest = math.sqrt(max(error * error - by_chance * by_chance, 0.0))
    return Accuracy(mean, low, high, error, by_chance, rest, items, groups, samples)


@dataclass(frozen=True, slots=True)
class McNemar:
    """Are the questions that only one of two gets right evenly split? (Q. McNemar 1947,
    Psychometrika 12:153-157)
    """

    only_first: int
    only_second: int
    p_value: float
    method: str  # "exact" (binomial, two-sided) or "chi-square" (with Edwards' correction)


def mcnemar(only_first: int, only_second: int) -> McNemar:
    pairs = only_first + only_second
    if pairs <= EXACT_PAIRS_MAX:
        tail = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
        return McNemar(only_first, only_second, float(min(1, 2 * tail / 2**pairs)), "exact")
    chi = max(abs(only_first - only_second) - 1, 0) ** 2 / pairs
    return McNemar(only_first, only_second, math.erfc(math.sqrt(chi / 2)), "chi-square")


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    seed: int,
    resamples: int = RESAMPLES,
    level: float = 0.95,
) -> tuple[float, float]:
    """The percentile interval of the mean of `values`, clusters drawn with replacement.

    Clusters that look the same (sum and size) are drawn as one kind, with a multinomial: as cheap
    for 50,000 as for 50.
    """
    import numpy as np

    groups: dict[Hashable, list[float]] = defaultdict(list)
    for value, cluster in zip(values, clusters, strict=True):
        groups[cluster].append(value)
    kinds = Counter((round(math.fsum(g), 9), len(g)) for g in groups.values())
    sums = np.array([total for total, _ in kinds])
    sizes = np.array([size for _, size in kinds])
    shares = np.array(list(kinds.values())) / len(groups)
    random = np.random.default_rng(seed)
    means = []
    block = max(_BLOCK // len(kinds), 1)
    for start in range(0, resamples, block):
        drawn = random.multinomial(
            len(groups), shares, size=min(block, resamples - start)
        )  # [resamples, kinds]
        means.append(drawn @ sums / (drawn @ sizes))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def minimum_detectable_effect(
    standard_error: float, *, alpha: float = 0.05, power: float = 0.8
) -> float:
    """The difference that a two-sided test at `alpha` finds with probability `power`."""
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * standard_error


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two configurations on the items that both answered; a difference is the second minus the
    first.
    """

    items: int
    clusters: int
    first: float
    second: float
    difference: float
    low: float  # 95%, paired bootstrap
    high: float
    standard_error: float | None
    monte_carlo_error: float | None
    minimum_detectable_effect: float
    mcnemar: McNemar


def compare(
    first: Mapping[Hashable, Sequence[float]],
    second: Mapping[Hashable, Sequence[float]],
    clusters: Mapping[Hashable, Hashable],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Comparison:
    """Args: first, second: item -> its repeats' scores; at least one item in both. clusters: item
    -> what its input is.

    McNemar's test counts the first repeat of each item, since repeats of one item are no pairs of
    their own.
    """
    shared = [item for item in first if item in second]
    groups = [clusters[item] for item in shared]
    one, other = ([fmean(scores[item]) for item in shared] for scores in (first, second))
    differences = [b - a for a, b in zip(one, other, strict=True)]
    low, high = bootstrap_interval(differences, groups, seed=seed, resamples=resamples)
    error = clustered_error(differences, groups)
    chances = [monte_carlo_error([scores[item] for item in shared]) for scores in (first, second)]
    known = [c for c in chances if c is not None]
    pairs = Counter((first[item][0] >= 1, second[item][0] >= 1) for item in shared)
    size = len(set(groups))
    # Without any difference the error is not 0, only too small to be seen: as if one item in all
    # had differed.
    least = error or 1 / size
    return Comparison(
        items=len(shared),
        clusters=size,
        first=fmean(one),
        second=fmean(other),
        difference=fmean(differences),
        low=low,
        high=high,
        standard_error=error,
        monte_carlo_error=math.sqrt(math.fsum(c * c for c in known))
        if len(known) == len(chances)
        else None,
        minimum_detectable_effect=minimum_detectable_effect(least),
        mcnemar=mcnemar(pairs[True, False], pairs[False, True]),
    )
