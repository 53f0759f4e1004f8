"""To the minimum of a parabola: through the loss here, its slope along the step, and the loss at one more point.

PAL (Mutschler & Zell, arXiv 1903.11991) probes at a fixed distance; QLAB (Fu & Wu, arXiv 2302.00252) at the last step's
length. Both look before they step: one more forward pass, and what it shows decides this very step. The same parabola is
behind :mod:`surefoot.optim.rules.lossgrad`, which only asks on which side of the minimum the step ended.

Along the line x - t d (:mod:`surefoot.optim.rules.line`), with f0 here, f1 at t = h and the slope s = <g, d>,

    q(t) = f0 - s t + a t^2,   a = (f1 - f0 + h s) / h^2,   least at s / 2a if a > 0.

On a loss that is a parabola along the line both go to its minimum exactly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from surefoot.optim.parts import Number, Slot, State, all_of, require, require_limits
from surefoot.optim.rules.line import OneRate, gradients, line, penalty
from surefoot.optim.rules.lossgrad import parabola_minimum


def pal_step(
    f0: Tensor, f1: Tensor, slope: Tensor, probe_length: Number, stretch: Number, longest_step: Number
) -> Tensor:
    """PAL's distance along the normalised direction: min(stretch s / 2a, longest_step) if s > 0 and a > 0.

    Where the loss does not bend upwards (a <= 0), min(probe_length, longest_step); uphill (s <= 0), or where a loss is no
    number, 0.
    """
    rise = f1 - f0 + probe_length * slope
    best = stretch * parabola_minimum(f0, f1, cast(Tensor, probe_length), slope)
    distance = torch.where(rise > 0, best, probe_length).clamp(max=longest_step)
    return torch.where((slope > 0) & torch.isfinite(rise), distance, 0.0)


def qlab_step(
    f0: Tensor,
    f1: Tensor,
    slope: Tensor,
    h: Tensor,
    growth: Number,
    step_sizes: tuple[Number, Number],
    floor: Tensor,
) -> tuple[Tensor, Tensor]:
    """QLAB's rate, and the h of the next probe: both h* = s h^2 / (2 (f1 - f0 + h s)), at most ``growth`` h.

    Where the loss does not bend upwards, growth h; so too where all change is below ``floor``, too small for the loss's
    precision to show (h* would be h / 2 there, for ever). Uphill, s <= 0: no step, and h stays. Where a loss is no number:
    no step, and h / growth.
    """
    rise = f1 - f0 + h * slope
    known, downhill = torch.isfinite(rise), slope > 0
    hidden = ((f1 - f0).abs() < floor) & (h * slope < floor)
    best = torch.where((rise > 0) & ~hidden, parabola_minimum(f0, f1, h, slope), math.inf).minimum(growth * h)
    new = torch.where(known, torch.where(downhill, best, h), h / growth)
    smallest, largest = step_sizes
    new = new.clamp(min=smallest).clamp(max=largest)
    return torch.where(known & downhill, new, 0.0), new


@dataclass(frozen=True)
class Parabola(OneRate):
    """What both have in common: the probe, and F at both ends of it."""

    needs_loss: ClassVar[bool] = True
    probes: ClassVar[bool] = True
    looks_first: ClassVar[bool] = True

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        # "reach": the probe's t over the largest lr, which times lr and u is how far it goes.
        return (*super().declare_shared(options), State("slope"), State("reach"))

    def probes_at(self, clock: int, options: Mapping[str, Any]) -> bool:
        return True

    def ahead(self, slot: Slot) -> Tensor:
        return slot.spread(slot.shared["reach"]) * slot.options["lr"] * slot.update

    def ends(
        self, slots: Sequence[Slot], before: Tensor, after: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """F at the weights as they are, and at the probe's."""
        here = (slot.weight for slot in slots)
        there = (slot.weight - self.ahead(slot) for slot in slots)
        return before.to(device) + penalty(slots, here), after.to(device) + penalty(slots, there)


@dataclass(frozen=True)
class PAL(Parabola):
    """PAL: the rate times the norm of d is :func:`pal_step`, found by a probe at ``probe_length`` along d / |d|.

    ``probe_length`` (mu): above 0, in units of the norm of all weights together, so it is not free of scale; the authors
    advise 0.1 to 1. ``longest_step`` (s_max): above 0, 1 to 10. ``stretch`` (alpha): above 0, 1.2 to 1.7, since steps a little
    longer than to the minimum did better. The direction of the paper is ``Momentum(0.4)``, or SGD.
    """

    probe_length: Number = 1.0
    longest_step: Number = 3.16
    stretch: Number = 1 / 0.6

    def check(self) -> None:
        for name in ("probe_length", "longest_step", "stretch"):
            require(name, getattr(self, name), "above 0 and finite", lambda v: all_of(v > 0, v < math.inf))

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (*super().declare_shared(options), State("norm"))

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        d, largest = line(slots)
        space, norm = slots[0].space, shared["norm"]
        norm.copy_(space.dot(d, d).sqrt())
        per_norm = torch.where(norm > 0, 1 / norm, 0.0)
        shared["slope"].copy_(space.dot(gradients(slots), d).to(norm.device) * per_norm)
        shared["reach"].copy_(options["probe_length"] / largest * per_norm)

    def judge(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        before: Tensor,
        after: Tensor,
        eps: float,
    ) -> None:
        norm = shared["norm"]
        f0, f1 = self.ends(slots, before, after, norm.device)
        names = ("probe_length", "stretch", "longest_step")
        distance = pal_step(f0, f1, shared["slope"], *(options[name] for name in names))
        shared["rate"].copy_(torch.where(norm > 0, distance / norm, 0.0))


@dataclass(frozen=True)
class QLAB(Parabola):
    """QLAB: the rate is the minimum of the parabola that was probed at the last rate h (:func:`qlab_step`).

    ``initial_rate``: h at the start, above 0; hardly matters. ``growth``: above 1 and finite, the largest factor from one step
    to the next; ours, as are ``step_sizes``, the smallest and the largest h.
    """

    initial_rate: Number = 1e-4
    growth: Number = 2.0
    step_sizes: tuple[Number, Number] = (1e-12, 1e6)

    def check(self) -> None:
        require(
            "initial_rate", self.initial_rate, "above 0 and finite", lambda v: all_of(v > 0, v < math.inf)
        )
        require("growth", self.growth, "above 1 and finite", lambda v: all_of(v > 1, v < math.inf))
        require_limits("step_sizes", self.step_sizes)

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (*super().declare_shared(options), State("step_size", options["initial_rate"]))

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        d, largest = line(slots)
        shared["slope"].copy_(slots[0].space.dot(gradients(slots), d))
        shared["reach"].copy_(shared["step_size"] / largest)

    def judge(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        before: Tensor,
        after: Tensor,
        eps: float,
    ) -> None:
        h = shared["step_size"]
        f0, f1 = self.ends(slots, before, after, h.device)
        floor = 8 * eps * f0.abs()  # four units in the last place, each loss
        rate, new = qlab_step(f0, f1, shared["slope"], h, options["growth"], options["step_sizes"], floor)
        shared["rate"].copy_(rate)
        h.copy_(new)
