"""The job behind ``surefoot sweep``: a search for an optimizer's best setting, going on from whatever is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from rich.console import Console

from surefoot.lab import spaces
from surefoot.lab.errors import UserError
from surefoot.lab.mirror import Mirror
from surefoot.lab.plan import MOST_RUNS, MethodRequest, parse_optimizers, parse_rates, specs
from surefoot.lab.progress import roughly, shown, wall_seconds
from surefoot.lab.report.words import with_sd
from surefoot.lab.runs import Method, RunResult, RunSpec, SearchSpec, Study, Trial
from surefoot.lab.search import GRID, LEARNING, SAMPLERS, Outcome, known, promoted, propose, ranked, rungs
from surefoot.lab.session import Advance, Options, Session, at_least, count
from surefoot.lab.spaces import BATCH, RATE, Choices, Range, Space

TRIALS = 50
"""Of a search that is no grid, unless the user says otherwise."""
SHOWN = 5
"""So many of the best trials are compared in the report."""
AT_ONCE = 5
"""Trials under way at once, if that keeps all workers busy: a sampler learns from those before."""
AT_ONCE_UNLEARNED = 20
"""The same of a sampler that does not learn: more of them make larger stacks."""


@dataclass(frozen=True, kw_only=True)
class Sweep(Options):
    """What ``surefoot sweep`` was asked to do, in the user's words."""

    optimizer: str
    sampler: str
    trials: int | None
    at_once: int | None
    halving: int | None
    rates: str | None
    ranges: tuple[str, ...]
    space: Path | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampler not in SAMPLERS:
            raise UserError(f"--sampler is {self.sampler!r}; it must be one of {', '.join(SAMPLERS)}.")
        at_least(1, "--trials", self.trials)
        at_least(1, "--at-once", self.at_once)
        at_least(2, "--halving", self.halving)
        if self.halving is not None and self.seeds < 2:
            raise UserError("--halving needs at least 2 seeds: it gives up trials after some of them.")

    def own_words(self) -> list[str]:
        words = ["sweep", self.task, "--optimizer", self.optimizer, "--sampler", self.sampler]
        words += [] if self.trials is None else ["--trials", str(self.trials)]
        words += [] if self.at_once is None else ["--at-once", str(self.at_once)]
        words += [] if self.halving is None else ["--halving", str(self.halving)]
        words += [] if self.rates is None else ["--rates", self.rates]
        words += [word for text in self.ranges for word in ("--range", text)]
        words += [] if self.space is None else ["--space", str(self.space)]
        return words


def sweep(asked: Sweep, console: Console, progress: Console, *, dry_run: bool = False) -> int:
    """Goes on with the search until it has as many trials as asked for, and writes its report.

    Args:
        asked: what to search.
        console: for what the user asked for.
        progress: for what passes while it is made.
        dry_run: say what would run and about how long; train nothing, write nothing.

    Returns:
        The exit code: 0, or what a shell expects after SIGINT or SIGTERM, when the finished runs are kept.

    Raises:
        UserError: something that the user can mend. Runs that finished before are kept, and the sentence says so.
    """
    base, space = _asked_for(asked)

    def work(session: Session) -> None:
        with closing(_Search(session, asked, base, space)) as search:
            search.carry_out(dry_run)

    return Session(asked, console, progress).hold(work)


def _asked_for(asked: Sweep) -> tuple[MethodRequest, Space]:
    """The optimizer with what is fixed, and the space, as far as they can be told without the optimizer itself."""
    base, *others = parse_optimizers(asked.optimizer)
    if others:
        raise UserError(
            f"--optimizer is {asked.optimizer!r}; it must be one, with one value for each setting: "
            "values to choose from are for --range window=50|600."
        )
    fixed = [*base.settings, *([] if base.rate is None else [RATE])]
    if asked.batch is not None or base.batch_size is not None:
        base = replace(base, batch_size=base.batch_size or asked.batch)
        fixed.append(BATCH)
    given: dict[str, spaces.Dimension] = {}
    if asked.space is not None:
        given |= spaces.read_space(asked.space)
    named = [spaces.parse_dimension(text) for text in asked.ranges]
    if asked.rates is not None:
        named.append((RATE, Choices(parse_rates(asked.rates))))
    for name, _ in named:
        if sum(other == name for other, _ in named) > 1:
            raise UserError(f"{name} is given two ranges; leave one of them out.")
    given |= dict(named)
    spaces.check(given, fixed)
    table = spaces.SPACES.get(base.optimizer, {RATE: Range(1e-5, 10.0, log=True)})
    left = {
        name: dimension
        for name, dimension in table.items()
        if not any(spaces.overlap(name, other) for other in (*fixed, *given))
    }
    return base, {**left, **given}


class _Search:
    """A search under way."""

    def __init__(self, session: Session, asked: Sweep, base: MethodRequest, space: Space) -> None:
        self._session, self._asked, self._base = session, asked, base
        self._methods: dict[int, Method] = {}  # by the trial's number
        self._runs: dict[int, dict[str, RunSpec]] = {}  # its runs, all the seeds, by key
        self._results: dict[str, RunResult] = {}  # by key
        with session.status(f"loading {asked.task}"):
            self._prepare(space)
        self._rungs = rungs(asked.seeds, asked.halving)
        size = spaces.size(self._space)
        wanted = asked.trials or (size if asked.sampler == GRID else TRIALS)
        if wanted * asked.seeds > MOST_RUNS:
            raise UserError(
                f"The search has {int(wanted * asked.seeds):,} runs and may have at most {MOST_RUNS:,}; "
                "ask for fewer seeds, trials or points."
            )
        self._most = int(min(wanted, size))
        self._mirror = Mirror(session.store.url, self._search, self._space, session.tell)
        least = AT_ONCE if asked.sampler in LEARNING else AT_ONCE_UNLEARNED
        self._at_once = asked.at_once or max(least, math.ceil(session.executor.workers / self._rungs[0]))
        self._best: int | None = None  # the number of the best trial that was told of

    def _prepare(self, space: Space) -> None:
        """Loads the task and the optimizer, and has both ends of every range and every choice tried on it."""
        executor, base = self._session.executor, self._base
        space = spaces.typed(space, {})
        (first, *_) = spaces.ends({name: d for name, d in space.items() if name in (RATE, BATCH)})
        plain = spaces.request(base, {}, first)
        self._task, (method,) = executor.prepare([plain], ())
        self._defaults = method.settings
        space = spaces.typed(space, self._defaults)
        self._space = spaces.gridded(space) if self._asked.sampler == GRID else space
        probes = [spaces.request(base, self._defaults, point) for point in spaces.ends(self._space)]
        _, methods = executor.prepare(probes, ())
        self._probes = methods[:: max(1, len(methods) - 1)]  # both ends: enough to be timed
        fixed = {name: value for name, value in self._defaults.items() if name not in self._space}
        if RATE not in self._space:
            fixed[RATE] = base.rate
        if BATCH not in self._space:
            fixed[BATCH] = method.batch_size
        self._search = SearchSpec(
            task=self._task.name,
            task_version=self._task.version,
            optimizer=base.optimizer,
            settings=fixed,
            space=spaces.plain(self._space),
            sampler=self._asked.sampler,
            epochs=self._asked.epochs or self._task.epochs,
            seeds=self._asked.seeds,
            halving=self._asked.halving,
        )

    def carry_out(self, dry_run: bool) -> None:
        """Says what is to be done, does it, and reports."""
        session, trials = self._session, self._outcomes()
        left = self._left(trials)
        self._say_what(trials)
        if not dry_run:
            session.open()
        if left:
            with session.status("timing the optimizer for a moment"):
                probes = specs(self._task, self._probes, self._search.epochs, [0])
                alike = self._at_once * self._search.seeds
                times = session.executor.estimate(probes, min(left, alike), remember=not dry_run)
            session.say_refusals()
            each = math.fsum(times) / len(times)
            about = roughly(wall_seconds([each] * left, session.executor.workers))
            session.say(
                f"The {count(left, 'run')} to do {'would take' if dry_run else 'take'} "
                f"{'at most ' if self._asked.halving else ''}about {about}."
            )
            if not dry_run:
                with shown(session.progress, [each] * left, session.executor.workers) as advance:
                    self._search_on(each, left, advance)
        if dry_run:
            session.say("Nothing was trained and nothing was written.")
        else:
            self._report()

    def close(self) -> None:
        """Lets go of the database beside the store's own connection."""
        self._mirror.close()

    def _search_on(self, each: float, left: int, advance: Advance) -> None:
        """Tries settings until there are enough of them, or no more to try."""
        session, asked = self._session, self._asked

        def finished(seconds: float, result: RunResult | None) -> None:
            nonlocal left
            left -= 1
            advance(seconds, result)

        while True:
            trials = self._outcomes()
            self._tell_best(trials)
            for _ in range(left - self._left(trials)):  # what was given up, and what others have done
                finished(each, None)
            taken = self._take(trials)
            proposals = []
            if (
                not taken
            ):  # what was begun ends first: so an interruption changes nothing of what is tried after it
                trials = self._decided(trials)
                taken = self._take(trials)
                mine = {run.key for run in taken}
                under_way = sum(not mine.isdisjoint(self._missing(trial)) for trial in trials)
                room = min(self._at_once - under_way, self._most - len(trials))
                if room > 0:
                    what = f"the sampler {asked.sampler}"
                    arguments = asked.sampler, self._space, known(trials), room
                    proposals = session.executor.call(what, propose, *arguments)
                    session.store.begin_trials(self._search, proposals, self._rungs[0], self._most)
                    trials = self._outcomes()
                    taken = self._take(trials)
            if taken:
                session.train(taken, {run.key: each for run in taken}, finished)
                self._mirror.update(self._outcomes())
            elif any(trial.state == "open" for trial in trials):
                session.wait()
            elif not proposals:
                return

    def _take(self, outcomes: Sequence[Outcome]) -> list[RunSpec]:
        """The runs of these trials that are this process's to make."""
        return self._session.take(run for outcome in outcomes for run in self._missing(outcome).values())

    def _outcomes(self) -> list[Outcome]:
        """The trials as the store has them now."""
        session = self._session
        trials = session.store.trials(self._search)
        if new := [trial for trial in trials if trial.number not in self._methods]:
            requests = [spaces.request(self._base, self._defaults, trial.setting) for trial in new]
            _, methods = session.executor.prepare(requests, ())
            for trial, method in zip(new, methods, strict=True):
                runs = specs(self._task, [method], self._search.epochs, range(self._search.seeds))
                self._methods[trial.number] = method
                self._runs[trial.number] = {run.key: run for run in runs}
        granted = {trial.number: self._granted(trial) for trial in trials}
        session.runs = [run for runs in granted.values() for run in runs.values()]
        labels = {key: self._methods[number].label for number, runs in granted.items() for key in runs}
        session.tracking.describe(self._task, labels)
        self._results |= session.store.load(labels.keys() - self._results.keys())
        return [
            Outcome(
                trial,
                tuple(self._results[key] for key in granted[trial.number] if key in self._results),
                self._search.seeds,
            )
            for trial in trials
        ]

    def _granted(self, trial: Trial) -> dict[str, RunSpec]:
        """The runs that a trial may make so far, by key."""
        return dict(islice(self._runs[trial.number].items(), trial.seeds))

    def _missing(self, outcome: Outcome) -> dict[str, RunSpec]:
        """Those of them that it still has to make."""
        if outcome.state != "open":
            return {}
        return {key: run for key, run in self._granted(outcome.trial).items() if key not in self._results}

    def _left(self, outcomes: Sequence[Outcome]) -> int:
        """How many runs there are to do, if every trial goes all the way."""
        seeds = self._search.seeds
        open_trials = [outcome for outcome in outcomes if outcome.state == "open"]
        begun = sum(seeds - len(outcome.runs) for outcome in open_trials)
        return begun + seeds * max(0, self._most - len(outcomes))

    def _decided(self, outcomes: list[Outcome]) -> list[Outcome]:
        """The trials after those that came to a rung went on to the next, or were given up."""
        if self._search.halving is None:
            return outcomes
        decisions = promoted(outcomes, self._search.halving)
        for outcome in outcomes:
            trial = outcome.trial
            if trial.number not in decisions:
                continue
            if decisions[trial.number]:
                further = next(rung for rung in self._rungs if rung > trial.seeds)
                self._session.store.grant(self._search, trial, further)
            else:
                self._session.store.prune(self._search, trial)
        return self._outcomes() if decisions else outcomes

    def _tell_best(self, outcomes: Sequence[Outcome]) -> None:
        """Says which trial is the best so far, where another one is."""
        finished = ranked(outcomes)
        if not finished or finished[0].state != "complete" or finished[0].trial.number == self._best:
            return
        self._best = finished[0].trial.number
        loss = " ".join(filter(None, with_sd(finished[0].loss)))
        label = self._methods[self._best].label
        self._session.tell(
            f"{len(finished)} of {count(self._most, 'trial')}; the best so far: {loss} with {label}"
        )

    def _say_what(self, outcomes: Sequence[Outcome]) -> None:
        session, search = self._session, self._search
        session.say_task(self._task, search.epochs)
        width = max(map(len, self._space))
        session.say(f"{self._base.label}: {count(len(self._space), 'setting')} to search by {search.sampler}")
        for name, dimension in self._space.items():
            session.say(f"  {name:{width}}  {spaces.in_words(dimension)}")
        finished = sum(outcome.state != "open" for outcome in outcomes)
        runs = sum(len(outcome.runs) for outcome in outcomes)
        session.say(
            f"{count(max(self._most, finished), 'trial')} of {count(search.seeds, 'run')}; {finished:,} of them "
            f"({count(runs, 'run')}) in {session.store.name} already."
        )

    def _report(self) -> None:
        # With plotly: not before it is needed.
        from surefoot.lab.report.html import write_report
        from surefoot.lab.report.terminal import print_summary
        from surefoot.lab.report.views import Searched

        outcomes = self._outcomes()
        self._mirror.update(outcomes)
        ended = ranked(outcomes)
        top = [outcome for outcome in ended if len(outcome.runs) == len(ended[0].runs)][:SHOWN]
        methods = [self._methods[outcome.trial.number] for outcome in top]
        results = {method.label: outcome.runs for method, outcome in zip(methods, top, strict=True)}
        command = self._asked.command(self._search.epochs, self._session.store.name)
        study = Study(
            self._task,
            methods,
            results,
            self._search.epochs,
            range(self._search.seeds),
            command,
            chosen_from=len(outcomes),
        )
        print_summary(study, self._session.console)
        self._session.report(lambda path: write_report(study, path, Searched(self._space, outcomes)))
