"""One run: a task trained by one optimizer, at one rate, from one seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from surefoot.lab import catalogue
from surefoot.lab.course import Course, Timed
from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult, RunSpec
from surefoot.lab.schedules import scheduler
from surefoot.lab.streams import own_random_state, seed_everything, stream_seed
from surefoot.lab.tasks.base import Task
from surefoot.optim import Rates


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
    device = usable_device(device)
    with own_random_state(device):
        (result,) = Single(task, spec, device).run()
    return result


def timed(task: Task, spec: RunSpec, device: str | torch.device = "cpu", moment: float = 0.3) -> Timed:
    """About what ``train`` would take if the run came to its end: from about ``moment`` seconds of real steps.

    Raises:
        UserError: as ``train``, where those steps meet the reason.
    """
    device = usable_device(device)
    with own_random_state(device):
        return Single(task, spec, device).timed(moment)


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


class Single(Course):
    """One run by itself, its model called as it is."""

    engine = "separate"

    def __init__(self, task: Task, spec: RunSpec, device: torch.device) -> None:
        super().__init__(task, [spec], device)
        seed_everything(stream_seed(spec.seed, "weights"), device)
        self.model = task.model().to(device).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = catalogue.build(self.parameters, spec.optimizer, spec.settings, spec.rate)
        self.schedule = scheduler(catalogue.schedule_of(spec.settings), self.steps_in_all, self.optimizer)
        self._shuffling = torch.Generator().manual_seed(stream_seed(spec.seed, "order"))
        seed_everything(stream_seed(spec.seed, "training"), device)

    @property
    def buffers(self) -> list[Tensor]:
        """The model's."""
        return list(self.model.buffers())

    def shuffled(self) -> Tensor:
        return torch.randperm(len(self.inputs), generator=self._shuffling).to(self.device)

    def losses(self, index: Tensor) -> Tensor:
        if not self.model.training:
            self.model.train()
        # index_select copies, so the model may change what it gets.
        inputs, targets = self.inputs.index_select(0, index), self.targets.index_select(0, index)
        return self.task.loss(self.model(inputs), targets)

    def losses_again(self, index: Tensor) -> Tensor:
        return self.losses(index)  # the optimizer sees to it that nothing remembers it

    def outputs(self, inputs: Tensor) -> Sequence[Any]:
        if self.model.training:
            self.model.eval()
        return [self.model(inputs)]

    def rates(self) -> Sequence[Rates]:
        return [self.optimizer.rates()]

    def lost(self) -> Sequence[bool]:
        gradients = [p.grad for p in self.parameters if p.grad is not None and not p.grad.is_sparse]
        return [not all(torch.isfinite(t).all() for t in (*self.parameters, *gradients))]

    def keep(self, places: Sequence[int]) -> None:
        """There is no other run to go on without."""
