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

from surefoot.optim.parts import WEIGHT, Number, Slot, State, require, require_whole
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
    held: Tensor | bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The end of a window; returns the weight to keep, the new rate and the new sign.

    With B = weight - snapshot, the window's displacement, and A the displacement kept from the window before (only its
    sign is stored):  sigma = sign(A B);  rate <- clip(rate * phi(sigma));  where sigma < 0 the whole window is undone,
    weight <- snapshot. What was undone leaves no displacement behind, so the next comparison there is neutral.
    ``undo="subtract"`` computes weight - B, as published, whose rounding residue votes; ``"none"`` keeps the weight, and
    so does ``held`` where it is true.
    """
    displacement = weight - snapshot
    agreement = torch.sign(displacement) * sign
    rate = adapt(rate, agreement, etas, step_sizes)
    kept = weight
    if undo != "none" and held is not True:
        back = snapshot if undo == "exact" else weight - displacement
        kept = torch.where(agreement < 0 if held is False else (agreement < 0) & ~held, back, weight)
    return kept, rate, torch.sign(kept - snapshot).to(sign.dtype)


@dataclass(frozen=True)
class Window(SignRule):
    """A rate for each weight, adapted at the end of every window of ``window`` steps (:func:`end_window`).

    Each parameter counts the steps in which it had a gradient; a window that is changed in mid-run counts from the last
    window's end. The first window only sets the first displacement, so the rates first change after two. ``undo``:
    "exact" (default), "none" or "subtract"; where lr is 0 nothing moves, so nothing is undone. State besides the
    direction's: the rate, a snapshot and an 8-bit sign, 9 bytes for a float32 weight.
    """

    window: int = 50
    undo: str = "exact"

    def check(self) -> None:
        super().check()
        require_whole("window", self.window, 1, "steps")
        require("undo", self.undo, f"one of {', '.join(UNDO)}", lambda v: v in UNDO)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (
            *super().declare(options),
            State("snapshot", WEIGHT),
            State("window_began", 0, int),
            State("windows", 0, int),
        )

    def choose(self, slot: Slot) -> Tensor:
        return slot.state["rate"]

    def settle(self, slot: Slot) -> Tensor | None:
        o, state = slot.options, slot.state
        if state["step"] - state["window_began"] < o["window"]:
            return None
        kept, rate, sign = end_window(
            slot.weight,
            state["rate"],
            state["snapshot"],
            state["sign"],
            o["etas"],
            o["step_sizes"],
            o["undo"],
            held=o["lr"] == 0,
        )
        # The first window has nothing to be compared with: its rates are not even clipped.
        slot.store(snapshot=kept, sign=sign, **({"rate": rate} if state["windows"] else {}))
        state["window_began"] = state["step"]
        state["windows"] += 1
        slot.adapted = True
        return kept
