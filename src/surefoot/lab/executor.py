"""Where the runs take place: what every place offers, and the first of them, processes on this machine.

This is the driver's side, which must not import torch; the other side is :mod:`surefoot.lab.worker`.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from surefoot.lab import worker
from surefoot.lab.engines import SEPARATE, Timing, Way, batches
from surefoot.lab.errors import UserError
from surefoot.lab.runs import Method, RunResult, RunSpec, TaskInfo
from surefoot.lab.worker import Job, Reply, Room

if TYPE_CHECKING:
    from surefoot.lab.plan import MethodRequest


class Executor(Protocol):
    """A place where the runs of one task are trained, to be used in a ``with`` statement, whose end is its own."""

    @property
    def workers(self) -> int:
        """How many runs are under way at once, known inside the ``with`` statement."""
        ...

    def __enter__(self) -> Executor: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def close(self) -> None:
        """End every worker at once, whatever it is doing."""
        ...

    def prepare(
        self, requests: Sequence[MethodRequest], rates: tuple[float, ...]
    ) -> tuple[TaskInfo, list[Method]]:
        """The task described, and the optimizers with all their settings.

        Raises:
            UserError: the task, an optimizer, a setting or the device is not usable.
        """
        ...

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What ``function(room, *arguments)`` gives in a worker, which may load what the driver must not.

        Args:
            name: what it is, for a sentence that says that it failed.
            function: of a module.
            arguments: plain values.

        Raises:
            UserError: the function raised it, or something else, or its worker died too often.
        """
        ...

    def estimate(
        self, specs: Sequence[RunSpec], alike: int | None = None, remember: bool = True
    ) -> list[float]:
        """About how many seconds each run takes in its worker, its share if it shares it, timed for a moment on the work.

        Runs that may be one stack share a timing. How many workers there are is left to the caller.

        Args:
            specs: the runs.
            alike: how many runs like each of these there are to be done; ``None``: as many as are among them.
            remember: keep what was found, for the next time on this machine.
        """
        ...

    def refusals(self) -> dict[str, str]:
        """Why runs that were estimated are not stacked, as the end of a sentence, by the optimizer's name."""
        ...

    def arrange(self, specs: Sequence[RunSpec]) -> list[tuple[RunSpec, ...]]:
        """The runs in the batches and in the order in which they are best done."""
        ...

    def run(self, batches: Iterable[Sequence[RunSpec]]) -> Iterator[RunResult]:
        """The results in the order in which they finish; the batches start in the order given.

        The next of them is asked for when there is a worker for it, and not before.

        Args:
            batches: of :meth:`arrange`, or parts of such; what is in one is done by one worker, trained together if that
                is faster.

        Raises:
            UserError: a run failed, or its worker died too often. The runs under way are given up.
        """
        ...


class Worker(Protocol):
    """The driver's end of one worker."""

    up: bool
    """Whether it can be given work; as long as not, what it is going to say first is that it can."""

    def send(self, job: Job) -> None:
        """Gives it a job; if it is dead, :meth:`receive` will tell."""
        ...

    def receive(self) -> Reply | None:
        """The answer, waiting for it; ``None``: the worker is dead."""
        ...

    def death(self) -> str:
        """How it died, in words."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


_START = (-1, Job("its start", worker.begin, ()))
"""What a worker is at that is not up yet."""


@dataclass(frozen=True)
class _Timed:
    """What is known of a kind of runs."""

    optimizer: str
    timing: Timing
    runs: int
    """For so many of them it was made."""


class Pool(ABC):
    """An :class:`Executor` that gives each of its workers one job after the other.

    Each worker is pulled along by what it is doing, not by the caller: while results are looked at, the next runs are
    under way. A worker that dies (killed, out of memory, its machine lost) is replaced and what it was doing is tried
    again.

    Args:
        workers: number of workers at most, each started when there is work for it.
        engine: one of :data:`surefoot.lab.engines.ENGINES`.
    """

    tries = 2
    """How often a job is given out before it is taken for what kills the workers."""
    batch_seconds = 0.0
    """Runs known to be shorter are handed out several at a time, for about so long."""

    def __init__(self, workers: int, engine: str = SEPARATE) -> None:
        self.workers = workers
        self._engine = engine
        self._team: list[Any] = []  # of this pool's kind of Worker
        self._open = False
        self._kinds: dict[str, str] = {}  # by the run's key
        self._timed: dict[str, _Timed] = {}  # by kind

    @abstractmethod
    def _start(self) -> Worker:
        """A worker more; returns at once."""

    @abstractmethod
    def _speaking(self, workers: Collection[Any]) -> Iterable[Any]:
        """Waits until at least one of these has something to be received, its death included, and gives them."""

    def __enter__(self) -> Executor:
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every worker at once, whatever it is doing."""
        self._open = False
        for member in self._team:
            member.kill()
        self._team = []

    def prepare(
        self, requests: Sequence[MethodRequest], rates: tuple[float, ...]
    ) -> tuple[TaskInfo, list[Method]]:
        """As :meth:`Executor.prepare`."""
        return self.call("the preparation of the task", worker.prepare, tuple(requests), rates)

    def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """As :meth:`Executor.call`."""
        ((_, value),) = self._each([Job(name, function, arguments)])
        return value

    def estimate(
        self, specs: Sequence[RunSpec], alike: int | None = None, remember: bool = True
    ) -> list[float]:
        """As :meth:`Executor.estimate`."""
        if unknown := [spec for spec in specs if spec.key not in self._kinds]:
            found = self.call("the sorting of the runs", worker.kinds, unknown)
            self._kinds.update(zip((spec.key for spec in unknown), found, strict=True))
        kinds = list(map(self._kind, specs))
        numbers = Counter(kinds)
        first = dict(zip(reversed(kinds), reversed(specs), strict=True))
        wanted = {
            kind: max(alike or 0, number)
            for kind, number in numbers.items()
            if kind not in self._timed or max(alike or 0, number) > self._timed[kind].runs
        }
        jobs = []
        for kind, number in wanted.items():
            name = f"the timing of {worker.named(first[kind])}"
            asked = first[kind], self._engine, number, remember
            again = Job(name, worker.estimate, (*asked, True))
            jobs.append(Job(name, worker.estimate, asked, () if self._engine == SEPARATE else (again,)))
        timings = dict(self._each(jobs))
        for place, (kind, number) in enumerate(wanted.items()):
            self._timed[kind] = _Timed(first[kind].optimizer, timings[place], number)
        seconds = {kind: self._seconds(kind) for kind in numbers}
        return [seconds[kind] for kind in kinds]

    def refusals(self) -> dict[str, str]:
        """As :meth:`Executor.refusals`."""
        return {kind.optimizer: why for kind in self._timed.values() if (why := kind.timing.refusal)}

    def arrange(self, specs: Sequence[RunSpec]) -> list[tuple[RunSpec, ...]]:
        """As :meth:`Executor.arrange`."""
        self.estimate(specs)
        return batches(specs, self._kind, self._way, self._seconds, self.workers, self.batch_seconds)

    def _kind(self, spec: RunSpec) -> str:
        return self._kinds[spec.key]

    def _way(self, kind: str) -> Way:
        timed = self._timed[kind]
        return timed.timing.best(self._engine, timed.runs)

    def _seconds(self, kind: str) -> float:
        return self._timed[kind].timing.seconds(self._way(kind))

    def run(self, batches: Iterable[Sequence[RunSpec]]) -> Iterator[RunResult]:
        """As :meth:`Executor.run`."""
        for _, results in self._each(map(self._job, batches)):
            yield from results

    def _job(self, batch: Sequence[RunSpec]) -> Job:
        kind = self._kinds.get(batch[0].key)
        lowering = self._way(kind).lowering if kind in self._timed else None
        if lowering is None or len(batch) == 1:
            more = f" and {len(batch) - 1} after it" if len(batch) > 1 else ""
            return Job(worker.named(batch[0]) + more, worker.run, (tuple(batch),))
        alone = tuple(Job(worker.named(run), worker.run, ((run,),)) for run in batch)
        name = f"{worker.named(batch[0])} and {len(batch) - 1} beside it"
        return Job(name, worker.run, (tuple(batch), lowering), instead=alone)

    def _each(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Any]]:
        """The jobs' numbers and values, as they come in. Whatever ends this early ends the workers too."""
        if not self._open:
            raise RuntimeError(f"Use {type(self).__name__} in a with statement, and not after its end.")
        upcoming = enumerate(jobs)
        waiting: deque[tuple[int, Job]] = deque()
        fatal: list[Job] = []  # a job for each worker that died at it
        busy: dict[Worker, tuple[int, Job]] = {}

        def wait_for(number: int) -> bool:
            """Whether so many jobs are waiting, as far as more of them can be had."""
            waiting.extend(islice(upcoming, max(0, number - len(waiting))))
            return len(waiting) >= number

        def occupy(member: Worker) -> None:
            if not member.up:
                busy[member] = _START
            elif wait_for(1):
                busy[member] = waiting.popleft()
                member.send(busy[member][1])

        def starting() -> int:
            return sum(job is _START for job in busy.values())

        def engage() -> None:
            """Give work to all that have none, and start as many more as there is work for."""
            for member in self._team:
                if member not in busy:
                    occupy(member)
            while len(self._team) < self.workers and wait_for(starting() + 1):
                self._team.append(self._start())
                occupy(self._team[-1])

        def do_instead(number: int, job: Job) -> None:
            waiting.extendleft((number, other) for other in reversed(job.instead))

        try:
            engage()
            while waiting or len(busy) > starting():
                for member in self._speaking(busy):
                    number, job = at = busy.pop(member)
                    reply = member.receive()
                    if reply is None:
                        fatal.append(job)
                        deaths = sum(other is job for other in fatal)
                        if job.instead and 2 * deaths >= self.tries:
                            do_instead(number, job)
                        elif deaths >= self.tries:
                            times = "twice" if self.tries == 2 else f"{self.tries} times"
                            how = member.death()
                            # As Linux ends a process when memory runs out.
                            end = "; is there enough memory?" if "SIGKILL" in how else "."
                            raise UserError(f"Its process died {times} during {job.name} ({how}){end}")
                        elif at is not _START:
                            waiting.appendleft(at)
                        self._replace(member)
                        engage()
                        continue
                    kind, value = reply
                    if kind == "undone":
                        do_instead(number, job)
                        engage()
                        continue
                    if kind == "refused":
                        raise UserError(value)
                    if kind == "failed":
                        raise UserError(f"An error ended {job.name}: {value}.")
                    occupy(member)
                    if at is not _START:
                        yield number, value
                    else:  # what kept others from starting has passed
                        fatal = [other for other in fatal if other is not _START]
        except BaseException:
            self.close()
            raise

    def _replace(self, member: Worker) -> None:
        member.kill()
        self._team[self._team.index(member)] = self._start()


class LocalProcesses(Pool):
    """A pool of worker processes for one task, one thread in each.

    Args:
        task_ref: a task's name, or ``"path/to/file.py:function"``.
        data: the folder of ``--data``.
        device: where the tensors live, by torch's name.
        workers: number of processes at most, each started when there is work for it; ``None``: one for each core that
            this process may use.
        engine: how many runs are trained together, one of :data:`surefoot.lab.engines.ENGINES`.
    """

    def __init__(
        self,
        task_ref: str,
        data: Path | None = None,
        device: str = "cpu",
        workers: int | None = None,
        engine: str = SEPARATE,
    ) -> None:
        super().__init__(workers or usable_cores(), engine)
        self._room = Room(task_ref, data, device)

    def _start(self) -> _Process:
        return _Process(self._room)

    def _speaking(self, workers: Collection[_Process]) -> Iterable[_Process]:
        by_connection = {process.connection: process for process in workers}
        return [by_connection[cast(Connection, end)] for end in wait(list(by_connection))]


def usable_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Process:
    """The driver's end of one process.

    Not a ``ProcessPoolExecutor``, for which one dead process is the death of all, with no telling which run it was at,
    and which cannot be stopped in the middle of its work.
    """

    up = True  # its first job waits in the pipe until it has started

    def __init__(self, room: Room) -> None:
        # Spawned, as torch's threads and devices do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(room, far_end), daemon=True)
        with _interrupts_held():
            self._process.start()
        far_end.close()  # the worker's death must leave no other holder, or the pipe would never end

    def send(self, job: Job) -> None:
        with contextlib.suppress(OSError):  # a dead worker's pipe; receive() will tell
            self.connection.send(job)

    def receive(self) -> Reply | None:
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def death(self) -> str:
        self._process.join()
        code = cast(int, self._process.exitcode)
        return f"exit code {code}" if code >= 0 else f"ended by {signal.Signals(-code).name}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.connection.close()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, which a terminal sends to all: the driver alone decides their end."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    # multiprocessing starts it with the first process, and would let interrupts through again in doing so.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(room: Room, connection: Connection) -> None:
    """A worker process's life: one job after the other until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where _interrupts_held() can do nothing
    threading.Thread(target=_die_with_the_driver, daemon=True).start()
    worker.begin()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(worker.answer(room, job))


def _die_with_the_driver() -> None:
    """However the driver ends, kill -9 included, no worker goes on."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os._exit(1)
