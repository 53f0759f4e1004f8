"""The main job: a comparison from the user's words to the report, going on from whatever is already stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console

from surefoot.lab.plan import MethodRequest, check_size, parse_optimizers, parse_rates, specs
from surefoot.lab.progress import roughly, shown, wall_seconds
from surefoot.lab.runs import Method, RunSpec, Study, TaskInfo
from surefoot.lab.session import Options, Session, count


@dataclass(frozen=True, kw_only=True)
class Comparison(Options):
    """What ``surefoot compare`` was asked to do, in the user's words."""

    optimizers: str
    rates: str

    def own_words(self) -> list[str]:
        return ["compare", self.task, "--optimizers", self.optimizers, "--rates", self.rates]


@dataclass(frozen=True)
class _Plan:
    """What was asked for, resolved: the task is loaded and every setting known."""

    task: TaskInfo
    methods: Sequence[Method]
    epochs: int
    seeds: range

    def runs(self, *methods: Method) -> list[RunSpec]:
        """The runs of these methods, or of all."""
        return specs(self.task, methods or self.methods, self.epochs, self.seeds)


def compare(asked: Comparison, console: Console, progress: Console, *, dry_run: bool = False) -> int:
    """Runs what is not stored yet, stores each run as it ends, prints a summary and writes the report.

    Args:
        asked: what to compare.
        console: for what the user asked for.
        progress: for what passes while it is made.
        dry_run: say what would run and about how long; train nothing, write nothing.

    Returns:
        The exit code: 0, or what a shell expects after SIGINT or SIGTERM, when the finished runs are kept.

    Raises:
        UserError: something that the user can mend. Runs that finished before are kept, and the sentence says so.
    """
    requests = parse_optimizers(asked.optimizers)
    if asked.batch is not None:
        requests = [replace(r, batch_size=asked.batch) if r.batch_size is None else r for r in requests]
    rates = parse_rates(asked.rates)
    check_size(requests, rates, asked.seeds)
    return Session(asked, console, progress).hold(
        lambda session: _compare(session, asked, requests, rates, dry_run)
    )


def _compare(
    session: Session,
    asked: Comparison,
    requests: Sequence[MethodRequest],
    rates: tuple[float, ...],
    dry_run: bool,
) -> None:
    store, executor = session.store, session.executor
    with session.status(f"loading {asked.task}"):
        task, methods = executor.prepare(requests, rates)
    plan = _Plan(task, methods, asked.epochs or task.epochs, range(asked.seeds))
    session.runs = runs = plan.runs()
    session.tracking.describe(task, {run.key: m.label for m in methods for run in plan.runs(m)})
    stored = store.keys(run.key for run in runs)
    todo = [run for run in runs if run.key not in stored]
    _say_what(session, plan)
    session.say(f"{count(len(runs), 'run')}, {len(stored):,} of them in {store.name} already.")
    if not dry_run:
        session.open()
    if todo:
        with session.status("timing each optimizer for a moment"):
            estimates = executor.estimate(todo, remember=not dry_run)
        session.say_refusals()
        about = roughly(wall_seconds(estimates, executor.workers))
        session.say(
            f"The {count(len(todo), 'run')} to do {'would take' if dry_run else 'take'} about {about}."
        )
        if not dry_run:
            expected = {run.key: time for run, time in zip(todo, estimates, strict=True)}
            with shown(session.progress, estimates, executor.workers) as advance:
                session.complete(todo, expected, advance)
    if dry_run:
        session.say("Nothing was trained and nothing was written.")
    else:
        _report(session, plan)


def _report(session: Session, plan: _Plan) -> None:
    # With numpy, scipy and plotly: not before they are needed.
    from surefoot.lab.report.html import write_report
    from surefoot.lab.report.terminal import print_summary

    results = {
        method.label: list(session.store.load(run.key for run in plan.runs(method)).values())
        for method in plan.methods
    }
    command = session.asked.command(plan.epochs, session.store.name)
    study = Study(plan.task, plan.methods, results, plan.epochs, plan.seeds, command)
    print_summary(study, session.console)
    session.report(lambda path: write_report(study, path))


def _say_what(session: Session, plan: _Plan) -> None:
    from surefoot.lab.report.words import rate  # with scipy

    session.say_task(plan.task, plan.epochs)
    width = max(len(method.label) for method in plan.methods)
    owners: dict[str, str] = {}  # whose runs the keys are
    for method in plan.methods:
        first, last = method.rates[0], method.rates[-1]
        rates = (
            f"rate {rate(first)}"
            if first == last
            else f"{len(method.rates)} rates from {rate(first)} to {rate(last)}"
        )
        keys = [run.key for run in plan.runs(method)]
        owner = next((owners[key] for key in keys if key in owners), None)
        twin = "" if owner is None else f" (the settings of {owner}: they share their runs)"
        session.say(f"  {method.label:{width}}  batch {method.batch_size:,}, {rates}{twin}")
        owners.update(dict.fromkeys(keys, method.label))
