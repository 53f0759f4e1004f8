"""What every rate rule answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from surefoot.optim.parts import Number, Part, Slot, State


@dataclass(frozen=True)
class Rule(Part):
    """How far to go along a direction.

    A rule that only looks at one weight or one tensor needs :meth:`choose` alone, and each parameter is finished before
    the next one's update is made. One whose rate depends on all parameters together declares what it keeps for them in
    :meth:`declare_shared` and is shown every slot in :meth:`measure` before anything moves.
    """

    probes: ClassVar[bool] = False
    """Whether it ever asks for the batch's loss at other weights."""
    looks_first: ClassVar[bool] = False
    """Whether what a probe shows decides the step itself (:meth:`judge` comes before anything moves), not the next one."""
    needs_loss: ClassVar[bool] = False
    """Whether a step without a loss is refused. Of a model whose gradient is not finite it then sees zeros, and the loss NaN:
    that, like every loss that is no number, is to make no step."""

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        """The state for all parameters together: one number for each model, float64. None: the rule is not global."""
        return ()

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        """Before anything moves, with every parameter's update at hand: adapt the ``shared`` state in place.

        ``options`` are the first group's, a number for each model being a tensor ``[K]`` as in ``shared``. ``loss`` is
        the step's loss, one number for each model in float64, or ``None`` if the caller gave none.
        """

    def probes_at(self, clock: int, options: Mapping[str, Any]) -> bool:
        """Whether step number ``clock`` needs the batch's loss at other weights too."""
        return False

    def ahead(self, slot: Slot) -> Tensor | None:
        """Where to probe: what to subtract from the weight as it is. ``None``: where the step itself goes."""
        return None

    def judge(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        before: Tensor,
        after: Tensor,
        eps: float,
    ) -> None:
        """After a probe: adapt the ``shared`` state by the batch's loss here and there, as ``loss`` above.

        ``eps`` is the relative rounding of the coarsest numbers that the loss has gone through: the weights', or those of
        autocast.
        """

    def retracts(self, options: Mapping[str, Any]) -> bool:
        """Whether a step may be shortened once its loss is known (:meth:`share`); costs a copy of the weights."""
        return False

    def share(self, slot: Slot) -> Number:
        """After :meth:`judge`: the share of the step to keep, one number for each model, spread over the weight."""
        raise NotImplementedError

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
