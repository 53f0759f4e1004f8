"""What directions and rules have in common: options, declared state, and the view of one parameter they work on.

The base of all directions is here too, since that view shows a rule the direction that it is combined with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from surefoot.optim.space import Space

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
        for option in fields(self):
            value = getattr(self, option.name)
            if isinstance(value, list):  # a pair, as JSON gives it back
                object.__setattr__(self, option.name, tuple(value))
            if type(option.default) is bool:
                require(option.name, value, "True or False", lambda v: isinstance(v, bool))
        self.check()

    def check(self) -> None:
        """Raise ``ValueError``, naming the option and its range, where an option is out of range."""

    def check_group(self, options: Mapping[str, Any]) -> None:
        """Raise ``ValueError`` where a group's options, those of the other parts too, do not go together."""

    def options(self) -> dict[str, Any]:
        """The options with their values, by name."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

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


def is_some(number: Number) -> bool:
    """Whether an option has an effect, not being 0 (a tensor is not looked into: that would wait for the device)."""
    return isinstance(number, Tensor) or number != 0


@dataclass(frozen=True)
class Direction(Part):
    """Base of all directions. ``weight_decay``: at least 0."""

    weight_decay: Number = field(default=0.0, kw_only=True)
    decoupled_weight_decay: bool = field(default=False, kw_only=True)

    def check(self) -> None:
        require("weight_decay", self.weight_decay, "at least 0", lambda v: v >= 0)

    def couple(self, grad: Tensor, weight: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The gradient with coupled weight decay."""
        decay = self.coupled(options)
        return grad + decay * weight if is_some(decay) else grad

    def coupled(self, options: Mapping[str, Any]) -> Number:
        """The coefficient of coupled weight decay."""
        return 0.0 if options["decoupled_weight_decay"] else options["weight_decay"]

    def shrink(self, update: Tensor, weight: Tensor, options: Mapping[str, Any]) -> Tensor:
        """The update with decoupled weight decay."""
        return update + options["weight_decay"] * weight if self.shrinks(options) else update

    def shrinks(self, options: Mapping[str, Any]) -> bool:
        """Whether there is decoupled weight decay."""
        return is_some(options["weight_decay"]) and options["decoupled_weight_decay"]

    def propose(self, slot: Slot) -> Tensor:
        """The update ``u`` for one parameter; stores the direction's own state."""
        raise NotImplementedError

    def raw(self, slot: Slot) -> Tensor:
        """The update without its momentum, after :meth:`propose`: of one step's gradient alone."""
        return slot.update

    def gain(self, options: Mapping[str, Any]) -> Number:
        """How many times :meth:`raw` the update grows to under a constant gradient."""
        return 1.0
