"""The L-algorithms' rule: Rprop's decision on a slow clock (Andersen 2024).

The weights move at every step, the rates once a window of steps, by comparing the way each weight went in the window
with the way it went in the one before. The papers count both clocks in patterns: ``window`` = L / M steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.optim.parts import WEIGHT, Number, Slot, State, require
from surefoot.optim.rules.rprop import SignRule, adapt

UNDO = ("exact", "none", "subtract")


def end_window(
    weight: Tensor,
    rate: Tensor,
    snapshot: Tensor,
    sign: Tensor,
    etas: tuple[Number, Number],
    step_sizes: tuple[Number, Number],
    undo: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a window; returns the weight to keep, the new rate and the new sign.

    With B = weight - snapshot, the window's displacement, and A the displacement kept from the window before (only its
    sign is stored):  sigma = sign(A B);  rate <- clip(rate * phi(sigma));  where sigma < 0 the whole window is undone,
    weight <- snapshot. What was undone leaves no displacement behind, so the next comparison there is neutral.
    ``undo="subtract"`` computes weight - B, as published, whose rounding residue votes; ``"none"`` keeps the weight.
    """
    displacement = weight - snapshot
    agreement = torch.sign(displacement) * sign
    rate = adapt(rate, agreement, etas, step_sizes)
    if undo == "none":
        kept = weight
    else:
        kept = torch.where(agreement < 0, snapshot if undo == "exact" else weight - displacement, weight)
    return kept, rate, torch.sign(kept - snapshot).to(sign.dtype)


@dataclass(frozen=True)
class Window(SignRule):
    """A rate for each weight, adapted at the end of every window of ``window`` steps (:func:`end_window`).

    Each parameter counts the steps in which it had a gradient. The first window only sets the first displacement, so
    the rates first change after two. ``undo``: "exact" (default), "none" or "subtract". State besides the direction's:
    the rate, a snapshot and an 8-bit sign, 9 bytes for a float32 weight.
    """

    window: int = 50
    undo: str = "exact"

    def check(self) -> None:
        super().check()
        require(
            "window", self.window, "a whole number of steps, at least 1", lambda v: v >= 1 and v == int(v)
        )
        require("undo", self.undo, f"one of {', '.join(UNDO)}", lambda v: v in UNDO)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (*super().declare(options), State("snapshot", WEIGHT))

    def choose(self, slot: Slot) -> Tensor:
        return slot.state["rate"]

    def settle(self, slot: Slot) -> Tensor | None:
        o, state = slot.options, slot.state
        if not self.adapts_at(state["step"], o):
            return None
        kept, rate, sign = end_window(
            slot.weight,
            state["rate"],
            state["snapshot"],
            state["sign"],
            o["etas"],
            o["step_sizes"],
            o["undo"],
        )
        # The first window has nothing to be compared with: its rates are not even clipped.
        slot.store(snapshot=kept, sign=sign, **({"rate": rate} if state["step"] > o["window"] else {}))
        return kept

    def adapts_at(self, step: int, options: Mapping[str, Any]) -> bool:
        return step % options["window"] == 0
