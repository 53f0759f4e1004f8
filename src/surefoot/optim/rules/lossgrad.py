"""LOSSGRAD: one step size, moved up or down by comparing the loss's real decrease with the predicted one.

Wojcik, Maziarka & Tabor 2018 (Schedae Informaticae 27, arXiv 1902.07656), for every direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from surefoot.optim.parts import Number, Slot, State, all_of, is_some, require, require_limits, require_whole
from surefoot.optim.precision import rounding
from surefoot.optim.rules.base import Rule

PROBES = ("step", "raw", "next")
SEARCH = 40
"""That many first steps are all probed where there is a ramp, whatever ``probe_every`` is."""


def rises(f0: Tensor, f1: Tensor, h: Tensor, slope: Tensor, threshold: Number, floor: Tensor) -> Tensor:
    """Whether the step size is to go up.

    f0 and f1 are the batch's loss before and after the step h u, and ``slope`` = <g, u> is what a linear loss would fall
    by for each unit of h. The step goes down iff f1 > f0 - (1 - threshold) h slope: without a division, so an uphill
    direction (slope < 0) goes down, and so does a loss that is no number. On a parabola with its minimum at h* the step
    then hovers about 2 threshold h*: 0.5 aims at the minimum, 1 at the edge of stability. Where the predicted change and the
    rise are below ``floor``, too small for the loss's precision to show, the step goes up.
    """
    predicted = h * slope
    enough = f1 <= f0 - (1 - threshold) * predicted
    hidden = (predicted.abs() < floor) & (f1 - f0 < floor)
    return enough | hidden


def polyak_cap(f0: Tensor, slope: Tensor, lower_bound: Number) -> Tensor:
    """The longest step whose end can be the minimum of a parabola that stays above ``lower_bound``.

    2 (f0 - lower_bound) / slope: a parabola a t^2 - slope t + f0 has its minimum f0 - slope^2 / 4a at slope / 2a, and the
    one that just touches the bound has the longest. Infinite for a direction that goes uphill.
    """
    room = (f0 - lower_bound).clamp(min=0)
    return torch.where(slope > 0, 2 * room / slope, math.inf)


def parabola_minimum(f0: Tensor, f1: Tensor, h: Tensor, slope: Tensor) -> Tensor:
    """Where the parabola through f0 (with that slope) and f1 at h is least: slope h^2 / (2 (f1 - f0 + h slope)).

    Of use where f1 > f0 with slope > 0, or f1 is infinite (then 0). NaN where f1 is.
    """
    return slope * h * h / (2 * (f1 - f0 + h * slope))


@dataclass(frozen=True)
class LossGrad(Rule):
    """One step size h for all parameters: h <- h up or h / down after each probe of the loss (:func:`rises`).

    The probe is the loss of the same batch, a step further, so every step needs the loss, and either a function that
    computes it again or a closure.

    ``initial_rate``: h at the start, above 0. ``up`` and ``down``: at least 1; equal ones make h the median over the
    batches of the best step, a larger ``down`` a lower quantile, log up / (log up + log down). ``threshold`` in (0, 1].
    ``ramp``: at least 1, a larger factor to begin with, so that an initial rate that is far off does not take hundreds of
    steps to leave: whenever h turns upwards its root takes its place, until ``up`` and ``down`` are larger. ``probe_every`` = k:
    a probe at every k-th step, with factors up^k and down^k; where there is a ramp (in a stack: where it is a tensor), the
    first 40 steps are all probed, with up and down. ``step_sizes``: smallest and largest h.

    ``probe``: "step" looks along the step that is taken; "raw" along the direction without its momentum (g, or Adam's
    g / (sqrt(v_hat) + eps)), with the momentum's gain divided out of the step; "next" takes the next step's loss for the
    probe, at no cost, and is right where every step has the same data (full batch) and nothing is random.

    Against spikes: ``lower_bound``, one of the loss (0 for cross-entropy and squares), keeps each step below
    :func:`polyak_cap`, which h itself does not see. ``retract`` takes back what was too much of a step after which the
    loss is higher, or no number: up to the parabola's minimum, or all of it; and during the ramp all of a step that
    lowers h, so that an initial rate that is too high does no harm. It costs a copy of the weights.

    ``horizon`` = T: the steps that are taken fade linearly, from h to h / T at step T and then to 0; the probe stays at h.
    ``None``: no fading.

    Parameter groups with their own lr move by their own multiple of the one h. A scheduler, or who changes ``group["lr"]`` by
    hand, shortens the step that is taken, not the one that is probed, so that h does not grow to undo it: what is probed is
    the lr that the group was given, ``group["given_lr"]``.

    No step is made, and h stays, where the loss or the gradient is not finite.
    """

    initial_rate: Number = 1e-4
    up: Number = 1.05
    down: Number = 1.05
    threshold: Number = 0.5
    ramp: Number = 1.0
    probe_every: int = 1
    step_sizes: tuple[float, float] = (1e-12, 1e6)
    probe: str = "step"
    lower_bound: Number = -math.inf
    retract: bool = False
    horizon: int | None = None

    needs_loss: ClassVar[bool] = True
    probes: ClassVar[bool] = True

    def check(self) -> None:
        require(
            "initial_rate", self.initial_rate, "above 0 and finite", lambda v: all_of(v > 0, v < math.inf)
        )
        require("up", self.up, "at least 1", lambda v: v >= 1)
        require("down", self.down, "at least 1", lambda v: v >= 1)
        require("threshold", self.threshold, "in (0, 1]", lambda v: all_of(v > 0, v <= 1))
        require("ramp", self.ramp, "at least 1 and finite", lambda v: all_of(v >= 1, v < math.inf))
        require_whole("probe_every", self.probe_every, 1)
        require("probe", self.probe, f"one of {', '.join(PROBES)}", lambda v: v in PROBES)
        if self.probe == "next":
            require("probe_every", self.probe_every, "1 with probe='next', which is free", lambda v: v == 1)
        require_limits("step_sizes", self.step_sizes)
        require("lower_bound", self.lower_bound, "below infinity", lambda v: v < math.inf)
        if self.retract:
            require("probe", self.probe, "'step' or 'raw' to retract steps by it", lambda v: v != "next")
        if self.horizon is not None:
            require_whole("horizon", self.horizon, 1, "steps, or None")

    def check_group(self, options: Mapping[str, Any]) -> None:
        if (
            options["probe"] == "next"
            and options["decoupled_weight_decay"]
            and is_some(options["weight_decay"])
        ):
            raise ValueError(
                "probe='next' cannot tell decoupled weight decay from the step; use coupled decay."
            )

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        names = ["steps", "last", "used", "taken", "slope", "decay_slope", "decay_bend"]
        names += ["before", "share"] * (options["probe"] == "next") + ["limit"] * bool(options["retract"])
        starts = State("step_size", options["initial_rate"]), State("factor", options["ramp"])
        return (*starts, *(State(name) for name in names))

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        h, steps = shared["step_size"], shared["steps"]
        loss = cast(Tensor, loss).to(h.device)
        known = torch.isfinite(loss)
        if options["probe"] == "next":
            eps = rounding(slot.parameter.dtype for slot in slots)
            h.copy_(self._judged(slots, shared, options, shared["before"], loss, eps))
            shared["before"].copy_(torch.where(known, loss, shared["before"]))
        space, grads = slots[0].space, [slot.loss_grad for slot in slots]
        along = [multiple(slot) * looks_along(slot) for slot in slots]
        slope = space.dot(grads, along).to(h.device)
        # Coupled decay adds w/2 |x|^2 to what is minimised but not to the loss: along x - h d it changes by
        # -h w <x, d> + h^2 w/2 |d|^2.
        decays = [slot.direction.coupled(slot.options) for slot in slots]
        if any(is_some(decay) for decay in decays):
            shrunk = [decay * d for decay, d in zip(decays, along, strict=True)]
            shared["decay_slope"].copy_(space.dot([slot.weight for slot in slots], shrunk))
            shared["decay_bend"].copy_(space.dot(shrunk, along) / 2)
        shared["slope"].copy_(slope + shared["decay_slope"])
        fade = faded(steps, options["horizon"])
        capped = h.fmin(polyak_cap(loss, shared["slope"], options["lower_bound"]))
        shared["used"].copy_(torch.where(known, capped, 0.0))
        shared["taken"].copy_(shared["used"] * fade)
        if options["probe"] == "next":
            taken = [slot.options["lr"] * looks_along(slot) for slot in slots]
            scheduled = any(map(is_scheduled, slots))
            share = space.dot(grads, taken).to(h.device) / slope if scheduled else torch.ones_like(slope)
            shared["share"].copy_(torch.where(slope == 0, 1.0, share) * fade)
        steps.add_(1)

    def choose(self, slot: Slot) -> Tensor:
        slot.adapted = True
        h = slot.spread(slot.shared["taken"])
        return h / slot.direction.gain(slot.options) if slot.options["probe"] == "raw" else h

    def probes_at(self, clock: int, options: Mapping[str, Any]) -> bool:
        searching = clock <= SEARCH and has_ramp(options)
        return options["probe"] != "next" and (searching or clock % options["probe_every"] == 0)

    def ahead(self, slot: Slot) -> Tensor | None:
        o = slot.options
        goes_there = o["probe"] == "step" and o["horizon"] is None and not is_scheduled(slot)
        if goes_there and not slot.direction.shrinks(o):
            return None
        return slot.spread(slot.shared["used"]) * multiple(slot) * looks_along(slot)

    def judge(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        before: Tensor,
        after: Tensor,
        eps: float,
    ) -> None:
        shared["step_size"].copy_(self._judged(slots, shared, options, before, after, eps))

    def _judged(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        before: Tensor,
        after: Tensor,
        eps: float,
    ) -> Tensor:
        """The step size after a look at the loss before and after a step; stores how much of it to keep."""
        h, slope = shared["step_size"], shared["slope"]
        before, after = before.to(h.device), after.to(h.device)
        # From a loss that is no number, as from none, there's nothing to learn.
        counts = (shared["steps"] > 0) & torch.isfinite(before)
        every: Number = options["probe_every"]
        if options["probe_every"] > 1 and has_ramp(options):
            every = 1 + (options["probe_every"] - 1) * (shared["steps"] > SEARCH).to(h.dtype)
        # On a parabola the share of the predicted decrease that is missing grows with the step: where a schedule took a
        # share of h, it's compared with that share of the threshold.
        share = shared.get("share", 1.0)
        looked = shared["used"] * share
        # Half the predicted change is compared with losses that are rounded, as are the weights they are made from:
        # four units in the last place.
        floor = 8 * eps * before.abs()
        after = after - looked * shared["decay_slope"] + looked * looked * shared["decay_bend"]
        risen = rises(before, after, looked, slope, options["threshold"] * share, floor)
        # The ramp: its factor is halved, in decades, at each turn upwards, and a fall goes back to where the last rise began.
        turns = risen & (shared["last"] < 0)
        factor = torch.where(turns, shared["factor"].sqrt(), shared["factor"])
        up, down = options["up"] ** every, options["down"] ** every
        searching = (factor > up) & (factor > down)
        least = parabola_minimum(before, after, looked, slope)
        if options["retract"]:
            worse = torch.where(after <= before, math.inf, least.nan_to_num(nan=0.0).clamp(min=0))
            shared["limit"].copy_(torch.where(searching & ~risen, 0.0, worse))
        shared["factor"].copy_(torch.where(counts, factor, shared["factor"]))
        shared["last"].copy_(torch.where(counts, torch.where(risen, 1.0, -1.0), 0.0))
        # In its strides too, no further than to where the rule would settle on the parabola that was seen.
        seen = (least > 0) & (looked * slope > floor)
        settled = torch.where(seen, 2 * options["threshold"] * least, math.inf)
        longer = torch.where(searching, (h * factor).minimum(settled.maximum(h * up)), h * up)
        # A capped step has told nothing of a longer one.
        longer = torch.where(shared["used"] < h, h, longer)
        shorter = torch.where(searching, h / factor, h / down)
        return torch.where(counts, torch.where(risen, longer, shorter).clamp(*options["step_sizes"]), h)

    def retracts(self, options: Mapping[str, Any]) -> bool:
        return options["retract"]

    def share(self, slot: Slot) -> Number:
        shared = slot.shared
        taken = slot.options["lr"] * slot.spread(shared["taken"])
        return (slot.spread(shared["limit"]) * multiple(slot) / taken).clamp(max=1)

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        if "step_size" not in state:
            return options["initial_rate"]
        return state["step_size"] * faded(state["steps"], options["horizon"])


def faded(steps: Tensor, horizon: int | None) -> Number:
    """The share of the rate left after that many steps: 1 - steps / horizon, and 0 beyond."""
    return 1.0 if horizon is None else (1 - steps / horizon).clamp(min=0)


def looks_along(slot: Slot) -> Tensor:
    """The direction that is probed."""
    return slot.direction.raw(slot) if slot.options["probe"] == "raw" else slot.update


def has_ramp(options: Mapping[str, Any]) -> bool:
    """Whether there is a ramp, in a stack for any of its models (a tensor is not looked into)."""
    return isinstance(options["ramp"], Tensor) or options["ramp"] > 1


def multiple(slot: Slot) -> Number:
    """What a parameter's step is multiplied by when it is probed: its group's lr as it was given."""
    return slot.options["given_lr"]


def is_scheduled(slot: Slot) -> bool:
    """Whether the step that is taken may differ from the one that is probed (tensors are not looked into)."""
    lr, given = slot.options["lr"], slot.options["given_lr"]
    return isinstance(lr, Tensor) or isinstance(given, Tensor) or lr != given
