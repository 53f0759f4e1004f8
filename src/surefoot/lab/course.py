"""From the first step to the last: what one run and a stack of runs have in common."""

from __future__ import annotations

import math
import platform
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from surefoot._version import __version__
from surefoot.lab.catalogue import Trainee
from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult, RunSpec, Scalar
from surefoot.lab.tasks.base import Task
from surefoot.optim import Rates

EVALUATED_AT_ONCE = 500
"""Patterns: many more would not fit a processor's cache and take half as long again."""
_WARM_UP_STEPS = 3
_T = TypeVar("_T")


@dataclass
class Record:
    """What becomes a run's result: its curves, one entry per block, and its share of the time."""

    spec: RunSpec
    status: Literal["finished", "diverged"] = "finished"
    patterns: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_metric: list[float] = field(default_factory=list)
    rate_mean: list[float] = field(default_factory=list)
    rate_std: list[float] = field(default_factory=list)
    rate_min: list[float] = field(default_factory=list)
    rate_max: list[float] = field(default_factory=list)
    steps: int = 0
    seconds: float = 0.0
    stepping: float = 0.0
    """Seconds of training steps."""

    def add(self, seen: int, train_loss: float, loss: float, metric: float | None, rates: Rates) -> bool:
        """Append a point; ``False``, and nothing appended, where it is not finite: the run has diverged."""
        point = (train_loss, loss, rates.mean, rates.std, rates.min, rates.max)
        if not all(map(math.isfinite, point if metric is None else (*point, metric))):
            return False
        self.patterns.append(seen)
        self.train_loss.append(train_loss)
        self.validation_loss.append(loss)
        if metric is not None:
            self.validation_metric.append(metric)
        self.rate_mean.append(rates.mean)
        self.rate_std.append(rates.std)
        self.rate_min.append(rates.min)
        self.rate_max.append(rates.max)
        return True

    def result(self, environment: dict[str, Scalar]) -> RunResult:
        """The run as it is kept."""
        curves = {name: value for name, value in vars(self).items() if name != "stepping"}
        return RunResult(
            **curves, step_seconds=self.stepping / max(self.steps, 1), environment=dict(environment)
        )


@dataclass(frozen=True)
class Timed:
    """What a course takes."""

    step: float
    """Seconds of one step."""
    steps: int
    rest: float
    """Seconds of all that is no step: the making, and the validation."""

    @property
    def seconds(self) -> float:
        """From the beginning to the end."""
        return self.step * self.steps + self.rest


class Course(ABC):
    """One run, or several side by side that differ in seed, rate and other numbers: same task, same steps, same blocks.

    A run that diverges ends there and then, and the others go on without it. The time is shared out evenly among the
    runs that were going on while it passed.
    """

    optimizer: Trainee
    schedule: LRScheduler | None
    engine: str
    """How the runs are run, for their records."""

    def __init__(self, task: Task, specs: Sequence[RunSpec], device: torch.device) -> None:
        self._started, self._mark, self._stepping = datetime.now(timezone.utc), time.perf_counter(), False
        self.task, self.device = task, device
        self._records = [Record(spec) for spec in specs]
        self.going = list(self._records)
        """The runs that have not diverged."""
        self.inputs, self.targets = (tensor.to(device) for tensor in task.train)
        self.validation = tuple(tensor.to(device) for tensor in task.validation)
        self.batch_size, self.epochs = specs[0].batch_size, specs[0].epochs
        self.steps_in_all = self.epochs * math.ceil(len(self.inputs) / self.batch_size)
        self.steps = 0
        self.order = torch.empty(0)
        """Of the patterns in this epoch."""
        self._losses: list[Tensor] = []  # of the block's batches so far

    # ----------------------------------------------------------------------------- what the two ways do each in its own

    @abstractmethod
    def shuffled(self) -> Tensor:
        """The order of the patterns in the next epoch, on the device: ``[N]``, in a stack ``[K, N]``."""

    @abstractmethod
    def losses(self, index: Tensor) -> Tensor:
        """The loss of a batch (its patterns' numbers along the last axis) in training mode, in a stack ``[K]``."""

    @abstractmethod
    def losses_again(self, index: Tensor) -> Tensor:
        """The same loss for a probe: with the same random numbers, and leaving no trace."""

    @abstractmethod
    def outputs(self, inputs: Tensor) -> Sequence[Any]:
        """What each run's model makes of the same patterns in evaluation mode, at the weights as they are."""

    def numbers_of(self, place: int) -> AbstractContextManager[None]:
        """Inside, the random numbers drawn are this run's."""
        return nullcontext()

    @abstractmethod
    def rates(self) -> Sequence[Rates]:
        """Each run's effective rates."""

    @abstractmethod
    def lost(self) -> Sequence[bool]:
        """Whether a weight of each run, or its gradient, is not a finite number any more."""

    @abstractmethod
    def keep(self, places: Sequence[int]) -> None:
        """Go on with these of the runs, at least one."""

    # --------------------------------------------------------------------------------------------------- the whole of it

    def run(self) -> list[RunResult]:
        """Train, and measure at the end of each block; the results in the order of the specifications."""
        self._charge(stepping=True)
        for seen, losses in self.blocks():
            self._charge(stepping=False)
            self.measure(seen, losses)
            self._charge(stepping=True)
        for record in self.going:
            record.steps = self.steps
        environment = {**_environment(self.device, self._started), "engine": self.engine}
        return [record.result(environment) for record in self._records]

    def timed(self, moment: float) -> Timed:
        """What :meth:`run` would take if none diverged, from about ``moment`` seconds of real steps; for a fresh one only."""
        making = time.perf_counter() - self._mark
        step = self.step_seconds(moment)
        began = time.perf_counter()
        self.measure(1, [0.0] * len(self.going))
        point = time.perf_counter() - began
        patterns = len(self.inputs)
        points = math.ceil(patterns * self.epochs / (self.task.block or patterns))
        return Timed(step, self.steps_in_all, making + point * points)

    def step_seconds(self, moment: float) -> float:
        """What one step takes, of all runs together, from about ``moment`` seconds of them; for a fresh one only."""
        losses: list[Tensor] = []
        began, deadline = time.perf_counter(), math.inf
        for batch in self.batches():
            loss = self.step(batch)
            if loss is None:  # all would end as diverged: these steps have to do
                break
            losses.append(loss)
            if len(losses) == _WARM_UP_STEPS:
                losses[-1].sum().item()  # wait for the device
                began = time.perf_counter()
                deadline = began + moment
            if len(losses) > _WARM_UP_STEPS and time.perf_counter() > deadline:
                break
        if losses:
            losses[-1].sum().item()
        counted = len(losses) - _WARM_UP_STEPS
        return (time.perf_counter() - began) / (counted if counted > 0 else max(len(losses), 1))

    def blocks(self) -> Iterator[tuple[int, list[float]]]:
        """Trains, pausing at the end of each block: patterns seen so far, and each run's training loss in the block."""
        block = self.task.block or len(self.inputs)
        seen, boundary = 0, block
        sizes: list[int] = []
        for batch in self.batches():
            size = batch.stop - batch.start
            if seen + size > boundary:  # this batch ends in a later block: the one before closed its own
                if sizes:
                    yield seen, _weighted_means(torch.stack(self._losses), sizes)
                    self._losses, sizes = [], []
                boundary = math.ceil((seen + size) / block) * block
            if not self.going:
                return
            seen += size
            loss = self.step(batch)
            if loss is None:
                return
            self._losses.append(loss)
            sizes.append(size)
        yield seen, _weighted_means(torch.stack(self._losses), sizes)

    def batches(self) -> Iterator[slice]:
        """Where in each epoch's order the batches are."""
        patterns = len(self.inputs)
        for _ in range(self.epochs):
            self.order = self.shuffled()
            for start in range(0, patterns, self.batch_size):
                yield slice(start, min(start + self.batch_size, patterns))

    def step(self, batch: slice) -> Tensor | None:
        """One update; the batch's losses before it, without waiting for the device. ``None``: no run is going on."""
        if self.schedule is not None and self.steps:
            self.schedule.step()
        losses = self._among_the_living(lambda: self._update(self.order[..., batch]))
        self.steps += losses is not None
        return losses

    def _update(self, index: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        try:
            losses = self.losses(index)
            losses.sum().backward()
        except Exception as error:
            if index.shape[-1] == 1 < self.batch_size and not any(self.lost()):
                raise UserError(
                    f"Task {self.task.name}: the model fails on the single pattern that {len(self.inputs)} training "
                    f"patterns in batches of {self.batch_size} leave over ({error}); choose another batch size."
                ) from error
            raise
        try:
            self.optimizer.step(loss=losses, evaluate=lambda: self.losses_again(index))
        except ValueError as error:  # what it does not take
            name = self._records[0].spec.optimizer
            raise UserError(f"Optimizer {name}: {str(error).rstrip('.')}.") from error
        return losses.detach()

    def measure(self, seen: int, train_losses: Sequence[float]) -> None:
        """Add a point to each run's curves; what is not finite there ends the run."""
        of_run = dict(zip(map(id, self.going), train_losses, strict=True))
        self._drop([not math.isfinite(loss) for loss in train_losses])
        evaluated = self._among_the_living(self.evaluate)
        if evaluated is None:
            return
        points = zip(self.going, *evaluated, self.rates(), strict=True)
        self._drop([not r.add(seen, of_run[id(r)], loss, metric, rates) for r, loss, metric, rates in points])

    @torch.no_grad()
    def evaluate(self) -> tuple[list[float], Sequence[float | None]]:
        """Each run's loss and metric over all validation patterns, at what its optimizer would have evaluated."""
        losses: list[Tensor] = []
        metrics: list[Tensor] = []
        sizes = []
        with self.optimizer.averaged():
            for inputs, targets in zip(*(t.split(EVALUATED_AT_ONCE) for t in self.validation), strict=True):
                outputs_of_runs = self.outputs(inputs.clone())  # a model may change them in place
                for place, outputs in enumerate(outputs_of_runs):
                    own = targets.clone()  # and a loss these
                    with self.numbers_of(place):
                        losses.append(self.task.loss(outputs, own))
                        if self.task.metric is not None:
                            metrics.append(self.task.metric(outputs, own))
                sizes.append(len(inputs))
        over_all = _weighted_means(torch.stack(losses), sizes)
        if self.task.metric is None:
            return over_all, [None] * len(over_all)
        return over_all, _weighted_means(torch.stack(metrics), sizes)

    def _among_the_living(self, work: Callable[[], _T]) -> _T | None:
        """What ``work`` returns. Some losses raise where others give NaN: the runs that are lost end, and it is tried again.

        ``None``: no run is left.
        """
        while self.going:
            try:
                return work()
            except Exception:  # noqa: PERF203 - it costs a step nothing
                lost = self.lost()
                if not any(lost):
                    raise
                self._drop(lost)
        return None

    def _drop(self, gone: Sequence[bool]) -> None:
        """End these runs as diverged."""
        if not any(gone):
            return
        self._charge(self._stepping)
        for record, ends in zip(self.going, gone, strict=True):
            if ends:
                record.status, record.steps = "diverged", self.steps
        places = [place for place, ends in enumerate(gone) if not ends]
        self.going = [self.going[place] for place in places]
        if places:
            self._losses = [losses[places] for losses in self._losses]
            self.order = self.order[places]
            self.keep(places)

    def _charge(self, stepping: bool) -> None:
        """Share out the time since the last call; ``stepping``: what comes next is training steps."""
        now = time.perf_counter()
        for record in self.going:
            share = (now - self._mark) / len(self.going)
            record.seconds += share
            record.stepping += share if self._stepping else 0.0
        self._mark, self._stepping = now, stepping


def _weighted_means(means: Tensor, sizes: list[int]) -> list[float]:
    """For each run, the mean over patterns of the means over batches ``[batches, runs]``.

    The only place where a run waits for its device.
    """
    weights = torch.tensor(sizes, dtype=torch.float64)
    columns = means.reshape(len(sizes), -1).cpu().double().T.contiguous()
    return [float(column @ weights / weights.sum()) for column in columns]


def _environment(device: torch.device, started: datetime) -> dict[str, Scalar]:
    """What may move the last bits or explain the time; nothing that names the machine or its user."""
    return {
        "surefoot": __version__,
        "torch": str(torch.__version__),  # a plain string: unpickling torch's own would import torch
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "started": started.isoformat(timespec="seconds"),
    }


def processor() -> str:
    """The processor's model, such as "AMD EPYC 7763"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
