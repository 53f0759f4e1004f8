"""The worker's side of every executor: what a process does that trains, here or on another machine.

Its jobs are functions of this module, called as ``function(room, *arguments)``. It is imported by drivers too, which must
not import torch: the functions do.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from surefoot.lab.engines import SEPARATE
from surefoot.lab.errors import UserError
from surefoot.lab.runs import Method, RunResult, RunSpec, TaskInfo

if TYPE_CHECKING:
    from surefoot.lab.engines import Timing
    from surefoot.lab.plan import MethodRequest
    from surefoot.lab.tasks.base import Task


@dataclass(frozen=True)
class Job:
    """Something to do in a worker: ``function(room, *arguments)``, a function of this module."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    instead: tuple[Job, ...] = ()
    """What is to be done in its place if it cannot be done, or is the death of workers; none: it has to be done."""


Reply = tuple[Literal["done", "refused", "failed", "undone"], Any]
"""A job's value, the message of its ``UserError``, what went wrong in it, or that what there is in its place is to be done."""


class UndoneError(Exception):
    """A job was not done, but :attr:`Job.instead` may be."""


@dataclass(frozen=True)
class Room:
    """What a worker works in: its task, loaded when first needed, and its device."""

    task_ref: str
    data: Path | None
    device: str

    @cached_property
    def task(self) -> Task:
        """The task itself."""
        from surefoot.lab.tasks import load

        return load(self.task_ref, self.data)

    @cached_property
    def info(self) -> TaskInfo:
        """The task described."""
        from surefoot.lab.tasks import describe

        return describe(self.task)

    def load_again(self) -> None:
        """Forget the task, which may have been loaded from a file that was being written."""
        for what in ("task", "info"):
            self.__dict__.pop(what, None)


def begin() -> None:
    """Makes this process a worker: one thread, and what it needs loaded before the first job comes."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"  # read by the libraries when they are loaded: now
    _keep_memory()
    import torch

    from surefoot.lab import tasks, train  # noqa: F401

    torch.set_num_threads(1)


def _keep_memory() -> None:
    """Has glibc keep what is freed: a step frees the same large blocks that the next one wants, cleared anew if given back.

    Steps of large stacks take up to a fifth less time. Other systems do without.
    """
    with suppress(OSError, AttributeError, TypeError):
        library = ctypes.CDLL(None)
        for option in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(option, 1 << 30)


def answer(room: Room, job: Job) -> Reply:
    """Does a job."""
    from surefoot.lab.tasks import explain

    try:
        return "done", job.function(room, *job.arguments)
    except UndoneError:
        return "undone", None
    except UserError as error:
        return "refused", str(error)
    except BaseException as error:  # a task may raise what it likes; only a signal ends a worker
        return "failed", explain(error)


def prepare(
    room: Room, requests: Sequence[MethodRequest], rates: tuple[float, ...]
) -> tuple[TaskInfo, list[Method]]:
    """The task described, and the optimizers with all their settings."""
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


def kinds(room: Room, runs: Sequence[RunSpec]) -> list[str]:
    """Which of the runs take the same time and may be one stack: the same word for those."""
    from surefoot.lab.population import kind_of

    return [kind_of(spec) for spec in runs]


def estimate(
    room: Room, spec: RunSpec, engine: str, runs: int, remember: bool, without_stacks: bool = False
) -> Timing:
    """What so many runs like this one take, each of the ways that ``engine`` allows.

    Raises:
        UndoneError: it cannot be told. ``without_stacks`` it may be, or else it will be known whose fault it was.
    """
    from surefoot.lab.timing import timing

    try:
        return timing(room.task, spec, room.device, engine, runs, remember, without_stacks)
    except Exception as error:
        if engine == SEPARATE or without_stacks:
            raise
        raise UndoneError from error


def run(room: Room, batch: Sequence[RunSpec], lowering: str | None = None) -> list[RunResult]:
    """The runs of a batch: as one stack, or one after the other.

    Raises:
        UndoneError: the stack failed. By itself each run may do, or else it will be known whose fault it was.
    """
    from surefoot.lab import population

    for spec in batch:
        _check_version(room, spec)
    if lowering is not None and len(batch) > 1:
        try:
            return population.train_stack(room.task, batch, room.device, lowering)
        except Exception as error:
            raise UndoneError from error
    return [_alone(room, spec) for spec in batch]


def _alone(room: Room, spec: RunSpec) -> RunResult:
    from surefoot.lab import train
    from surefoot.lab.tasks import explain

    try:
        return train.train(room.task, spec, room.device)
    except UserError:
        raise
    except BaseException as error:  # named here, for only here is known which one it was
        raise UserError(f"An error ended {named(spec)}: {explain(error)}.") from error


def named(spec: RunSpec) -> str:
    """A run as a sentence names it."""
    return f"the run of {spec.optimizer} at rate {spec.rate:g} with seed {spec.seed}"


def _check_version(room: Room, spec: RunSpec) -> None:
    """Each process loads the task for itself: it must be the one that the run was planned for."""
    if room.info.version == spec.task_version:
        return
    found = room.info.version
    room.load_again()
    if room.info.version not in (found, spec.task_version):
        raise UserError(f"Task {spec.task} gives other data at every call; seed what it draws them from.")
    if room.info.version != spec.task_version:
        raise UserError(f"Task {spec.task} has changed since the comparison began; start it again.")
