"""One run: a task trained by one optimizer, at one rate, from one seed."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from surefoot._version import __version__
from surefoot.lab import catalogue
from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult, RunSpec, Scalar
from surefoot.lab.schedules import scheduler
from surefoot.lab.streams import own_random_state, seed_everything, stream_seed
from surefoot.lab.tasks.base import Task

_EVALUATED_AT_ONCE = 500
"""Patterns: many more would not fit a processor's cache and take half as long again."""
_WARM_UP_STEPS = 3


def train(task: Task, spec: RunSpec, device: str | torch.device = "cpu") -> RunResult:
    """Train ``task`` as ``spec`` says and keep what it did.

    The seed decides the initial weights, the order of the patterns in every epoch and the random stream of the training
    (dropout), each from a stream of its own and none depending on the optimizer, so that runs of two optimizers with
    one seed are a pair. The streams are torch's, NumPy's and Python's global ones, which are left as they were found.

    A batch belongs to the block of ``task.block`` patterns in which it ends; the last batch of an epoch may be short and
    the last block of the run too. At the end of each block the validation data are evaluated, at the optimizer's averaged
    weights where it has such, and the rates of its last step are read. A loss or a metric that is not finite ends the run
    there, with status "diverged".

    Raises:
        UserError: the model fails on a last batch of a single pattern (as BatchNorm does), or the optimizer does not take
            the model's gradients (sparse ones).
    """
    started, clock = datetime.now(timezone.utc), time.perf_counter()
    curves, stepping = _Curves(), 0.0
    status: Literal["finished", "diverged"] = "finished"
    device = usable_device(device)
    with own_random_state(device):
        run = _Run(task, spec, device)
        mark = time.perf_counter()
        for seen, loss in run.blocks():
            stepping += time.perf_counter() - mark
            if not curves.add(seen, loss, run):
                status = "diverged"
                break
            mark = time.perf_counter()
    return RunResult(
        spec=spec,
        status=status,
        patterns=curves.patterns,
        train_loss=curves.train_loss,
        validation_loss=curves.validation_loss,
        validation_metric=curves.validation_metric,
        rate_mean=curves.rate_mean,
        rate_std=curves.rate_std,
        rate_min=curves.rate_min,
        rate_max=curves.rate_max,
        steps=run.steps,
        seconds=time.perf_counter() - clock,
        step_seconds=stepping / max(run.steps, 1),
        environment=_environment(device, started),
    )


def estimate_seconds(
    task: Task, spec: RunSpec, device: str | torch.device = "cpu", moment: float = 0.3
) -> float:
    """About how long ``train`` would take if the run came to its end: from about ``moment`` seconds of real steps.

    Raises:
        UserError: as ``train``, where those steps meet the reason.
    """
    device = usable_device(device)
    with own_random_state(device):
        began = time.perf_counter()
        run = _Run(task, spec, device)
        making = time.perf_counter() - began
        losses: list[Tensor] = []
        began, deadline = time.perf_counter(), math.inf
        for index in run.batches():
            try:
                losses.append(run.step(index))
            except Exception:
                if run.is_lost():  # the run will end as diverged: these steps have to do
                    break
                raise
            if len(losses) == _WARM_UP_STEPS:
                losses[-1].item()  # wait for the device
                began = time.perf_counter()
                deadline = began + moment
            if len(losses) > _WARM_UP_STEPS and time.perf_counter() > deadline:
                break
        if losses:
            losses[-1].item()
        timed = len(losses) - _WARM_UP_STEPS
        step = (time.perf_counter() - began) / (timed if timed > 0 else max(len(losses), 1))
        began = time.perf_counter()
        _Curves().add(1, 0.0, run)
        point = time.perf_counter() - began
    patterns = len(task.train[0])
    points = math.ceil(patterns * spec.epochs / (task.block or patterns))
    return making + step * run.steps_in_all + point * points


def usable_device(name: str | torch.device) -> torch.device:
    """The device of that name.

    Raises:
        UserError: torch knows no such device or cannot use it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"Device {str(name)!r} cannot be used here: {str(error).splitlines()[0].rstrip('.')}."
        ) from error
    return device


class _Run:
    """A model, its data and its optimizer, on their device and at their beginning."""

    def __init__(self, task: Task, spec: RunSpec, device: torch.device) -> None:
        self.task, self.spec, self.device = task, spec, device
        self.inputs, self.targets = (tensor.to(device) for tensor in task.train)
        self.validation = tuple(tensor.to(device) for tensor in task.validation)
        seed_everything(stream_seed(spec.seed, "weights"), device)
        self.model = task.model().to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = catalogue.build(self.parameters, spec.optimizer, spec.settings, spec.rate)
        self.steps_in_all = spec.epochs * math.ceil(len(self.inputs) / spec.batch_size)
        self.schedule = scheduler(catalogue.schedule_of(spec.settings), self.steps_in_all, self.optimizer)
        self.steps = 0
        seed_everything(stream_seed(spec.seed, "training"), device)

    def blocks(self) -> Iterator[tuple[int, float]]:
        """Trains, pausing at the end of each block: patterns seen so far, and the block's training loss."""
        patterns = len(self.inputs)
        block = self.task.block or patterns
        seen, boundary = 0, block
        losses: list[Tensor] = []
        sizes: list[int] = []
        for index in self.batches():
            size = len(index)
            if seen + size > boundary:  # this batch ends in a later block: the one before closed its own
                if losses:
                    yield seen, _weighted_mean(losses, sizes)
                    losses, sizes = [], []
                boundary = math.ceil((seen + size) / block) * block
            seen += size
            try:
                losses.append(self.step(index))
            except Exception:
                if self.is_lost():  # some losses raise where others give NaN
                    yield seen, math.nan
                    return
                raise
            sizes.append(size)
        yield seen, _weighted_mean(losses, sizes)

    def batches(self) -> Iterator[Tensor]:
        """The indices of the patterns of every batch of every epoch."""
        generator = torch.Generator().manual_seed(stream_seed(self.spec.seed, "order"))
        for _ in range(self.spec.epochs):
            order = torch.randperm(len(self.inputs), generator=generator)
            yield from order.to(self.device).split(self.spec.batch_size)

    def step(self, index: Tensor) -> Tensor:
        """One update; returns the batch's loss before it, without waiting for the device."""
        if self.schedule is not None and self.steps:
            self.schedule.step()
        self.optimizer.zero_grad()
        try:
            loss = self.loss(index)
            loss.backward()
        except Exception as error:
            if len(index) == 1 < self.spec.batch_size and not self.is_lost():
                raise UserError(
                    f"Task {self.task.name}: the model fails on the single pattern that {len(self.inputs)} training "
                    f"patterns in batches of {self.spec.batch_size} leave over ({error}); choose another batch size."
                ) from error
            raise
        try:
            self.optimizer.step(loss=loss, evaluate=lambda: self.loss(index))
        except ValueError as error:  # what it does not take
            raise UserError(f"Optimizer {self.spec.optimizer}: {str(error).rstrip('.')}.") from error
        self.steps += 1
        return loss.detach()

    def loss(self, index: Tensor) -> Tensor:
        """The loss of one batch at the weights as they are; its tensors are copies, which a model may change in place."""
        inputs, targets = self.inputs.index_select(0, index), self.targets.index_select(0, index)
        return self.task.loss(self.model(inputs), targets)

    @torch.no_grad()
    def evaluate(self) -> tuple[float, float | None]:
        """Loss and metric over all validation patterns, in evaluation mode, at what the optimizer would have evaluated."""
        self.model.eval()
        losses, metrics, sizes = [], [], []
        with self.optimizer.averaged():
            for chunk in zip(*(t.split(_EVALUATED_AT_ONCE) for t in self.validation), strict=True):
                inputs, targets = (part.clone() for part in chunk)  # which a model may change in place
                outputs = self.model(inputs)
                losses.append(self.task.loss(outputs, targets))
                if self.task.metric is not None:
                    metrics.append(self.task.metric(outputs, targets))
                sizes.append(len(inputs))
        self.model.train()
        return _weighted_mean(losses, sizes), _weighted_mean(metrics, sizes) if metrics else None

    def is_lost(self) -> bool:
        """Whether a weight or its gradient is not a finite number any more; a sparse one is another matter."""
        gradients = [p.grad for p in self.parameters if p.grad is not None and not p.grad.is_sparse]
        return not all(torch.isfinite(t).all() for t in (*self.parameters, *gradients))


@dataclass
class _Curves:
    """A run's curves, one entry per block."""

    patterns: list[int] = field(default_factory=list)
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    validation_metric: list[float] = field(default_factory=list)
    rate_mean: list[float] = field(default_factory=list)
    rate_std: list[float] = field(default_factory=list)
    rate_min: list[float] = field(default_factory=list)
    rate_max: list[float] = field(default_factory=list)

    def add(self, seen: int, train_loss: float, run: _Run) -> bool:
        """Measure and append a point; ``False``, and nothing appended, where it is not finite: the run has diverged."""
        if not math.isfinite(train_loss):
            return False
        try:
            loss, metric = run.evaluate()
        except Exception:
            if run.is_lost():
                return False
            raise
        rates = run.optimizer.rates()
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


def _weighted_mean(values: list[Tensor], sizes: list[int]) -> float:
    """Mean over patterns of the means over batches; the only place where a run waits for its device."""
    means = torch.stack(values).cpu().double()
    weights = torch.tensor(sizes, dtype=torch.float64)
    return float(means @ weights / weights.sum())


def _environment(device: torch.device, started: datetime) -> dict[str, Scalar]:
    """What may move the last bits or explain the time; nothing that names the machine or its user."""
    return {
        "surefoot": __version__,
        "torch": str(torch.__version__),  # a plain string: unpickling torch's own would import torch
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "threads": torch.get_num_threads(),
        "started": started.isoformat(timespec="seconds"),
    }


def _processor() -> str:
    """The processor's model, such as "AMD EPYC 7763"."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())
