"""What the runs of a study mean: pure functions from stored runs to means, spreads, intervals and verdicts.

The rules of scoring, all in this file:

* a spread is the sample standard deviation (``n - 1``), an interval is Student's at 95 %; one run has neither;
* a diverged run has an infinite loss, and no mean hides it: the mean of a rate with a diverged run is infinite;
* each method stands for its best initial rate, the one with the lowest mean final validation loss over the seeds.
  It is chosen on the very seeds that it is then judged by, which flatters a method the more rates it was given;
* two methods are compared by the differences of their final validation losses *within* each seed, with Holm's
  correction over all pairs. Where one of them diverged no difference has a mean, and ranks are compared instead.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import Literal

import numpy as np
from scipy import special

from surefoot.lab.runs import Method, RunResult, Study

CONFIDENCE = 0.95
SIGNIFICANCE = 0.05
POWER = 0.8
TOLERANCE = 0.1
"""A rate is as good as the best one while its loss exceeds the best by no more than this fraction."""
MOST_SEEDS = 10_000
"""Where :func:`seeds_to_tell` gives up."""

Verdict = Literal["first", "second", "noise", "unknown"]
CurveName = Literal[
    "train_loss", "validation_loss", "validation_metric", "rate_mean", "rate_std", "rate_min", "rate_max"
]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` runs with its spread: standard deviation and 95 % interval, NaN where they do not exist.

    The mean of values among which one is infinite is infinite, or NaN where both infinities or a NaN are among them.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """Half the interval's width, the number after a plus-minus sign."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class RatePoint:
    """One initial rate of one method: its final validation loss over the seeds, and how many runs diverged."""

    rate: float
    loss: Estimate
    diverged: int


@dataclass(frozen=True)
class Summary:
    """One method at its best initial rate, over the seeds."""

    label: str
    best_rate: float
    """NaN where the method has no run at all."""
    best_runs: tuple[RunResult, ...]
    """The runs at the best rate, by seed."""
    rates: tuple[RatePoint, ...]
    """Every rate with a run, ascending."""
    min_train_loss: Estimate
    min_train_epoch: float
    """When the minimum was reached, in passes over the training data, mean over the seeds; NaN if a run diverged."""
    final_loss: Estimate
    final_metric: Estimate
    """Of no value (``n`` = 0) where the task has no metric; NaN if a run diverged."""
    step_seconds: float
    """Median over all runs of the method, at all rates."""
    decades: float
    """See :func:`decades_within`."""
    runs: int
    """At all rates; so is ``diverged``."""
    diverged: int

    @property
    def losses(self) -> dict[int, float]:
        """Final validation loss by seed at the best rate; infinity for a diverged run."""
        return {run.spec.seed: run.final_validation_loss for run in self.best_runs}

    @property
    def best_is_at_the_edge(self) -> bool:
        """Whether the best rate is the smallest or the largest tried: a better one may lie outside."""
        tried = [point.rate for point in self.rates]
        finite = math.isfinite(self.final_loss.mean)
        return finite and len(tried) > 1 and self.best_rate in (tried[0], tried[-1])


@dataclass(frozen=True)
class Pair:
    """Two methods, each at its best rate, compared over the seeds that both have."""

    first: str
    second: str
    difference: Estimate
    """Final validation loss of the first minus that of the second, paired by seed: negative if the first is better."""
    p: float
    """Two-sided p of the paired t test, or of the rank test where a run diverged; NaN with fewer than 2 seeds."""
    p_holm: float
    """The same after Holm's correction over all pairs of the study: what the verdict is drawn from."""
    level: float
    """5 % shared among all pairs of the study that could be compared."""
    lead: float
    """What the test weighed: its sign is negative if the first is ahead, positive if the second is."""
    diverged: tuple[int, int]
    """Runs of the first and of the second that diverged, among the common seeds."""

    @property
    def verdict(self) -> Verdict:
        """The better one, if ``p_holm`` is below 5 %; ``"noise"``; ``"unknown"`` with fewer than 2 common seeds."""
        if math.isnan(self.p_holm):
            return "unknown"
        if self.p_holm >= SIGNIFICANCE:
            return "noise"
        return "first" if self.lead < 0 else "second"

    @cached_property
    def seeds_to_tell(self) -> float:
        """How many seeds would tell a difference of the observed size beside as many other pairs.

        See :func:`seeds_to_tell`. If the verdict is ``"noise"``, more than there are; NaN where a run diverged.
        """
        if sum(self.diverged):
            return math.nan
        return seeds_to_tell(self.difference.mean, self.difference.sd, self.level)


@dataclass(frozen=True)
class Analysis:
    """All that the statistics say of a study."""

    summaries: tuple[Summary, ...]
    """One for each method, best first: by mean final validation loss, then by label; methods without runs last."""
    pairs: tuple[Pair, ...]
    """Every pair, the better placed one first, in the order of ``summaries``."""

    @property
    def tested(self) -> int:
        """How many pairs have a p value: Holm's correction is over these."""
        return sum(not math.isnan(pair.p) for pair in self.pairs)

    def pair(self, first: str, second: str) -> Pair:
        """The pair of these two labels, the better placed one named first."""
        return next(pair for pair in self.pairs if (pair.first, pair.second) == (first, second))


@dataclass(frozen=True)
class Curve:
    """A curve's mean and standard deviation over ``n`` runs, point by point, as far as *every* run came.

    A curve that went on without the runs that diverged would look better exactly where the method is at its worst.
    """

    n: int
    patterns: tuple[int, ...]
    mean: tuple[float, ...]
    sd: tuple[float, ...]


def analyse(study: Study) -> Analysis:
    """Summarises every method of ``study`` and compares every two of them."""
    train_patterns = study.task.train_patterns
    summaries = [
        summarise(method, study.results.get(method.label, ()), train_patterns) for method in study.methods
    ]
    summaries.sort(key=_rank)
    return Analysis(tuple(summaries), compare_all(summaries))


def estimate(values: Iterable[float]) -> Estimate:
    """Mean, sample standard deviation and Student's 95 % interval of ``values`` (see :class:`Estimate`)."""
    x = np.fromiter(values, dtype=float)
    n = len(x)
    if n == 0:
        return Estimate(0, math.nan, math.nan, math.nan, math.nan)
    if not np.isfinite(x).all():
        with np.errstate(invalid="ignore"):
            return Estimate(n, float(x.sum()), math.nan, math.nan, math.nan)
    mean = math.fsum(x) / n  # exact sums: the order in which runs finished must not move the last bit
    if n == 1:
        return Estimate(n, mean, math.nan, math.nan, math.nan)
    if x.min() == x.max():  # no spread, though the rounded mean may differ from the values in the last bit
        return Estimate(n, float(x[0]), 0.0, float(x[0]), float(x[0]))
    with np.errstate(over="ignore"):
        sd = math.sqrt(math.fsum((x - mean) ** 2) / (n - 1))
    half = float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * sd / math.sqrt(n)
    return Estimate(n, mean, sd, mean - half, mean + half)


def summarise(method: Method, runs: Iterable[RunResult], train_patterns: int) -> Summary:
    """One method over all its runs, in whatever order they come; ``train_patterns`` is the length of an epoch.

    The best rate has the lowest mean final validation loss. Of equals (all rates may have diverged) it is the one with
    fewest diverged runs, then the smallest.
    """
    runs = sorted(runs, key=lambda run: (run.spec.rate, run.spec.seed))
    by_rate: defaultdict[float, list[RunResult]] = defaultdict(list)
    for run in runs:
        by_rate[run.spec.rate].append(run)
    points = tuple(
        RatePoint(rate, estimate(run.final_validation_loss for run in group), _count_diverged(group))
        for rate, group in by_rate.items()
    )
    best = min(points, key=lambda point: (point.loss.mean, point.diverged, point.rate), default=None)
    best_runs = by_rate[best.rate] if best else []
    metrics = [run.final_validation_metric for run in best_runs]
    if not any(run.validation_metric for run in runs):
        metrics = []
    steps = [run.step_seconds for run in runs if run.steps]
    return Summary(
        label=method.label,
        best_rate=best.rate if best else math.nan,
        best_runs=tuple(best_runs),
        rates=points,
        min_train_loss=estimate(run.min_train_loss for run in best_runs),
        min_train_epoch=estimate(run.min_train_loss_patterns / train_patterns for run in best_runs).mean,
        final_loss=estimate(run.final_validation_loss for run in best_runs),
        final_metric=estimate(metrics),
        step_seconds=float(np.median(steps)) if steps else math.nan,
        decades=decades_within([point.rate for point in points], [point.loss.mean for point in points]),
        runs=len(runs),
        diverged=_count_diverged(runs),
    )


def decades_within(rates: Sequence[float], losses: Sequence[float], tolerance: float = TOLERANCE) -> float:
    """How many decades of initial rate are as good as the best one: a method's insensitivity.

    Every rate stands for a cell of the logarithmic axis that reaches half-way to its neighbours, the two at the ends as
    far outside as inside. What is returned is the width, in decades, of all cells with
    ``loss <= best + tolerance * |best|``: for a grid of decades, their number. ``rates`` ascend.

    NaN where there are fewer than two rates, 0 where no loss is finite.
    """
    if len(rates) < 2:
        return math.nan
    best = min(losses)
    if not math.isfinite(best):
        return 0.0
    position = np.log10(rates)
    gaps = np.diff(position)
    widths = (np.concatenate([gaps[:1], gaps]) + np.concatenate([gaps, gaps[-1:]])) / 2
    return float(widths[np.asarray(losses) <= best + tolerance * abs(best)].sum())


def compare_all(summaries: Sequence[Summary]) -> tuple[Pair, ...]:
    """Every two of ``summaries``, in their order, with Holm's correction over those that could be compared."""
    pairs = [
        compare(first.label, first.losses, second.label, second.losses)
        for first, second in combinations(summaries, 2)
    ]
    adjusted = holm([pair.p for pair in pairs])
    level = SIGNIFICANCE / max(1, sum(not math.isnan(pair.p) for pair in pairs))
    return tuple(replace(pair, p_holm=p, level=level) for pair, p in zip(pairs, adjusted, strict=True))


def compare(
    first: str, first_losses: Mapping[int, float], second: str, second_losses: Mapping[int, float]
) -> Pair:
    """Two methods by their losses over the seeds that both have, as if they were the only two.

    The test is the paired t test of ``first - second``; where a run of either diverged it is the Mann-Whitney rank test,
    in which a diverged run is worse than every run that finished.
    """
    seeds = sorted(first_losses.keys() & second_losses.keys())
    a = np.array([first_losses[seed] for seed in seeds])
    b = np.array([second_losses[seed] for seed in seeds])
    with np.errstate(invalid="ignore"):
        difference = estimate(a - b)
    diverged = int(np.isinf(a).sum()), int(np.isinf(b).sum())
    p, lead = math.nan, difference.mean
    if any(diverged):
        difference = replace(difference, mean=_mean_difference(diverged))
    if len(seeds) >= 2:
        p, lead = rank_test(a, b) if any(diverged) else (_paired_t_test(difference), difference.mean)
    return Pair(first, second, difference, p, p, SIGNIFICANCE, lead, diverged)


def rank_test(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Mann-Whitney test of ``a`` against ``b``: two-sided p, and ``U - n m / 2``, negative if ``a`` is the lower.

    Normal approximation, corrected for ties and continuity. Infinities count as equals. That the samples are paired it
    does not use; where pairing makes them alike it errs towards "noise".
    """
    from scipy import stats  # takes as long to import as all the rest

    lead = float((a[:, None] > b).sum() - (a[:, None] < b).sum()) / 2
    if np.unique(np.concatenate([a, b])).size == 1:
        return 1.0, lead
    return float(stats.mannwhitneyu(a, b, method="asymptotic").pvalue), lead


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment. NaN (nothing was tested) stays NaN and does not count."""
    tested = sorted((p, index) for index, p in enumerate(p_values) if not math.isnan(p))
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, (p, index) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        adjusted[index] = largest
    return adjusted


def seeds_to_tell(mean: float, sd: float, level: float = SIGNIFICANCE) -> float:
    """The smallest number of seeds whose two-sided paired t test at ``level`` finds this effect in 80 % of studies.

    By the noncentral t distribution, as if the observed ``mean`` and ``sd`` of the differences were the true ones.
    Infinity if it is more than ``MOST_SEEDS`` or the mean is zero, NaN if there is no spread to go by.
    """
    if not (math.isfinite(mean) and math.isfinite(sd)):
        return math.nan
    if mean == 0:
        return math.inf
    if sd == 0:
        return 2.0
    effect = min(
        abs(mean / sd), 100.0
    )  # two seeds are enough long before; larger ones only strain the distribution

    def power(n: int) -> float:
        shift = effect * math.sqrt(n)
        critical = special.stdtrit(n - 1, 1 - level / 2)
        return 1 - special.nctdtr(n - 1, shift, critical)  # the other tail is nothing where the power is 80 %

    low, high = 1, 2
    # Doubling keeps the distribution away from shifts where it is no longer accurate.
    while power(high) < POWER:
        if high == MOST_SEEDS:
            return math.inf
        low, high = high, min(2 * high, MOST_SEEDS)
    while high - low > 1:  # the power of `high` suffices, that of `low` does not
        middle = (low + high) // 2
        low, high = (low, middle) if power(middle) >= POWER else (middle, high)
    return float(high)


def mean_curve(runs: Sequence[RunResult], name: CurveName) -> Curve:
    """Mean and standard deviation over ``runs`` of the curve ``name``, cut where the shortest ends.

    Raises:
        ValueError: the runs' points were not taken after the same numbers of patterns.
    """
    curves = [getattr(run, name) for run in runs]
    length = min(map(len, curves), default=0)
    grids = {tuple(run.patterns[:length]) for run in runs}
    if len(grids) > 1:
        raise ValueError("curves with different points cannot be averaged")
    points = [estimate(curve[i] for curve in curves) for i in range(length)]
    return Curve(
        n=len(curves),
        patterns=grids.pop() if grids else (),
        mean=tuple(point.mean for point in points),
        sd=tuple(point.sd for point in points),
    )


def _paired_t_test(difference: Estimate) -> float:
    """Two-sided p that the mean difference is zero."""
    if difference.sd == 0:  # every seed gave the same difference: nothing, or something beyond doubt
        return 1.0 if difference.mean == 0 else 0.0
    t = difference.mean / difference.sd * math.sqrt(difference.n)
    return float(2 * special.stdtr(difference.n - 1, -abs(t)))


def _mean_difference(diverged: tuple[int, int]) -> float:
    """Where losses are infinite: infinite if only one side's are, otherwise no number."""
    if all(diverged):
        return math.nan
    return math.inf if diverged[0] else -math.inf


def _count_diverged(runs: Iterable[RunResult]) -> int:
    return sum(run.status == "diverged" for run in runs)


def _rank(summary: Summary) -> tuple[bool, float, int, str]:
    mean = summary.final_loss.mean
    return math.isnan(mean), mean, _count_diverged(summary.best_runs), summary.label
