"""How far a comparison is and how long it will take: arithmetic on estimates, and what a person sees of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.progress import Task as Bar
from rich.text import Text

from surefoot.lab.runs import RunResult

QUIET_SECONDS = 10.0
"""Where the output is no terminal: the shortest time between two lines of progress."""


def wall_seconds(estimates: Sequence[float], workers: int) -> float:
    """The time that runs of these lengths take, ``workers`` at once: evenly shared, but never less than the longest."""
    if not estimates:
        return 0.0
    return max(sum(estimates) / min(workers, len(estimates)), *estimates)


def roughly(seconds: float) -> str:
    """A time as one says it beforehand: ``"45 s"``, ``"3 min"``, ``"2 h 10 min"``, ``"3 days"``."""
    if round(seconds) < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    if minutes < 36 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{round(minutes / 60 / 24)} days"


class Pace:
    """The time left, from the estimates corrected by what the finished runs really took.

    Args:
        estimates: seconds of every run that is to be done.
        workers: how many run at once.
        now: the clock at the start, in seconds.
    """

    def __init__(self, estimates: Sequence[float], workers: int, now: float) -> None:
        self.total = sum(estimates)
        self.planned = len(estimates)
        self.done = 0.0
        """Estimated seconds of the finished runs: what the bar shows."""
        self.runs = 0
        """Of those that were ``planned``, how many have finished."""
        self._waiting = list(estimates)
        self._workers = workers
        self._last = now
        self._estimated = 0.0
        self._measured = 0.0

    def finished(self, estimate: float, result: RunResult | None, now: float) -> None:
        """Notes that a run is there, or, with no result, that it will not be made here after all.

        A diverged run stopped early and says nothing about the others.
        """
        self._waiting.remove(estimate)
        if result is None:
            self.total -= estimate
            self.planned -= 1
            return
        self.done += estimate
        self.runs += 1
        self._last = now
        if result.status == "finished":
            self._estimated += estimate
            self._measured += result.seconds

    def left(self, now: float) -> float:
        """Seconds until the last run is done; counts down between one run's end and the next."""
        correction = self._measured / self._estimated if self._estimated > 0 else 1.0
        return max(0.0, wall_seconds(self._waiting, self._workers) * correction - (now - self._last))


@contextmanager
def shown(
    console: Console, estimates: Sequence[float], workers: int, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[float, RunResult | None], None]]:
    """Shows the progress of runs while the block lasts; call what it gives with each run's estimate and result.

    With ``None`` for a result, a run is not to be waited for any more.

    A terminal gets a bar, weighted by the estimates; anything else a plain line now and then.
    """
    pace = Pace(estimates, workers, clock())
    show = _bar if console.is_terminal else _lines
    with show(console, pace, clock) as refresh:

        def advance(estimate: float, result: RunResult | None) -> None:
            pace.finished(estimate, result, clock())
            refresh()

        yield advance


@contextmanager
def _bar(console: Console, pace: Pace, clock: Callable[[], float]) -> Iterator[Callable[[], None]]:
    class TimeLeft(ProgressColumn):
        def render(self, task: Bar) -> Text:
            return Text(f"about {roughly(pace.left(clock()))} left" if pace.runs < pace.planned else "done")

    columns = (BarColumn(), TextColumn("{task.fields[runs]}/{task.fields[planned]} runs"), TimeLeft())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=pace.total, runs=0, planned=pace.planned)
        yield lambda: progress.update(
            bar, completed=pace.done, total=pace.total, runs=pace.runs, planned=pace.planned
        )


@contextmanager
def _lines(console: Console, pace: Pace, clock: Callable[[], float]) -> Iterator[Callable[[], None]]:
    said = clock()

    def refresh() -> None:
        nonlocal said
        now = clock()
        if now - said >= QUIET_SECONDS and pace.runs < pace.planned:
            said = now
            console.print(
                f"{pace.runs} of {pace.planned} runs, about {roughly(pace.left(now))} left", highlight=False
            )

    yield refresh
