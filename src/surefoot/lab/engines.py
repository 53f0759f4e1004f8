"""How many runs are trained together, and in which way: what was timed, and the choice among it.

This is the driver's side, which must not import torch; the timing itself is :mod:`surefoot.lab.timing`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from operator import itemgetter

from surefoot.lab.runs import RunSpec

AUTO, SEPARATE, STACKED = ENGINES = ("auto", "separate", "stacked")
"""The fastest way; one run after the other; stacks, where they can be had, whether they are faster or not."""
MOST = 256
"""Runs in a stack: no machine was seen on which more were faster."""
MORE = 1.25
"""A batch may be so much larger than what was found the fastest: better than a small one left over."""


@dataclass(frozen=True)
class Way:
    """One way of training runs that are alike, and what it takes."""

    lowering: str | None
    """How the stack is computed, one of :data:`surefoot.lab.population.LOWERINGS`; ``None``: each run by itself."""
    runs: int
    """How many are trained together."""
    step: float
    """Seconds that one step takes, divided by the runs that make it together."""


@dataclass(frozen=True)
class Timing:
    """What runs that are alike take, each way that was tried."""

    rest: float
    """Seconds of a run beside its steps: its making, and its validation."""
    steps: int
    ways: tuple[Way, ...]
    """Each run by itself is the first."""
    up_to: int
    """Stacks of more runs were not thought of."""
    refusal: str | None = None
    """Why there are no stacks, as the end of a sentence."""

    def seconds(self, way: Way) -> float:
        """What one run takes this way, its share."""
        return self.rest + self.steps * way.step

    def best(self, engine: str, runs: int) -> Way:
        """The fastest way for so many runs, of those that the engine allows."""
        alone, *stacks = self.ways
        stacks = [way for way in stacks if way.runs <= max(runs, 1)]
        if engine == SEPARATE or not stacks:
            return alone
        return min([alone, *stacks] if engine == AUTO else stacks, key=lambda way: way.step)


def batches(
    runs: Sequence[RunSpec],
    kind: Callable[[RunSpec], str],
    way: Callable[[str], Way],
    seconds: Callable[[str], float],
    workers: int,
    least: float,
) -> list[tuple[RunSpec, ...]]:
    """The runs as they are best given to workers, in this order.

    Only runs of one kind share a batch. None is longer than a worker's share of the whole time. The low seeds come first,
    so that what is finished early can be compared, and of one seed the longest.

    Args:
        runs: all of them.
        kind: which runs are alike.
        way: how a kind is trained.
        seconds: what a run of a kind takes.
        workers: how many batches are under way at once.
        least: seconds that a batch of runs by themselves should take.
    """
    kinds: dict[str, list[RunSpec]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        kinds.setdefault(kind(run), []).append(run)
    each = {name: seconds(name) for name in kinds}
    share = sum(len(own) * each[name] for name, own in kinds.items()) / workers
    cut: list[tuple[int, float, tuple[RunSpec, ...]]] = []
    for name, own in kinds.items():
        fastest = way(name)
        at_once = fastest.runs if fastest.lowering else _over(least, each[name])
        fewest = _over(len(own), min(int(MORE * at_once), max(at_once, MOST)))
        number = max(fewest, round(len(own) / at_once), _over(len(own) * each[name], share))
        if len(kinds) == 1:  # no others to fill up the last round
            number = workers * _over(number, workers)
        number = min(number, len(own))
        ends = [len(own) * i // number for i in range(number + 1)]
        cut += [
            (own[start].seed, (start - end) * each[name], tuple(own[start:end]))
            for start, end in pairwise(ends)
        ]
    return [batch for _, _, batch in sorted(cut, key=itemgetter(0, 1))]


def _over(a: float, b: float) -> int:
    """``a / b`` rounded up, at least 1; a little more than a whole number is that number."""
    return max(1, -int(-(a / b - 1e-9) // 1)) if b > 0 else 1
