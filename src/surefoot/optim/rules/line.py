"""The line that a step goes along, and one rate for all parameters: what the loss-based rules have in common.

What is minimised is F, the loss with the penalty of coupled weight decay. With t the rate, a step goes along

    x - t d,   d = (lr / largest lr) u for each parameter,

so of the groups' own lr only the ratios belong to the line; the largest multiplies the step along it, whatever the rule
found, and so does a scheduler. Decoupled weight decay is no part of the line.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from surefoot.optim.parts import Number, Slot, State, is_some
from surefoot.optim.rules.base import Rule


@dataclass(frozen=True)
class OneRate(Rule):
    """Base of rules with one rate for all parameters, kept in ``shared["rate"]`` and found before anything moves."""

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("rate", options.get("initial_rate", 0.0)),)

    def choose(self, slot: Slot) -> Tensor:
        slot.adapted = True
        return slot.spread(slot.shared["rate"])

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        """The last step's rate; before the first step the initial rate, or 0 where the first step will find it."""
        return state.get("rate", options.get("initial_rate", 0.0))


def line(slots: Sequence[Slot]) -> tuple[list[Tensor], Number]:
    """The direction d, a tensor for each parameter, and the largest lr (1 where that is 0), one for each model."""
    space, device = slots[0].space, slots[0].weight.device
    lrs = [space.gather({"lr": slot.options["lr"]})["lr"] for slot in slots]
    if any(isinstance(lr, Tensor) for lr in lrs):
        unlike = {id(lr): torch.as_tensor(lr, dtype=torch.float64) for lr in lrs}  # a group has one
        largest = reduce(torch.maximum, unlike.values())
        largest = torch.where(largest > 0, largest, 1.0)
        largest = largest.to(device) if largest.ndim else largest
        ratios = [slot.options["lr"] / space.spread(largest, slot.weight) for slot in slots]
    else:
        largest = max(lrs) or 1.0
        ratios = [lr / largest for lr in lrs]
    own = zip(slots, ratios, strict=True)
    return [
        ratio * slot.update if isinstance(ratio, Tensor) or ratio != 1 else slot.update for slot, ratio in own
    ], largest


def gradients(slots: Sequence[Slot]) -> list[Tensor]:
    """The gradient of F for each parameter, not clipped."""
    return [slot.direction.couple(slot.loss_grad, slot.weight, slot.options) for slot in slots]


def penalty(slots: Sequence[Slot], weights: Iterable[Tensor]) -> Number:
    """F less the loss at these weights: the sum of weight_decay / 2 x^2, one for each model."""
    decays = [slot.direction.coupled(slot.options) for slot in slots]
    if not any(map(is_some, decays)):
        return 0.0
    own = zip(decays, weights, strict=True)
    return slots[0].space.sum(decay * weight.to(torch.float64).square() for decay, weight in own) / 2
