"""Which settings a search tries: grids by our own enumeration, everything else by Optuna's samplers; and which it gives up.

The store has the trials and their runs; an Optuna study is made from them whenever one is needed and thrown away after it.
So nothing can be left half done, and what is proposed depends on nothing but what the store has.

**What a sampler is told.** A trial's value is the mean over its seeds of the final validation loss, but no more than a
ceiling, which lies three times as far above the median as the best is below it. A trial of which a run diverged is told at
the ceiling. It is neither left out (Optuna's FAIL: TPE and GP would go on proposing where everything diverges, for they
learn of it nothing) nor pruned (GP does not look at pruned trials) nor given a huge number (GP's model standardises the
values, and everything else would look alike). TPE goes by the order of the best tenth, which a ceiling above the median
cannot change. A trial that was pruned is told with the seeds that it has: fewer seeds of the same runs make the mean
noisier but not another quantity, as fewer epochs would.

**Pruning** is successive halving with the seeds for the resource: a stored run is never changed and one of few epochs is no
part of one of many, but one of few seeds is part of the trial of many. Every trial starts with few seeds; at each rung those
among the best 1/``halving`` of all trials that came so far, by the mean over the same seeds, get the seeds of the next.
"""

from __future__ import annotations

import hashlib
import math
import random
import statistics
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal, cast

from surefoot.lab import spaces
from surefoot.lab.plan import written
from surefoot.lab.runs import RunResult, Scalar, Trial, Value, digest_of
from surefoot.lab.spaces import Choices, Dimension, Setting, Space
from surefoot.lab.stats import Estimate, estimate

if TYPE_CHECKING:
    import optuna

    from surefoot.lab.worker import Room

GRID = "grid"
LEARNING = ("tpe", "gp")
"""The samplers for which it matters what came out before."""
SAMPLERS = (*LEARNING, "random", GRID)
STARTUP_TRIALS = 10
"""So many are drawn at random before a sampler goes by what is known."""
_REPEATED = 3
"""After so many proposals in a row of settings that were tried already, others are drawn at random."""
_ENUMERATED = 100_000
"""A space of more points than these is not written out: what was not tried in it is easily met by chance."""


@dataclass(frozen=True)
class Outcome:
    """What is known of a trial.

    Args:
        trial: its setting, and how far it may go.
        runs: those of its seeds that are stored, by seed.
        whole: how many seeds a trial has that goes all the way.
    """

    trial: Trial
    runs: tuple[RunResult, ...]
    whole: int

    @property
    def state(self) -> Literal["open", "complete", "pruned"]:
        """Whether it is to go on."""
        if self.trial.pruned:
            return "pruned"
        return "complete" if len(self.runs) == self.whole else "open"

    @property
    def waits(self) -> bool:
        """Whether it has made all its runs and is to be decided on."""
        return self.state == "open" and len(self.runs) == self.trial.seeds

    @property
    def loss(self) -> Estimate:
        """The final validation loss over the seeds that there are: infinite if one diverged."""
        return self.loss_of(self.whole)

    @property
    def diverged(self) -> int:
        """How many runs diverged."""
        return sum(run.status == "diverged" for run in self.runs)

    def loss_of(self, seeds: int) -> Estimate:
        """The same over the first so many seeds."""
        return estimate(run.final_validation_loss for run in self.runs if run.spec.seed < seeds)


def rungs(seeds: int, halving: int | None) -> list[int]:
    """How many seeds a trial has at each rung: for 5 seeds and a halving by 3, ``[1, 2, 5]``."""
    found = [seeds]
    while halving and found[0] > 1:
        found.insert(0, math.ceil(found[0] / halving))
    return found


def promoted(outcomes: Sequence[Outcome], halving: int) -> dict[int, bool]:
    """Of the trials that wait to be decided on, by number: whether they go on to the next rung.

    Those do that are among the best ``1 / halving`` (at least the best one) of all trials that came to their rung, by the
    mean over its seeds; never one of which a run diverged.
    """
    decisions = {}
    for outcome in outcomes:
        if not outcome.waits:
            continue
        rung = outcome.trial.seeds
        reached = (other.loss_of(rung) for other in outcomes)
        peers = sorted(loss.mean for loss in reached if loss.n == rung)
        threshold = peers[max(1, len(peers) // halving) - 1]
        decisions[outcome.trial.number] = outcome.loss.mean <= threshold and not outcome.diverged
    return decisions


def ranked(outcomes: Iterable[Outcome]) -> list[Outcome]:
    """The trials that came to their end, best first: by how far they came, then by their mean loss."""
    ended = (outcome for outcome in outcomes if outcome.state != "open")
    return sorted(ended, key=lambda o: (-len(o.runs), o.loss.mean, o.diverged, o.trial.number))


def told(means: Sequence[float]) -> list[float]:
    """What a sampler is told of trials with these mean losses (infinity: diverged), as the module says."""
    finite = [mean for mean in means if math.isfinite(mean)]
    if not finite:
        return [0.0] * len(means)
    median = statistics.median(finite)
    ceiling = median + 3 * ((median - min(finite)) or abs(median) or 1.0)
    return [min(mean, ceiling) for mean in means]


@dataclass(frozen=True)
class Known:
    """What a sampler goes by of one trial."""

    setting: Setting
    value: float | None
    """``None``: it is under way."""


def known(outcomes: Sequence[Outcome]) -> list[Known]:
    """All trials, as a sampler is told of them: none of their runs, so that it is quick to send."""
    finished = [outcome for outcome in outcomes if outcome.state != "open"]
    values = dict(zip((o.trial.number for o in finished), told([o.loss.mean for o in finished]), strict=True))
    return [Known(outcome.trial.setting, values.get(outcome.trial.number)) for outcome in outcomes]


def propose(
    room: Room | None, sampler: str, space: Space, trials: Sequence[Known], count: int
) -> list[Setting]:
    """The next settings to try: ``count``, or fewer where the space has no more. None is among ``trials``.

    A job of a worker's (``room`` is not used), for GP imports torch. The same trials give the same proposals.
    """
    tried = {digest_of(trial.setting) for trial in trials}
    found: list[Setting] = []
    repeated = 0
    for setting in spaces.points(space) if sampler == GRID else _sampled(sampler, space, trials):
        key = digest_of(setting)
        if key not in tried:
            tried.add(key)
            found.append(setting)
            repeated = 0
        else:
            repeated += 1
        if len(found) == count:
            return found
        if repeated == _REPEATED and sampler != GRID:
            break
    return [*found, *islice(_others(space, tried, len(trials)), count - len(found))]


def _others(space: Space, tried: set[str], trials: int) -> Iterator[Setting]:
    """Settings that were not tried, at random, for a sampler that has come to what was."""
    if spaces.size(space) <= _ENUMERATED:
        left = [setting for setting in spaces.points(space) if digest_of(setting) not in tried]
        random.Random(_seed(trials)).shuffle(left)
        yield from left
        return
    for setting in _sampled("random", space, []):
        if (key := digest_of(setting)) not in tried:
            tried.add(key)
            yield setting


def optuna_trial(
    space: Space, setting: Setting, value: float | None, state: str | None = None, **options: Any
) -> optuna.trial.FrozenTrial:
    """A trial for such a study: complete with a value, under way without one; ``options`` are ``create_trial``'s."""
    import optuna

    states = optuna.trial.TrialState
    return optuna.trial.create_trial(
        params={name: _shown(value) for name, value in setting.items()},
        distributions={name: distribution(dimension) for name, dimension in space.items()},
        value=value,
        state=states[state] if state else states.RUNNING if value is None else states.COMPLETE,
        **options,
    )


def distribution(dimension: Dimension) -> optuna.distributions.BaseDistribution:
    """As Optuna describes a dimension. Its databases take no tuples, so those are texts there."""
    from optuna import distributions

    if isinstance(dimension, Choices):
        return distributions.CategoricalDistribution([_shown(value) for value in dimension.values])
    if dimension.whole:
        return distributions.IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


@contextmanager
def quietly() -> Iterator[None]:
    """Without what Optuna logs of every trial, and without its warnings of features that may still change."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optuna.logging.set_verbosity(before)


def _sampled(sampler: str, space: Space, trials: Sequence[Known]) -> Iterator[Setting]:
    """Optuna's proposals, each in the light of those before it, without end; some may be of settings that were tried."""
    import optuna

    seed = _seed(len(trials))
    samplers = {
        "tpe": lambda: optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=STARTUP_TRIALS, multivariate=True, constant_liar=True
        ),
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }
    distributions = {name: distribution(dimension) for name, dimension in space.items()}
    with quietly():
        study = optuna.create_study(direction="minimize", sampler=samplers[sampler]())
        study.add_trials([optuna_trial(space, trial.setting, trial.value) for trial in trials])
        while True:
            proposal = study.ask(distributions).params  # which stays under way, and is kept away from
            yield {name: _taken(proposal[name], dimension) for name, dimension in space.items()}


def _seed(trials: int) -> int:
    """Of the proposals after so many trials."""
    return int.from_bytes(hashlib.sha256(f"proposals after {trials} trials".encode()).digest()[:4], "big")


def _shown(value: Value) -> Scalar:
    return written(value) if isinstance(value, tuple) else cast(Scalar, value)


def _taken(value: Any, dimension: Dimension) -> Value:
    """What Optuna proposes, as a value of ours."""
    if isinstance(dimension, Choices):
        return next(choice for choice in dimension.values if written(choice) == written(value))
    return dimension.rounded(value)
