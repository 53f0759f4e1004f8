"""The main job: a comparison from the user's words to the report, going on from whatever is already stored."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from surefoot.lab.errors import UserError
from surefoot.lab.executor import LocalProcesses, usable_cores
from surefoot.lab.interrupts import Interrupts
from surefoot.lab.plan import check_size, parse_optimizers, parse_rates, specs
from surefoot.lab.progress import roughly, shown, wall_seconds
from surefoot.lab.runs import Method, RunResult, RunSpec, Study, TaskInfo
from surefoot.lab.store import Store

WORKERS_PER_CORE = 4
"""More workers than these are refused: each takes its own memory, and they would only wait for each other."""
REPORT = "report.html"


@dataclass(frozen=True)
class Comparison:
    """What ``surefoot compare`` was asked to do, in the user's words. ``None``: not given.

    Raises:
        UserError: (on creation) an option is out of its range; only what can be told without torch is looked at.
    """

    task: str
    optimizers: str
    rates: str
    seeds: int
    epochs: int | None
    batch: int | None
    data: Path | None
    out: Path
    device: str
    store: str | None
    workers: int | None

    def __post_init__(self) -> None:
        numbers = (
            ("--seeds", self.seeds),
            ("--epochs", self.epochs),
            ("--batch", self.batch),
            ("--workers", self.workers),
        )
        for option, number in numbers:
            if number is not None and number < 1:
                raise UserError(f"{option} is {number}; it must be at least 1.")
        most = WORKERS_PER_CORE * usable_cores()
        if self.workers is not None and self.workers > most:
            raise UserError(
                f"--workers is {self.workers}; it may be at most {most} here, {WORKERS_PER_CORE} per usable core."
            )
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise UserError(f"--device is {self.device!r}; it must be cpu or cuda.")
        if self.data is not None and not self.data.is_dir():
            raise UserError(f"--data is {str(self.data)!r}, which is no folder.")
        _check_folder(self.out)

    @property
    def store_url(self) -> str:
        """Where the runs are kept."""
        return str(self.out / "runs.sqlite") if self.store is None else self.store

    def command(self) -> str:
        """The command line that asks for this again, from the same folder."""
        words = ["surefoot", "compare", self.task, "--optimizers", self.optimizers, "--rates", self.rates]
        words += ["--seeds", str(self.seeds)]
        words += [] if self.epochs is None else ["--epochs", str(self.epochs)]
        words += [] if self.batch is None else ["--batch", str(self.batch)]
        words += [] if self.data is None else ["--data", str(self.data)]
        words += ["--out", str(self.out)]
        words += ["--device", self.device] if self.device != "cpu" else []
        words += [] if self.store is None else ["--store", self.store]
        words += [] if self.workers is None else ["--workers", str(self.workers)]
        return shlex.join(words)


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
    workers = asked.workers or usable_cores()
    with Interrupts() as interrupts, Store(asked.store_url) as store:
        if not store.lasting:
            raise UserError(
                f"--store is {store.name!r}, in memory, where no run is kept; give --store a file."
            )
        runs: list[RunSpec] = []
        try:
            with LocalProcesses(asked.task, asked.data, asked.device, workers) as executor:
                with _status(progress, f"loading {asked.task}"):
                    task, methods = executor.prepare(requests, rates)
                plan = _Plan(task, methods, asked.epochs or task.epochs, range(asked.seeds))
                command = replace(asked, epochs=plan.epochs, store=asked.store and store.name).command()
                runs = plan.runs()
                stored = store.keys(run.key for run in runs)
                todo = [run for run in runs if run.key not in stored]
                _say_what(console, plan)
                _say(console, f"{_count(len(runs), 'run')}, {len(stored):,} of them in {store.name} already.")
                if not dry_run:
                    _make_folder(asked.out)
                    store.create()
                if todo:
                    with _status(progress, "timing each optimizer for a moment"):
                        estimates = executor.estimate(todo)
                    about = roughly(wall_seconds(estimates, workers))
                    _say(
                        console,
                        f"The {_count(len(todo), 'run')} to do {'would take' if dry_run else 'take'} about {about}.",
                    )
                    if not dry_run:
                        expected = {run.key: time for run, time in zip(todo, estimates, strict=True)}
                        with shown(progress, estimates, workers) as advance:
                            _train(executor, todo, expected, store, interrupts, advance)
            if dry_run:
                _say(console, "Nothing was trained and nothing was written.")
            else:
                _report(plan, command, store, asked.out / REPORT, console)
        except KeyboardInterrupt:
            kept = len(store.keys(run.key for run in runs))
            what = (
                f"{kept:,} of {_count(len(runs), 'run')} are kept in {store.name}"
                if runs
                else "nothing was trained"
            )
            _say(progress, f"Interrupted; {what}. To go on:\n  {asked.command()}")
            return interrupts.exit_code
    return 0


def _train(
    executor: LocalProcesses,
    todo: Sequence[RunSpec],
    expected: Mapping[str, float],
    store: Store,
    interrupts: Interrupts,
    advance: Callable[[float, RunResult], None],
) -> None:
    """Trains and stores each run; within a seed the longest first, so that no worker ends long after the others."""
    saved = 0
    try:
        for result in executor.run(sorted(todo, key=lambda run: (run.seed, -expected[run.key]))):
            with interrupts.held():
                store.save(result)
            saved += 1
            advance(expected[result.spec.key], result)
    except UserError as error:
        kept = f"{_count(saved, 'run')} finished before that and kept in {store.name}"
        raise UserError(f"{str(error).rstrip('.')} ({kept}).") from error


def _report(plan: _Plan, command: str, store: Store, path: Path, console: Console) -> None:
    # With numpy, scipy and plotly: not before they are needed.
    from surefoot.lab.report.html import write_report
    from surefoot.lab.report.terminal import print_summary

    results = {
        method.label: list(store.load(run.key for run in plan.runs(method)).values())
        for method in plan.methods
    }
    study = Study(plan.task, plan.methods, results, plan.epochs, plan.seeds, command)
    print_summary(study, console)
    try:
        write_report(study, path)
    except UserError as error:
        kept = f"every run is kept in {store.name}"
        raise UserError(f"{str(error).rstrip('.')} ({kept}).") from error
    _say(console, f"Report: {path}")


def _say_what(console: Console, plan: _Plan) -> None:
    from surefoot.lab.report.words import rate  # with scipy

    task = plan.task
    _say(
        console,
        f"{task.name}: {task.train_patterns:,} patterns to train on, {task.validation_patterns:,} to validate, "
        f"{_count(task.parameters, 'parameter')}; {_count(plan.epochs, 'epoch')}, {_count(len(plan.seeds), 'seed')}.",
    )
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
        _say(console, f"  {method.label:{width}}  batch {method.batch_size:,}, {rates}{twin}")
        owners.update(dict.fromkeys(keys, method.label))


def _say(console: Console, text: str) -> None:
    """Prints text as it is: labels have brackets, and a command must stay on its line."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _status(console: Console, text: str) -> AbstractContextManager[object]:
    return console.status(text) if console.is_terminal else nullcontext()


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _check_folder(folder: Path) -> None:
    """Refuses a folder for the output that cannot be made or written, as far as that shows without writing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(f"--out is {str(folder)!r}, but {str(nearest)!r} is no folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out is {str(folder)!r}, but {str(nearest)!r} may not be written.")
    if (folder / REPORT).is_dir():
        raise UserError(f"The report cannot be written to {str(folder / REPORT)!r}, which is a folder.")


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out is {str(folder)!r}, which cannot be made: {error.strerror}.") from error
