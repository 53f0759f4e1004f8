"""What every rate rule answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surefoot.optim.parts import Number, Part, Slot


@dataclass(frozen=True)
class Rule(Part):
    """How far to go along a direction."""

    def choose(self, slot: Slot) -> Number:
        """The rate of this step, from what is known before the weight moves; stores the rule's own state.

        Here or in :meth:`settle`, ``slot.adapted`` is set in a step that may change later rates.
        """
        raise NotImplementedError

    def settle(self, slot: Slot) -> Tensor | None:
        """After the weight has moved: adapt the rate for later steps. A tensor returned replaces the weight."""
        return None

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        """The rate as it stands, for reading only; ``state`` is empty before a parameter's first step."""
        raise NotImplementedError
