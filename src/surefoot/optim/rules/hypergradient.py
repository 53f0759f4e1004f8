"""Hypergradient descent: gradient descent on the learning rate itself.

Baydin, Cornish, Martinez Rubio, Schmidt & Wood, arXiv 1703.04782 (ICLR 2018). After x_t = x_{t-1} - r u_{t-1} the loss
changes with the r of that step by -<g_t, u_{t-1}>, so before the next step r goes against that:

    additive          r <- r + hyper_rate <g_t, u_{t-1}>
    multiplicative    r <- r (1 + hyper_rate <g_t, u_{t-1}> / (|g_t| |u_{t-1}|))

It costs a copy of the last update and a dot product, and needs neither the loss nor a probe. The gradient is the next
batch's, so what is measured is whether the last step helped another batch than its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.optim.parts import Number, Slot, State, all_of, require, require_limits
from surefoot.optim.rules.line import OneRate, gradients, line

FORMS = ("additive", "multiplicative")


def descend(
    rate: Tensor,
    product: Tensor,
    sizes: Tensor,
    hyper_rate: Number,
    form: str,
    step_sizes: tuple[Number, Number],
) -> Tensor:
    """The rate after one step, of one of :data:`FORMS`; within ``step_sizes``, and as it was where that is no number.

    ``product`` = <g_t, u_{t-1}>; ``sizes`` = |g_t| |u_{t-1}|, read by the multiplicative form only, which does nothing
    where it is 0.
    """
    if form == "additive":
        new = rate + hyper_rate * product
    else:
        new = rate * (1 + hyper_rate * torch.where(sizes > 0, product / sizes, 0.0))
    smallest, largest = step_sizes
    return torch.where(torch.isfinite(new), new, rate).clamp(min=smallest).clamp(max=largest)


@dataclass(frozen=True)
class Hypergradient(OneRate):
    """Hypergradient descent on one rate for all parameters (:func:`descend`), with every direction's update as u.

    ``initial_rate``: above 0. ``hyper_rate`` (beta): at least 0; the unit of the additive one is that of rate^2 / loss, so it
    depends on the scale of the loss and on the number of weights: the authors have 1e-6 in their code for SGD (1e-3 in the
    paper's runs), and 1e-8 for Adam (1e-7). ``form``: "additive", as published, or "multiplicative", whose
    hyper_rate, below 1, is the most that a step changes the rate by. ``step_sizes``: smallest and largest rate; published
    code has no limits, and additive rates go below 0 there.

    State besides the direction's: the last update. A parameter whose gradient is missing for a while is then judged by
    the last update that it had.
    """

    initial_rate: Number = 1e-3
    hyper_rate: Number = 1e-6
    form: str = "additive"
    step_sizes: tuple[Number, Number] = (1e-12, 1e6)

    def check(self) -> None:
        require(
            "initial_rate", self.initial_rate, "above 0 and finite", lambda v: all_of(v > 0, v < math.inf)
        )
        require("form", self.form, f"one of {', '.join(FORMS)}", lambda v: v in FORMS)
        most = math.inf if self.form == "additive" else 1.0
        allowed = (
            "at least 0 and finite" if self.form == "additive" else "in [0, 1) for the multiplicative form"
        )
        require("hyper_rate", self.hyper_rate, allowed, lambda v: all_of(v >= 0, v < most))
        require_limits("step_sizes", self.step_sizes)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("last_update"),)

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        dot, rate = slots[0].space.dot, shared["rate"]
        grads, last = gradients(slots), [slot.state["last_update"] for slot in slots]
        product, sizes = dot(grads, last), rate
        if options["form"] == "multiplicative":
            sizes = (dot(grads, grads) * dot(last, last)).sqrt()
        names = ("hyper_rate", "form", "step_sizes")
        device = rate.device
        rate.copy_(descend(rate, product.to(device), sizes.to(device), *(options[name] for name in names)))
        for slot, update in zip(slots, line(slots)[0], strict=True):
            slot.store(last_update=update)
