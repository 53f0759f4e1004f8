"""Where the runs take place: in processes on this machine, one thread and one run at a time in each.

The driver's side comes first and must not import torch; the worker's side does, in its functions.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, cast

from surefoot.lab.errors import UserError
from surefoot.lab.runs import Method, RunResult, RunSpec, TaskInfo

if TYPE_CHECKING:
    from surefoot.lab.plan import MethodRequest
    from surefoot.lab.tasks.base import Task


class LocalProcesses:
    """A pool of worker processes for one task, to be used in a ``with`` statement, whose end is theirs.

    Each process is pulled along by what it is doing, not by the caller: while results are looked at, the next runs are
    under way. A process that dies (killed, out of memory) is replaced and what it was doing is tried once more.

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
        self._room = _Room(task_ref, data, device)
        self.workers = workers or usable_cores()
        self._processes: list[_Process] = []
        self._open = False

    def __enter__(self) -> LocalProcesses:
        self._open = True
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End every process at once, whatever it is doing."""
        self._open = False
        for process in self._processes:
            process.kill()
        self._processes = []

    def prepare(
        self, requests: Sequence[MethodRequest], rates: tuple[float, ...]
    ) -> tuple[TaskInfo, list[Method]]:
        """The task described, and the optimizers with all their settings.

        Raises:
            UserError: the task, an optimizer, a setting or the device is not usable.
        """
        job = _Job("the preparation of the task", _prepare, (tuple(requests), rates))
        ((_, prepared),) = self._each([job])
        return prepared

    def estimate(self, specs: Sequence[RunSpec]) -> list[float]:
        """About how many seconds each run takes in its process, timed for a moment on the real work.

        Runs that differ in nothing but rate and seed share a timing. How many run side by side is left to the caller.
        """
        kinds = {_kind(spec): spec for spec in specs}
        jobs = [_Job(f"the timing of {_name(spec)}", _estimate, (spec,)) for spec in kinds.values()]
        seconds = dict(self._each(jobs))
        by_kind = {kind: seconds[number] for number, kind in enumerate(kinds)}
        return [by_kind[_kind(spec)] for spec in specs]

    def run(self, specs: Sequence[RunSpec]) -> Iterator[RunResult]:
        """The results in the order in which they finish; the runs start in the order given.

        Raises:
            UserError: a run failed, or its process died twice. The runs under way are given up.
        """
        jobs = [_Job(f"the run of {_name(spec)}", _run, (spec,)) for spec in specs]
        for _, result in self._each(jobs):
            yield result

    def _each(self, jobs: Sequence[_Job]) -> Iterator[tuple[int, Any]]:
        """The jobs' numbers and values, as they come in. Whatever ends this early ends the processes too."""
        if not self._open:
            raise RuntimeError("Use LocalProcesses in a with statement, and not after its end.")
        waiting = deque(range(len(jobs)))
        died: set[int] = set()
        busy: dict[Connection, tuple[_Process, int]] = {}

        def occupy(process: _Process) -> None:
            if waiting:
                number = waiting.popleft()
                process.send(jobs[number])
                busy[process.connection] = (process, number)

        try:
            for process in self._processes:
                occupy(process)
            while waiting and len(self._processes) < self.workers:
                self._processes.append(_Process(self._room))
                occupy(self._processes[-1])
            while busy:
                for connection in cast(list[Connection], wait(list(busy))):
                    process, number = busy.pop(connection)
                    reply = process.receive()
                    if reply is None:
                        if number in died:
                            how = process.death()
                            # As Linux ends a process when memory runs out.
                            end = "; is there enough memory?" if "SIGKILL" in how else "."
                            raise UserError(f"Its process died twice during {jobs[number].name} ({how}){end}")
                        died.add(number)
                        waiting.appendleft(number)
                        occupy(self._replace(process))
                        continue
                    kind, value = reply
                    if kind == "refused":
                        raise UserError(value)
                    if kind == "failed":
                        raise UserError(f"An error ended {jobs[number].name}: {value}.")
                    occupy(process)
                    yield number, value
        except BaseException:
            self.close()
            raise

    def _replace(self, process: _Process) -> _Process:
        process.kill()
        fresh = _Process(self._room)
        self._processes[self._processes.index(process)] = fresh
        return fresh


def usable_cores() -> int:
    """Number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class _Job:
    """Something to do in a worker: ``function(room, *arguments)``, a function of this module."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


_Reply = tuple[Literal["done", "refused", "failed"], Any]
"""A job's value, the message of its ``UserError``, or what went wrong in it."""


class _Process:
    """The driver's end of one worker.

    Not a ``ProcessPoolExecutor``, for which one dead process is the death of all, with no telling which run it was at,
    and which cannot be stopped in the middle of its work.
    """

    def __init__(self, room: _Room) -> None:
        # Spawned, as torch's threads and devices do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self.connection, far_end = context.Pipe()
        self._process = context.Process(target=_serve, args=(room, far_end), daemon=True)
        with _interrupts_held():
            self._process.start()
        far_end.close()  # the worker's death must leave no other holder, or the pipe would never end

    def send(self, job: _Job) -> None:
        with contextlib.suppress(OSError):  # a dead worker's pipe; receive() will tell
            self.connection.send(job)

    def receive(self) -> _Reply | None:
        """The answer, waiting for it; ``None``: the worker is dead."""
        try:
            return self.connection.recv()
        except (EOFError, OSError):
            return None

    def death(self) -> str:
        """How it died, in words."""
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


def _name(spec: RunSpec) -> str:
    return f"{spec.optimizer} at rate {spec.rate:g} with seed {spec.seed}"


# ---------------------------------------------------------------------------------------------------- the worker's side


@dataclass(frozen=True)
class _Room:
    """What a worker works in: its task, loaded when first needed, and its device."""

    task_ref: str
    data: Path | None
    device: str

    @cached_property
    def task(self) -> Task:
        from surefoot.lab.tasks import load

        return load(self.task_ref, self.data)

    @cached_property
    def info(self) -> TaskInfo:
        from surefoot.lab.tasks import describe

        return describe(self.task)

    def load_again(self) -> None:
        """Forget the task, which may have been loaded from a file that was being written."""
        for what in ("task", "info"):
            self.__dict__.pop(what, None)


def _serve(room: _Room, connection: Connection) -> None:
    """A worker's life: one job after the other until the driver is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # where _interrupts_held() can do nothing
    threading.Thread(target=_die_with_the_driver, daemon=True).start()
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # read by the libraries when they are loaded: now
    import torch

    from surefoot.lab import tasks, train  # noqa: F401  (loaded before the first job comes)

    torch.set_num_threads(1)
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        connection.send(_answer(room, job))


def _answer(room: _Room, job: _Job) -> _Reply:
    from surefoot.lab.tasks import explain

    try:
        return "done", job.function(room, *job.arguments)
    except UserError as error:
        return "refused", str(error)
    except BaseException as error:  # a task may raise what it likes; only a signal ends a worker
        return "failed", explain(error)


def _die_with_the_driver() -> None:
    """However the driver ends, kill -9 included, no worker goes on."""
    driver = multiprocessing.parent_process()
    assert driver is not None
    wait([driver.sentinel])
    os._exit(1)


def _prepare(
    room: _Room, requests: Sequence[MethodRequest], rates: tuple[float, ...]
) -> tuple[TaskInfo, list[Method]]:
    from surefoot.lab import catalogue, train

    train.usable_device(room.device)
    settings = [
        catalogue.resolve(request, rates) for request in requests
    ]  # before data that may take long to load
    task = room.info
    methods = [
        Method(
            label=request.label,
            optimizer=request.optimizer,
            settings=complete,
            batch_size=request.batch_size or task.batch_size,
            rates=rates if request.rate is None else (request.rate,),
        )
        for request, complete in zip(requests, settings, strict=True)
    ]
    for method in methods:
        if method.batch_size > task.train_patterns:
            raise UserError(
                f"{method.label} asks for batches of {method.batch_size} patterns, but task {task.name} has only "
                f"{task.train_patterns} to train on."
            )
    return task, methods


def _estimate(room: _Room, spec: RunSpec) -> float:
    from surefoot.lab import train

    return train.estimate_seconds(room.task, spec, room.device)


def _run(room: _Room, spec: RunSpec) -> RunResult:
    from surefoot.lab import train

    if room.info.version != spec.task_version:  # each process loads the task for itself
        found = room.info.version
        room.load_again()
        if room.info.version not in (found, spec.task_version):
            raise UserError(f"Task {spec.task} gives other data at every call; seed what it draws them from.")
        if room.info.version != spec.task_version:
            raise UserError(f"Task {spec.task} has changed since the comparison began; start it again.")
    return train.train(room.task, spec, room.device)
