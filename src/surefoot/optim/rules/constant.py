"""One fixed rate: what every other rule is compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surefoot.optim.parts import Number, Slot, require
from surefoot.optim.rules.base import Rule


@dataclass(frozen=True)
class Constant(Rule):
    """r = ``rate`` (at least 0) at every step; schedules go through the group's ``lr``, which multiplies it."""

    rate: Number = 1e-3

    def check(self) -> None:
        require("rate", self.rate, "at least 0", lambda v: v >= 0)

    def choose(self, slot: Slot) -> Number:
        slot.adapted = (
            True  # not the rate, but a scheduler may have moved lr: tracked rates have an entry a step
        )
        return slot.options["rate"]

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        return options["rate"]
