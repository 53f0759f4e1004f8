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
from dataclasses import replace
from itertools import islice
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, cast

from surefoot.lab import worker
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

    def estimate(self, specs: Sequence[RunSpec]) -> list[float]:
        """About how many seconds each run takes in its worker, timed for a moment on the real work.

        Runs that differ in nothing but rate and seed share a timing. How many run side by side is left to the caller.
        """
        ...

    def run(self, specs: Iterable[RunSpec]) -> Iterator[RunResult]:
        """The results in the order in which they finish; the runs start in the order given.

        The next of them is asked for when there is a worker for it, and not before.

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


class Pool(ABC):
    """An :class:`Executor` that gives each of its workers one job after the other.

    Each worker is pulled along by what it is doing, not by the caller: while results are looked at, the next runs are
    under way. A worker that dies (killed, out of memory, its machine lost) is replaced and what it was doing is tried
    again.

    Args:
        workers: number of workers at most, each started when there is work for it.
    """

    tries = 2
    """How often a job is given out before it is taken for what kills the workers."""
    batch_seconds = 0.0
    """Runs known to be shorter are handed out several at a time, for about so long."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._team: list[Any] = []  # of this pool's kind of Worker
        self._open = False
        self._seconds: dict[str, float] = {}

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

    def estimate(self, specs: Sequence[RunSpec]) -> list[float]:
        """As :meth:`Executor.estimate`."""
        kinds = {_kind(spec): spec for spec in specs}
        jobs = [
            Job(f"the timing of {worker.named(spec)}", worker.estimate, (spec,)) for spec in kinds.values()
        ]
        seconds = dict(self._each(jobs))
        self._seconds.update((kind, seconds[number]) for number, kind in enumerate(kinds))
        return [self._seconds[_kind(spec)] for spec in specs]

    def run(self, specs: Iterable[RunSpec]) -> Iterator[RunResult]:
        """As :meth:`Executor.run`."""
        jobs = (Job(_named(batch), worker.run, (batch,)) for batch in self._batches(specs))
        for _, results in self._each(jobs):
            yield from results

    def _batches(self, specs: Iterable[RunSpec]) -> Iterator[tuple[RunSpec, ...]]:
        """The runs in their order, short ones together."""
        batch: list[RunSpec] = []
        seconds = 0.0
        for spec in specs:
            batch.append(spec)
            seconds += self._seconds.get(_kind(spec), self.batch_seconds)
            if seconds >= self.batch_seconds:
                yield tuple(batch)
                batch, seconds = [], 0.0
        if batch:
            yield tuple(batch)

    def _each(self, jobs: Iterable[Job]) -> Iterator[tuple[int, Any]]:
        """The jobs' numbers and values, as they come in. Whatever ends this early ends the workers too."""
        if not self._open:
            raise RuntimeError(f"Use {type(self).__name__} in a with statement, and not after its end.")
        upcoming = enumerate(jobs)
        waiting: deque[tuple[int, Job]] = deque()
        deaths: Counter[int] = Counter()
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

        try:
            for member in self._team:
                occupy(member)
            while len(self._team) < self.workers and wait_for(starting() + 1):
                self._team.append(self._start())
                occupy(self._team[-1])
            while waiting or len(busy) > starting():
                for member in self._speaking(busy):
                    number, job = at = busy.pop(member)
                    reply = member.receive()
                    if reply is None:
                        deaths[number] += 1
                        if deaths[number] == self.tries:
                            times = "twice" if self.tries == 2 else f"{self.tries} times"
                            how = member.death()
                            # As Linux ends a process when memory runs out.
                            end = "; is there enough memory?" if "SIGKILL" in how else "."
                            raise UserError(f"Its process died {times} during {job.name} ({how}){end}")
                        if at is not _START:
                            waiting.appendleft(at)
                        occupy(self._replace(member))
                        continue
                    kind, value = reply
                    if kind == "refused":
                        raise UserError(value)
                    if kind == "failed":
                        raise UserError(f"An error ended {job.name}: {value}.")
                    occupy(member)
                    if at is not _START:
                        yield number, value
        except BaseException:
            self.close()
            raise

    def _replace(self, member: Worker) -> Worker:
        member.kill()
        fresh = self._start()
        self._team[self._team.index(member)] = fresh
        return fresh


class LocalProcesses(Pool):
    """A pool of worker processes for one task, one thread and one run at a time in each.

    Args:
        task_ref: a task's name, or ``"path/to/file.py:function"``.
        data: the folder of ``--data``.
        device: where the tensors live, by torch's name.
        workers: number of processes at most, each started when there is work for it; ``None``: one for each core that
            this process may use.
    """

    def __init__(
        self, task_ref: str, data: Path | None = None, device: str = "cpu", workers: int | None = None
    ) -> None:
        super().__init__(workers or usable_cores())
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


def _kind(spec: RunSpec) -> str:
    """The same for runs that take the same time."""
    return replace(spec, rate=0.0, seed=0).key


def _named(batch: Sequence[RunSpec]) -> str:
    more = f" and {len(batch) - 1} after it" if len(batch) > 1 else ""
    return worker.named(batch[0]) + more


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
