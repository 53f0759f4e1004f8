"""Polyak's step: as far as a straight line at the loss's slope would have to go to reach the least loss.

L4 (Rolinek & Martius, arXiv 1802.05074) and SPS_max (Loizou, Vaswani, Laradji & Lacoste-Julien, arXiv 2002.10542), for
every direction u. Both divide what there is to gain by a slope along the update:

=========== ======================= ===================== ====================
direction   u                       slope of ``Polyak``   slope of ``L4``
=========== ======================= ===================== ====================
SGD         g                       <g, g> = |g|^2        <g, m>
Momentum    b, the buffer           <g, b>                <b, m>
Nesterov    g + mu b                <g, u>                <u, m>
Adam        m_hat / (sqrt v + eps)  <g, u>                <u, m>
Sign        sign(g)                 <g, u> = |g|_1        <u, m>
=========== ======================= ===================== ====================

with g the gradient of what is minimised (coupled weight decay included, and counted in the loss too) and m L4's own
average of gradients. The scale of u does not matter: L4 along the momentum buffer takes the steps of L4 along the
bias-corrected average, which is the buffer but for a factor. Where the slope is not above 0 the straight line promises
nothing, and no step is made; nor where the loss is no number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from surefoot.optim.parts import Number, Slot, State, all_of, require
from surefoot.optim.rules.line import OneRate, gradients, line, penalty
from surefoot.optim.rules.lossgrad import polyak_cap

EPSILON = 1e-12
"""L4's, added to the slope."""


def polyak_step(height: Tensor, slope: Tensor, least: Number = 0.0) -> Tensor:
    """(height - least) / slope; 0 below ``least``, for a slope that is not above 0, and for what is no number."""
    step = polyak_cap(height, slope, least) / 2
    return torch.where((slope > 0) & torch.isfinite(step), step, 0.0)


def sps_step(height: Tensor, slope: Tensor, c: Number, bound: Tensor) -> Tensor:
    """SPS_max: eta = min{(f - f*) / (c <g, u>), bound}, with ``height`` = f - f*."""
    return (polyak_step(height, slope) / c).minimum(bound)


def l4_step(
    loss: Tensor,
    lowest: Tensor,
    slope: Tensor,
    fraction: Number,
    attainable: Number,
    first_lowest: Number,
    forget_steps: Number,
) -> tuple[Tensor, Tensor]:
    """L4's rate and the next step's L_min; ``lowest`` is L_min, infinite before the first step.

    L_min <- gamma_0 L at first, then min(L_min, L);  eta = alpha (L - gamma L_min) / (<v, m> + epsilon);
    L_min <- (1 + 1 / tau) L_min. A loss that is no number changes nothing, and the rate is 0.
    """
    kept = torch.where(torch.isinf(lowest), first_lowest * loss, lowest.minimum(loss))
    rate = fraction * polyak_step(loss, torch.where(slope > 0, slope + EPSILON, slope), attainable * kept)
    return rate, torch.where(torch.isfinite(loss), kept * (1 + 1 / forget_steps), lowest)


@dataclass(frozen=True)
class FromLoss(OneRate):
    """What both have in common: the loss measured from ``lower_bound``, a finite number that it does not fall below.

    0 for cross-entropy and squares. Where the loss is below it no step is made; where the loss cannot come near it (label
    smoothing, an irreducible part) steps are too long. With ``maximize`` it is a bound of the negated loss.
    """

    lower_bound: Number = field(default=0.0, kw_only=True)

    needs_loss: ClassVar[bool] = True

    def check(self) -> None:
        require(
            "lower_bound", self.lower_bound, "a finite number", lambda v: all_of(v > -math.inf, v < math.inf)
        )

    def height(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> Tensor:
        """F above ``lower_bound``: 0 for one below it, and NaN for one that is no finite number."""
        above = cast(Tensor, loss).to(shared["rate"].device) - options["lower_bound"]
        above = above + penalty(slots, (slot.weight for slot in slots))
        return torch.where(torch.isfinite(above), above, math.nan).clamp(min=0)


@dataclass(frozen=True)
class Polyak(FromLoss):
    """The stochastic Polyak step SPS_max: r = min{(f - lower_bound) / (c <g, u>), bound} (:func:`sps_step`).

    With c = 1/2 it jumps to the minimum of L/2 |x|^2, and to that of any parabola along the line whose minimum is
    ``lower_bound``; for every other one it is too long, up to ``bound``, which has to be chosen like a learning rate
    where the loss cannot fall to ``lower_bound`` on every batch at once.

    ``bound``: above 0, infinity for none. ``c``: above 0. ``growth``: at least 1; where it is finite it is the authors'
    smoothed bound: the rate is at most ``growth`` times the last one, and the first at most that times ``bound``, which is
    then no limit any more. Theirs is 2^(1/n) with n the steps of an epoch, 500 by default.
    """

    bound: Number = 1.0
    c: Number = 0.5
    growth: Number = math.inf

    def check(self) -> None:
        super().check()
        for name in ("bound", "c"):
            require(name, getattr(self, name), "above 0", lambda v: v > 0)
        require("growth", self.growth, "at least 1", lambda v: v >= 1)

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (*super().declare_shared(options), State("last_rate", options["bound"]))

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        height, last = self.height(slots, shared, options, loss), shared["last_rate"]
        slope = slots[0].space.dot(gradients(slots), line(slots)[0]).to(height.device)
        smoothed = options["growth"] * last
        bound = torch.where(torch.isinf(smoothed), options["bound"], smoothed)
        rate = sps_step(height, slope, options["c"], bound)
        shared["rate"].copy_(rate)
        # A step that was not made says nothing of the next ones: under a bound of 0 there would be none.
        last.copy_(torch.where(rate > 0, rate, last))

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        return state.get("rate", options["bound"])


@dataclass(frozen=True)
class L4(FromLoss):
    """L4: r = fraction (L - attainable L_min) / (<u, m> + 1e-12), L_min a slowly forgotten minimum (:func:`l4_step`).

    m is the bias-corrected exponential mean of the gradients with the coefficient ``smoothing``. With the direction
    ``Momentum(0.9)`` it is the published L4Mom, with ``Adam(eps=1e-4)`` L4Adam: there <u, m> is never below 0. With others it
    may be, and then no step is made.

    ``fraction`` (alpha): above 0; the authors advise 0.1 to 0.3. ``attainable`` (gamma): in [0, 1], the share of the smallest loss
    seen that is taken to be attainable. ``first_lowest`` (gamma_0): in [0, 1], the first L_min as a share of the first loss.
    ``forget_steps`` (tau): above 0; L_min rises by 1 / tau each step. ``smoothing``: in [0, 1); 0 for the gradient itself.
    ``lower_bound``: L is the loss above it.
    """

    fraction: Number = 0.15
    attainable: Number = 0.9
    first_lowest: Number = 0.75
    forget_steps: Number = 1000.0
    smoothing: Number = 0.9

    def check(self) -> None:
        super().check()
        require("fraction", self.fraction, "above 0 and finite", lambda v: all_of(v > 0, v < math.inf))
        for name in ("attainable", "first_lowest"):
            require(name, getattr(self, name), "in [0, 1]", lambda v: all_of(v >= 0, v <= 1))
        require("forget_steps", self.forget_steps, "above 0", lambda v: v > 0)
        require("smoothing", self.smoothing, "in [0, 1)", lambda v: all_of(v >= 0, v < 1))

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("mean_grad"),)

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (*super().declare_shared(options), State("lowest", math.inf))

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        height = self.height(slots, shared, options, loss)
        means = []
        for slot, grad in zip(slots, gradients(slots), strict=True):
            beta = slot.options["smoothing"]
            mean = slot.state["mean_grad"].lerp_(grad, 1 - beta)
            means.append(mean / (1 - beta ** slot.state["step"]))
        slope = slots[0].space.dot(means, line(slots)[0]).to(height.device)
        names = ("fraction", "attainable", "first_lowest", "forget_steps")
        rate, lowest = l4_step(height, shared["lowest"], slope, *(options[name] for name in names))
        shared["rate"].copy_(rate)
        shared["lowest"].copy_(lowest)
