"""What a direction and a rule have in common: options, declared state, and the view of one parameter they work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from surefoot.optim.space import Space

if TYPE_CHECKING:
    from surefoot.optim.directions import Direction

Number = float | Tensor
"""A hyper-parameter: a number, or in a stack of K models a tensor with one for each, shape ``[K]``."""

WEIGHT = "weight"
"""As a state's initial value: a copy of the weight itself."""


@dataclass(frozen=True)
class State:
    """One declared state tensor: of each parameter and of its shape, or shared by all of them and one for each model."""

    name: str
    init: Number | str = 0.0
    """The initial value: a number, one for each model, or :data:`WEIGHT`."""
    dtype: torch.dtype | type[int] | None = None
    """``None``: the dtype that the arithmetic is done in (the parameter's, but at least float32); ``int``: one whole
    number for the parameter, on the host."""
    per_model: bool = False
    """Of each parameter, but one number for each model in place of one for each weight."""


@dataclass
class Slot:
    """One parameter at one step, as directions and rules see it."""

    parameter: Tensor
    """The parameter itself, for its identity; its value is ``weight``."""
    weight: Tensor
    """The parameter's value, in the dtype of the arithmetic."""
    grad: Tensor
    """The gradient of what is minimised, clipped, and then coupled weight decay added; shape and dtype of ``weight``."""
    loss_grad: Tensor
    """The loss's own gradient: neither clipped nor with weight decay."""
    state: dict[str, Any]
    """Declared tensors by name, and ``step``: how many gradients this parameter has been given, this one included."""
    options: Mapping[str, Any]
    """The group's options; in a stack, one for each model is shaped to broadcast against ``weight``."""
    space: Space
    index: int
    """The parameter's position among all of the optimizer's."""
    shared: dict[str, Tensor]
    """What the rule keeps for all parameters together, one number for each model, in float64."""
    direction: Direction
    update: Tensor
    """What the direction proposes; the weight goes against it."""
    adapted: bool = False
    """Set by the rule in a step that may change the parameter's later rates: then tracked rates are recorded."""

    def store(self, **new: Tensor) -> None:
        """Write new values into the declared state, in place."""
        for name, value in new.items():
            self.state[name].copy_(value)

    def spread(self, number: Tensor) -> Tensor:
        """One number for each model, shaped to broadcast against the weight and in its dtype."""
        return self.space.spread(number, self.weight).to(self.weight.device, self.weight.dtype)


@dataclass(frozen=True)
class Part:
    """Base of directions and rules: a frozen dataclass whose fields are options that a parameter group may override."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):  # a pair, as JSON gives it back
                object.__setattr__(self, field.name, tuple(value))
            if type(field.default) is bool:
                require(field.name, value, "True or False", lambda v: isinstance(v, bool))
        self.check()

    def check(self) -> None:
        """Raise ``ValueError``, naming the option and its range, where an option is out of range."""

    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where a group's options, those of the other parts too, do not go together."""

    def options(self) -> dict[str, Any]:
        """The options with their values, by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        """The state of each parameter in a group with these options."""
        return ()

    def needs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Names of state that another part has to declare for this one to work."""
        return ()


def require(name: str, value: Any, allowed: str, test: Callable[[Any], Any]) -> None:
    """Raise ``ValueError`` in one sentence unless ``test(value)`` holds; for a tensor, of each of its entries."""
    try:
        holds = test(value)
        holds = bool(holds.all()) if isinstance(holds, Tensor) else bool(holds)
    except (TypeError, RuntimeError, ArithmeticError):
        holds = (
            False  # of another type, a tensor where one number is wanted, or what the test divides by is 0
        )
    if not holds:
        raise ValueError(f"{name} must be {allowed}, not {value!r}.")


def require_whole(name: str, value: Any, least: int, unit: str = "") -> None:
    """:func:`require` for a whole number of at least ``least``."""
    allowed = f"a whole number{f' of {unit}' if unit else ''}, at least {least}"
    require(name, value, allowed, lambda v: not isinstance(v, (bool, Tensor)) and v >= least and v == int(v))


def require_pair(name: str, value: Any, allowed: str, test: Callable[[Any, Any], Any]) -> None:
    """:func:`require` for an option that is a pair, such as ``etas``."""

    def holds(pair: Any) -> Any:
        return isinstance(pair, tuple) and len(pair) == 2 and test(*pair)

    require(name, value, f"a pair with {allowed}", holds)


def require_limits(name: str, value: Any) -> None:
    """:func:`require` for the smallest and the largest value of something positive."""
    allowed = f"0 < {name}[0] <= {name}[1]"
    require_pair(name, value, allowed, lambda low, high: all_of(low > 0, low <= high))


def all_of(*conditions: Any) -> Any:
    """Whether all conditions hold; for tensors, entry by entry."""
    result: Any = True
    for condition in conditions:
        both = isinstance(result, Tensor) or isinstance(condition, Tensor)
        result = (
            torch.logical_and(torch.as_tensor(result), torch.as_tensor(condition))
            if both
            else result and condition
        )
    return result
