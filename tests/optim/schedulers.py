"""A case of every scheduler of ``torch.optim``."""

from __future__ import annotations

import inspect

from torch.optim import lr_scheduler
from torch.optim.swa_utils import SWALR

STEPS = 60
"""The longest run that the cases are made for."""


def _chained(opt):
    return lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(opt, 0.97), lr_scheduler.ConstantLR(opt, 0.2, total_iters=9)]
    )


def _sequential(opt):
    warmup = lr_scheduler.LinearLR(opt, 0.1, total_iters=7)
    return lr_scheduler.SequentialLR(opt, [warmup, lr_scheduler.CosineAnnealingLR(opt, 40)], milestones=[7])


RELATIVE = {
    "LambdaLR": lambda opt: lr_scheduler.LambdaLR(opt, lambda t: 1 / (1 + 0.1 * t)),
    "MultiplicativeLR": lambda opt: lr_scheduler.MultiplicativeLR(opt, lambda t: 0.9 if t % 5 else 1.3),
    "StepLR": lambda opt: lr_scheduler.StepLR(opt, 7, 0.6),
    "MultiStepLR": lambda opt: lr_scheduler.MultiStepLR(opt, [3, 11, 40], 0.4),
    "ConstantLR": lambda opt: lr_scheduler.ConstantLR(opt, 0.25, total_iters=8),
    "LinearLR": lambda opt: lr_scheduler.LinearLR(opt, 0.2, 0.8, total_iters=30),
    "ExponentialLR": lambda opt: lr_scheduler.ExponentialLR(opt, 0.95),
    "PolynomialLR": lambda opt: lr_scheduler.PolynomialLR(opt, total_iters=50, power=1.7),
    "CosineAnnealingLR": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 20),
    "CosineAnnealingWarmRestarts": lambda opt: lr_scheduler.CosineAnnealingWarmRestarts(opt, 7, 2),
    "ReduceLROnPlateau": lambda opt: lr_scheduler.ReduceLROnPlateau(opt, factor=0.5, patience=2, cooldown=1),
    "SequentialLR": _sequential,
    "ChainedScheduler": _chained,
}
"""Schedulers that only multiply the lr they find: they do the same to our lr = 1 as to torch's lr = rate."""

ABSOLUTE = {
    "CyclicLR": lambda opt: lr_scheduler.CyclicLR(
        opt, 0.01, 0.2, step_size_up=6, step_size_down=9, mode="triangular2", cycle_momentum=_cycles(opt)
    ),
    "OneCycleLR": lambda opt: lr_scheduler.OneCycleLR(
        opt, 0.2, total_steps=STEPS + 1, cycle_momentum=_cycles(opt)
    ),
    "SWALR": lambda opt: SWALR(opt, swa_lr=0.3, anneal_epochs=12),
    "CosineAnnealingLR-floor": lambda opt: lr_scheduler.CosineAnnealingLR(opt, 25, eta_min=0.01),
    "ReduceLROnPlateau-floor": lambda opt: lr_scheduler.ReduceLROnPlateau(
        opt, factor=0.2, patience=0, min_lr=0.004
    ),
}
"""Schedulers that write a value into ``group["lr"]``: with Constant(1) it means what it means to torch."""


def _cycles(opt):
    """Momentum is cycled wherever there is one to cycle (torch's SGD without momentum has a key for it, ours has not)."""
    return "betas" in opt.defaults or bool(opt.defaults.get("momentum"))


def advance(scheduler, t):
    """One scheduler step; the plateau scheduler is told a loss that gets stuck."""
    if isinstance(scheduler, lr_scheduler.ReduceLROnPlateau):
        scheduler.step(max(0.5, 1 - 0.05 * t) + 0.1 * (t % 3))
    else:
        scheduler.step()


def of_this_torch():
    """The names of all schedulers that the installed torch has."""
    return {
        name
        for name, item in vars(lr_scheduler).items()
        if inspect.isclass(item)
        and issubclass(item, lr_scheduler.LRScheduler)
        and item is not lr_scheduler.LRScheduler
        and not name.startswith("_")
    } | {"SWALR"}
