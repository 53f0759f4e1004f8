"""Schedules: what the rate is multiplied by over a whole run, through torch's own schedulers.

They move the optimizer's ``lr``, whatever that is to it: a multiplier of the rates that it finds (surefoot's own), the rate
itself, or a cap (Momo). A scheduler is moved once for each step of the optimizer but the first, so that no step is made
at the rate 0 at which some schedules begin or end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
)

NONE = "none"


def _linear(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From 1 down to 0, which would be the step after the last."""
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=steps)


def _cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Half a cosine from 1 down to 0, which would be the step after the last."""
    return CosineAnnealingLR(optimizer, T_max=steps)


def _onecycle(optimizer: Optimizer, steps: int) -> LRScheduler:
    """torch's defaults: from 1/25 up to 1 in three tenths of the run, down to 4e-6; the momentum stays."""
    peaks = [group["lr"] for group in optimizer.param_groups]
    return OneCycleLR(optimizer, max_lr=peaks, total_steps=steps, cycle_momentum=False)


def _step(optimizer: Optimizer, steps: int) -> LRScheduler:
    """1, and 0.1 after two thirds of the run, as in LOSSGRAD's paper (after 20 of 30 epochs)."""
    return MultiStepLR(optimizer, milestones=[-(-2 * steps // 3)], gamma=0.1)


def _trapezoid(optimizer: Optimizer, steps: int) -> LRScheduler:
    """Up to 1 by a third of the run, level up to half of it, down to 0 at its end, as in LOSSGRAD's paper.

    The rise begins with its first step above 0 and the fall ends with its last.
    """
    return LambdaLR(optimizer, lambda step: min(1.0, 3 * (step + 1) / steps, 2 * (steps - step) / steps))


_SCHEDULERS: Mapping[str, Callable[[Optimizer, int], LRScheduler]] = {
    "linear": _linear,
    "cosine": _cosine,
    "onecycle": _onecycle,
    "step": _step,
    "trapezoid": _trapezoid,
}

SCHEDULES = (NONE, *_SCHEDULERS)
"""The values of the setting ``schedule``."""


def scheduler(name: str, steps: int, optimizer: Optimizer) -> LRScheduler | None:
    """The scheduler of that name, its first step's rate being set; ``None`` for no schedule.

    Args:
        name: one of :data:`SCHEDULES`.
        steps: how many steps the run has. The scheduler is to be moved before each of them but the first.
        optimizer: whose ``lr``, as it is now, is multiplied.
    """
    return None if name == NONE else _SCHEDULERS[name](optimizer, steps)
