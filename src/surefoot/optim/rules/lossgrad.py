"""LOSSGRAD: one step size, moved up or down by comparing the loss's real decrease with the predicted one.

Wojcik, Maziarka & Tabor 2018 (Schedae Informaticae 27, arXiv 1902.07656), for every direction.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surefoot.optim.directions import is_some
from surefoot.optim.parts import Number, Slot, State, all_of, require, require_limits, require_whole
from surefoot.optim.rules.base import Rule

PROBES = ("step", "raw")


def rises(f0: Tensor, f1: Tensor, h: Tensor, slope: Tensor, threshold: Number, floor: Tensor) -> Tensor:
    """Whether the step size is to go up.

    f0 and f1 are the batch's loss before and after the step h u, and ``slope`` = <g, u> is what a linear loss would fall
    by for each unit of h. The step goes down iff f1 > f0 - (1 - threshold) h slope: without a division, so an uphill
    direction (slope < 0) goes down, and so does a loss that is no number. On a parabola with its minimum at h* the step
    then hovers about 2 threshold h*: 0.5 aims at the minimum, 1 at the edge of stability. Where the predicted change is
    below ``floor``, too small for the loss's precision to show, the step goes up.
    """
    predicted = h * slope
    enough = f1 <= f0 - (1 - threshold) * predicted
    hidden = (predicted.abs() < floor) & torch.isfinite(f1 - f0)
    return enough | hidden


@dataclass(frozen=True)
class LossGrad(Rule):
    """One step size h for all parameters: h <- h up or h / down after each probe of the loss (:func:`rises`).

    The probe is the loss of the same batch, a step further, so every step needs the loss, and either a function that
    computes it again or a closure.

    ``initial_rate``: h at the start, above 0. ``up`` and ``down``: at least 1; equal ones make h the median over the
    batches of the best step, a larger ``down`` a lower quantile, log up / (log up + log down). ``threshold`` in (0, 1].
    ``probe_every`` = k: a probe at every k-th step, with factors up^k and down^k. ``step_sizes``: smallest and largest
    h. ``probe``: "step" looks along the step that is taken, "raw" along the direction without its momentum (g, or
    Adam's g / (sqrt(v_hat) + eps)), with the momentum's gain divided out of the step.

    Parameter groups with their own lr move by their own multiple of the one h. A scheduler shortens the step that is
    taken, not the one that is probed, so that h does not grow to undo the schedule: where a group has an ``initial_lr``
    (schedulers write it), that is its multiple.
    """

    initial_rate: Number = 1e-4
    up: Number = 1.05
    down: Number = 1.05
    threshold: Number = 0.5
    probe_every: int = 1
    step_sizes: tuple[float, float] = (1e-12, 1e6)
    probe: str = "step"

    needs_loss: ClassVar[bool] = True
    probes: ClassVar[bool] = True

    def check(self) -> None:
        require("initial_rate", self.initial_rate, "above 0", lambda v: v > 0)
        require("up", self.up, "at least 1", lambda v: v >= 1)
        require("down", self.down, "at least 1", lambda v: v >= 1)
        require("threshold", self.threshold, "in (0, 1]", lambda v: all_of(v > 0, v <= 1))
        require_whole("probe_every", self.probe_every, 1)
        require("probe", self.probe, f"one of {', '.join(PROBES)}", lambda v: v in PROBES)
        require_limits("step_sizes", self.step_sizes)

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (
            State("step_size", options["initial_rate"]),
            State("slope"),
            State("decay_slope"),
            State("decay_bend"),
        )

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        space, along = slots[0].space, [multiple(slot) * looks_along(slot) for slot in slots]
        shared["slope"].copy_(space.dot([slot.grad for slot in slots], along))
        # Coupled decay adds w/2 |x|^2 to what is minimised but not to the loss: along x - h d it changes by
        # -h w <x, d> + h^2 w/2 |d|^2.
        decays = [slot.direction.coupled(slot.options) for slot in slots]
        if any(is_some(decay) for decay in decays):
            shrunk = [decay * d for decay, d in zip(decays, along, strict=True)]
            shared["decay_slope"].copy_(space.dot([slot.weight for slot in slots], shrunk))
            shared["decay_bend"].copy_(space.dot(shrunk, along) / 2)

    def choose(self, slot: Slot) -> Tensor:
        slot.adapted = True
        h = slot.spread(slot.shared["step_size"])
        return h / slot.direction.gain(slot.options) if slot.options["probe"] == "raw" else h

    def probes_at(self, clock: int, options: Mapping[str, Any]) -> bool:
        return clock % options["probe_every"] == 0

    def ahead(self, slot: Slot) -> Tensor | None:
        if (
            slot.options["probe"] == "step"
            and not is_scheduled(slot)
            and not slot.direction.shrinks(slot.options)
        ):
            return None
        return slot.spread(slot.shared["step_size"]) * multiple(slot) * looks_along(slot)

    def judge(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        before: Tensor,
        after: Tensor,
    ) -> None:
        h, device, steps = shared["step_size"], shared["step_size"].device, options["probe_every"]
        before, after = before.to(device), after.to(device)
        # Half the predicted change is compared with losses that are rounded, as are the weights they are made from:
        # four units in the last place.
        floor = 8 * torch.finfo(slots[0].parameter.dtype).eps * before.abs()
        after = after - h * shared["decay_slope"] + h * h * shared["decay_bend"]
        risen = rises(before, after, h, shared["slope"], options["threshold"], floor)
        h.copy_(
            torch.where(risen, h * options["up"] ** steps, h / options["down"] ** steps).clamp(
                *options["step_sizes"]
            )
        )

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        return state.get("step_size", options["initial_rate"])


def looks_along(slot: Slot) -> Tensor:
    """The direction that is probed."""
    return slot.update if slot.options["probe"] == "step" else slot.direction.raw(slot)


def multiple(slot: Slot) -> Number:
    """What a parameter's step is multiplied by when it is probed: its group's lr, before any schedule."""
    return slot.options.get("initial_lr", slot.options["lr"])


def is_scheduled(slot: Slot) -> bool:
    """Whether the step that is taken may differ from the one that is probed."""
    lr = slot.options["lr"]
    first = slot.options.get("initial_lr", lr)
    return first is not lr and (isinstance(lr, Tensor) or isinstance(first, Tensor) or first != lr)
