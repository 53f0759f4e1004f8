"""What the laboratory's long commands share: their common options, their workers and store, and how they end."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from surefoot.lab.cluster import RayCluster, cluster_address
from surefoot.lab.engines import AUTO, ENGINES, STACKED
from surefoot.lab.errors import UserError
from surefoot.lab.executor import Executor, LocalProcesses, usable_cores
from surefoot.lab.interrupts import Interrupts
from surefoot.lab.leases import Leases
from surefoot.lab.runs import RunResult, RunSpec, TaskInfo
from surefoot.lab.store import Store
from surefoot.lab.tracking import Tracking

WORKERS_PER_CORE = 4
"""More workers than these are refused: each takes its own memory, and they would only wait for each other."""
SHARE = 10.0
"""Seconds of work for each worker that are taken at a time, where several processes may share a store."""
REPORT = "report.html"

Advance = Callable[[float, RunResult | None], None]
"""What a display of progress is told with: a run's estimated seconds, and its result."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a command was asked for, in the user's words, as far as all have it. ``None``: not given.

    Raises:
        UserError: (on creation) an option is out of its range; only what can be told without torch is looked at.
    """

    task: str
    seeds: int
    epochs: int | None
    batch: int | None
    data: Path | None
    out: Path
    device: str
    store: str | None
    workers: int | None
    on: str | None = None
    log: str | None = None
    engine: str = AUTO

    def __post_init__(self) -> None:
        for option in ("seeds", "epochs", "batch", "workers"):
            at_least(1, f"--{option}", getattr(self, option))
        most = WORKERS_PER_CORE * usable_cores()
        here = self.on is None or cluster_address(self.on) is None
        if here and self.workers is not None and self.workers > most:
            raise UserError(
                f"--workers is {self.workers}; it may be at most {most} here, {WORKERS_PER_CORE} per usable core."
            )
        if self.engine not in ENGINES:
            raise UserError(f"--engine is {self.engine!r}; it must be one of {', '.join(ENGINES)}.")
        if not re.fullmatch(r"cpu|cuda(:[0-9]+)?", self.device):
            raise UserError(f"--device is {self.device!r}; it must be cpu or cuda.")
        if self.data is not None and not self.data.is_dir():
            raise UserError(f"--data is {str(self.data)!r}, which is no folder.")
        _check_folder(self.out)
        Tracking(self.log, self.out)

    @property
    def store_url(self) -> str:
        """Where the runs are kept."""
        return str(self.out / "runs.sqlite") if self.store is None else self.store

    def command(self, epochs: int | None = None, store: str | None = None) -> str:
        """The command line that asks for this again, from the same folder.

        Args:
            epochs: how many, where that was left to the task.
            store: its name, without a password.
        """
        epochs = self.epochs or epochs
        words = ["surefoot", *self.own_words(), "--seeds", str(self.seeds)]
        words += [] if epochs is None else ["--epochs", str(epochs)]
        words += [] if self.batch is None else ["--batch", str(self.batch)]
        words += [] if self.data is None else ["--data", str(self.data)]
        words += ["--out", str(self.out)]
        words += ["--device", self.device] if self.device != "cpu" else []
        words += [] if self.store is None else ["--store", store or self.store]
        words += [] if self.workers is None else ["--workers", str(self.workers)]
        words += [] if self.on is None else ["--on", self.on]
        words += [] if self.log is None else ["--log", self.log]
        words += [] if self.engine == AUTO else ["--engine", self.engine]
        return shlex.join(words)

    def own_words(self) -> list[str]:
        """The command's name, its task, and the options that it alone has."""
        raise NotImplementedError


class Session:
    """A command at work: its workers, its store, and what it says.

    Args:
        asked: its options.
        console: for what the user asked for.
        progress: for what passes while it is made.
    """

    executor: Executor
    store: Store

    def __init__(self, asked: Options, console: Console, progress: Console) -> None:
        self.asked, self.console, self.progress = asked, console, progress
        self.runs: Sequence[RunSpec] = ()
        """All that it is about, as far as that is known: an interruption tells how many of them are kept."""
        self.tracking = Tracking(asked.log, asked.out, self.tell)
        """Where stored runs are logged, too."""
        self._saved = 0

    def hold(self, work: Callable[[Session], None]) -> int:
        """Has ``work`` done, with the workers and the store at hand.

        Returns:
            The exit code: 0, or what a shell expects after SIGINT or SIGTERM, when the finished runs are kept.

        Raises:
            UserError: the store cannot be used, or something that the user can mend came up in ``work``.
        """
        asked = self.asked
        with Interrupts() as self._interrupts, Store(asked.store_url) as self.store:
            if not self.store.lasting:
                raise UserError(
                    f"--store is {self.store.name!r}, in memory, where no run is kept; give --store a file."
                )
            try:
                with _executor(asked) as self.executor, Leases(self.store) as self._leases:
                    work(self)
            except KeyboardInterrupt:
                kept = len(self.store.keys(run.key for run in self.runs))
                what = (
                    f"{kept:,} of {count(len(self.runs), 'run')} are kept in {self.store.name}"
                    if self.runs
                    else "nothing was trained"
                )
                self.tell(f"Interrupted; {what}. To go on:\n  {asked.command()}")
                return self._interrupts.exit_code
        return 0

    def open(self) -> None:
        """Makes the folder and the store, and makes sure that the store can be written and runs can be logged.

        Raises:
            UserError: one of them cannot be made, written or used.
        """
        self.tracking.open()
        try:
            self.asked.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--out is {str(self.asked.out)!r}, which cannot be made: {error.strerror}."
            ) from error
        self.store.create()

    def take(self, runs: Iterable[RunSpec]) -> list[RunSpec]:
        """Those of ``runs`` that are this process's to make: not stored, and no other process is at them."""
        by_key = {run.key: run for run in runs}
        taken = self._leases.take(by_key)
        return [run for key, run in by_key.items() if key in taken]

    def wait(self) -> None:
        """Lets some time pass in which other processes may finish what they have taken."""
        self._leases.wait()

    def train(self, taken: Sequence[RunSpec], expected: Mapping[str, float], advance: Advance) -> None:
        """Has runs trained that were taken, and stored.

        Args:
            taken: by :meth:`take`.
            expected: about how many seconds each takes, by its key.
            advance: called with these seconds and the result as each is stored.

        Raises:
            UserError: a run failed, or could not be stored. Those that finished are kept, and the sentence says so.
        """
        self._train(self.executor.arrange(taken), expected, advance)

    def complete(self, runs: Sequence[RunSpec], expected: Mapping[str, float], advance: Advance) -> None:
        """Comes back when all of ``runs`` are stored, those that another process is at included.

        As :meth:`train`; ``advance`` is called without a result for a run that was made elsewhere. No more is taken at a
        time than keeps the workers busy for a while, so that others on the same store have their share.
        """
        todo = list(runs)
        while todo:
            made: set[str] = set()
            self._train(self._taken(todo, expected, made), expected, advance)
            elsewhere = self.store.keys(run.key for run in todo) - made
            for key in elsewhere:
                advance(expected[key], None)
            todo = [run for run in todo if run.key not in made and run.key not in elsewhere]
            if todo and not made:
                self.wait()

    def _taken(
        self, todo: Sequence[RunSpec], expected: Mapping[str, float], made: set[str]
    ) -> Iterator[Sequence[RunSpec]]:
        """What can be had of ``todo``, in batches, a portion of them taken when its turn comes.

        The keys of what was taken are added to ``made``.
        """
        for portion in _portions(self.executor.arrange(todo), expected, SHARE * self.executor.workers):
            taken = {run.key for run in self.take(run for batch in portion for run in batch)}
            made |= taken
            own = ([run for run in batch if run.key in taken] for batch in portion)
            yield from filter(None, own)

    def _train(
        self, batches: Iterable[Sequence[RunSpec]], expected: Mapping[str, float], advance: Advance
    ) -> None:
        try:
            for result in self.executor.run(batches):
                with self._interrupts.held():
                    self.store.save(result)
                self._saved += 1
                self.tracking.log(result)
                advance(expected[result.spec.key], result)
        except UserError as error:
            kept = f"{count(self._saved, 'run')} finished before that and kept in {self.store.name}"
            raise UserError(f"{str(error).rstrip('.')} ({kept}).") from error

    def say_refusals(self) -> None:
        """Says which runs are trained one by one because they cannot be stacked, if that was asked for."""
        if self.asked.engine == STACKED:
            for optimizer, reason in self.executor.refusals().items():
                self.tell(f"{optimizer} is trained run by run: {reason}.")

    def report(self, write: Callable[[Path], object]) -> None:
        """Has the page written, and says where it is.

        Raises:
            UserError: it cannot be written; the sentence says that every run is kept.
        """
        path = self.asked.out / REPORT
        try:
            write(path)
        except UserError as error:
            kept = f"every run is kept in {self.store.name}"
            raise UserError(f"{str(error).rstrip('.')} ({kept}).") from error
        self.say(f"Report: {path}")

    def say(self, text: str) -> None:
        """Prints text as it is: labels have brackets, and a command must stay on its line."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def tell(self, text: str) -> None:
        """Says, beside what was asked for, what has come up."""
        self.progress.print(text, markup=False, highlight=False, soft_wrap=True)

    def say_task(self, task: TaskInfo, epochs: int) -> None:
        """Says what is trained, and for how long."""
        self.say(
            f"{task.name}: {task.train_patterns:,} patterns to train on, {task.validation_patterns:,} to validate, "
            f"{count(task.parameters, 'parameter')}; {count(epochs, 'epoch')}, {count(self.asked.seeds, 'seed')}."
        )

    def status(self, text: str) -> AbstractContextManager[object]:
        """Shows ``text`` on a terminal while the block lasts."""
        return self.progress.status(text) if self.progress.is_terminal else nullcontext()


def at_least(least: int, option: str, number: int | None) -> None:
    """Refuses a number that was given and is too small.

    Raises:
        UserError: it is.
    """
    if number is not None and number < least:
        raise UserError(f"{option} is {number}; it must be at least {least}.")


def count(number: int, noun: str) -> str:
    """``1 run``, ``1,200 runs``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _portions(
    batches: Iterable[Sequence[RunSpec]], expected: Mapping[str, float], seconds: float
) -> Iterator[list[Sequence[RunSpec]]]:
    """The batches in their order, about so many seconds of them at a time."""
    portion: list[Sequence[RunSpec]] = []
    left = seconds
    for batch in batches:
        portion.append(batch)
        left -= sum(expected[run.key] for run in batch)
        if left <= 0:
            yield portion
            portion, left = [], seconds
    if portion:
        yield portion


def _executor(asked: Options) -> Executor:
    if asked.on is None:
        return LocalProcesses(asked.task, asked.data, asked.device, asked.workers, asked.engine)
    address = cluster_address(asked.on)
    return RayCluster(address, asked.task, asked.data, asked.device, asked.workers, asked.engine)


def _check_folder(folder: Path) -> None:
    """Refuses a folder for the output that cannot be made or written, as far as that shows without writing."""
    nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(f"--out is {str(folder)!r}, but {str(nearest)!r} is no folder.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--out is {str(folder)!r}, but {str(nearest)!r} may not be written.")
    if (folder / REPORT).is_dir():
        raise UserError(f"The report cannot be written to {str(folder / REPORT)!r}, which is a folder.")
