"""The optimizer: a direction, a rule, and the one place where weights are written.

u  = direction(g, state)        which way
r  = rule(...)                  how far: one number, or one for each weight
p <- p - lr * r * u
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from surefoot.optim.directions import Direction
from surefoot.optim.parts import WEIGHT, Number, Slot, State, require
from surefoot.optim.precision import is_short, narrow_, widen, working_dtype
from surefoot.optim.rules.base import Rule
from surefoot.optim.space import Space

_FOREIGN_OPTIONS = frozenset(
    {"params", "param_names", "name", "differentiable"}
    # written into groups by torch's schedulers
    | {"initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum"}
)


@dataclass(frozen=True)
class Rates:
    """The effective rates (``lr`` included) of all weights at one moment."""

    mean: float
    std: float
    """Unbiased (n - 1)."""
    min: float
    max: float
    histogram: tuple[int, ...]
    """Number of weights in each bin; the bins are even in log10 of the rate."""
    edges: tuple[float, ...]
    """The bins' edges, one more than there are bins."""


class SelfTuning(Optimizer):
    r"""Any direction times any rate rule: :math:`p \leftarrow p - \mathrm{lr} \cdot r \cdot u`.

    Args:
        params: parameters, named parameters or parameter groups, as for any ``torch.optim`` optimizer. A group may
            override every option of the direction and the rule.
        direction: which way, from :mod:`surefoot.optim.directions`.
        rule: how far, from :mod:`surefoot.optim.rules`.
        lr: a number or a 0-d tensor that multiplies every rate (default 1.0). This, and only this, is what
            ``group["lr"]`` holds and what a scheduler moves; a logger that reads it logs the multiplier. The rates
            themselves are what :meth:`rates` gives. ``lr=0`` moves nothing.
        maximize: go up instead of down.
        track_rates: keep ``lr_mean``, ``lr_std`` and ``lr_counter`` (without waiting for the device).
        models: ``None``, or K where every parameter is a stack of K models along its first axis. Every option that is a
            number may then be a tensor ``[K]``, and nothing that one model does is seen by another.

    The state of each parameter is flat, is declared by the direction and the rule, and is loaded in the dtype that it
    was declared with. 16-bit parameters are stepped in float32 and keep what they cannot hold in ``compensation``.

    Raises:
        ValueError: for an option out of range, an option that nothing reads, a complex parameter, or in a stack a
            parameter without the leading axis; from :meth:`step`, before anything has moved, for a sparse gradient.

    Example::

        SelfTuning(model.parameters(), directions.Adam(), rules.Window(initial_rate=1e-3, window=600))
    """

    def __init__(
        self,
        params: ParamsT,
        direction: Direction,
        rule: Rule,
        lr: Number = 1.0,
        *,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        self.direction = direction
        self.rule = rule
        self.space = Space(models)
        self.track_rates = track_rates
        shared = direction.options().keys() & rule.options().keys()
        if shared:
            raise ValueError(f"direction and rule both have an option named {sorted(shared)[0]!r}.")
        super().__init__(params, {"lr": lr, **direction.options(), **rule.options(), "maximize": maximize})

    # ------------------------------------------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Move every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it, as for any torch optimizer.

        Returns:
            What the closure returned.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moving = [(i, p, group) for i, (p, group) in enumerate(self._members()) if p.grad is not None]
        for _, p, _ in moving:
            if cast(Tensor, p.grad).is_sparse:
                raise ValueError("sparse gradients are not supported; make the embedding with sparse=False.")
        for _, p, group in moving:
            if "step" not in self.state[p]:
                self._begin(p, group)
        if self.track_rates and moving and not self.lr_counter:
            self._record()
        adapted = False
        for index, p, group in moving:
            self._move(index, p, group)
            adapted |= self.rule.adapts_at(self.state[p]["step"], group)
        if self.track_rates and adapted:
            self._record()
        return loss

    def _move(self, index: int, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        state["step"] += 1
        weight = self._value(p)
        options = self.space.options(group, weight)
        grad = cast(Tensor, p.grad).to(weight.dtype)
        if group["maximize"]:
            grad = -grad
        grad = self.direction.couple(grad, weight, options)
        slot = Slot(weight, grad, state, options, self.space, index, update=grad)
        slot.update = self.direction.propose(slot)
        rate = self.rule.choose(slot)
        update = self.direction.shrink(slot.update, weight, options)
        write_back_(weight, update, options["lr"], rate)
        if is_short(p):
            narrow_(p, state["compensation"], weight)
            slot.weight = self._value(p)
        kept = self.rule.settle(slot)
        if kept is None:
            return
        if is_short(p):
            narrow_(p, state["compensation"], kept)
        else:
            p.copy_(kept)

    def _members(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group

    def _value(self, p: Tensor) -> Tensor:
        """The parameter itself, or for a short one its value in float32."""
        return widen(p, self.state[p]["compensation"]) if is_short(p) else p.detach()

    # ------------------------------------------------------------------------------------------------- the state

    def _declared(self, p: Tensor, group: dict[str, Any]) -> tuple[State, ...]:
        compensation = (State("compensation", 0.0, p.dtype),) if is_short(p) else ()
        return (*self.direction.declare(group), *self.rule.declare(group), *compensation)

    def _begin(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        for declared in self._declared(p, group):
            dtype = declared.dtype or working_dtype(p)
            init = p if declared.init is WEIGHT else self.space.spread(declared.init, p)
            tensor = torch.empty_like(p, dtype=dtype, requires_grad=False)
            state[declared.name] = tensor.copy_(init) if isinstance(init, Tensor) else tensor.fill_(init)
        state["step"] = 0

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, in the declared dtypes and on the parameters' devices; shares no tensor.

        Raises:
            ValueError: where the state is not what this direction and rule declare, or does not fit the parameters.
        """
        found: dict[Any, Any] = {}

        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # torch would cast every tensor to its parameter's dtype: it is given the groups alone.
            found.update(state_dict["state"])
            self._refuse_foreign(state_dict)
            return {**state_dict, "state": {}}

        def restore(_: Optimizer) -> None:
            for index, (p, group) in enumerate(self._members()):
                for name, default in self.defaults.items():
                    group.setdefault(name, default)
                if index in found:
                    self.state[p] = self._restored(p, group, found[index])

        # Last of the hooks before and first of the hooks after, so that the user's own see whole states.
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _refuse_foreign(self, state_dict: dict[str, Any]) -> None:
        """Refuse, before anything is changed, a state that was not written by this direction and rule."""
        members = list(self._members())
        groups = [group for group in state_dict["param_groups"] for _ in group["params"]]
        if len(groups) != len(members):
            return  # torch's own message says it
        for index, saved in state_dict["state"].items():
            p, _ = members[index]
            if "step" not in saved:
                continue
            group = {**self.defaults, **groups[index]}
            expected = {declared.name for declared in self._declared(p, group)} | {"step"}
            present = set(saved) - {"lr_history", "lr_counter"}
            if present != expected:
                odd = ", ".join(sorted(present ^ expected))
                raise ValueError(f"the loaded state is not this optimizer's: it differs in {odd}.")
            for name in sorted(expected - {"step"}):
                if saved[name].shape != p.shape:
                    raise ValueError(
                        f"the loaded state does not fit: {name} of parameter {index} has shape "
                        f"{tuple(saved[name].shape)}, the parameter {tuple(p.shape)}."
                    )

    def _restored(self, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        dtypes = {declared.name: declared.dtype or working_dtype(p) for declared in self._declared(p, group)}
        dtypes["lr_history"] = torch.float64
        return {
            name: value.detach().to(p.device, dtypes[name], copy=True) if name in dtypes else int(value)
            for name, value in saved.items()
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked like the constructor's, and ones that nothing reads are refused."""
        known = self.defaults.keys() | _FOREIGN_OPTIONS
        for name in param_group.keys() - known:
            nearest = difflib.get_close_matches(name, sorted(known), 1)
            hint = (
                f"did you mean {nearest[0]!r}?"
                if nearest
                else f"it is none of {', '.join(sorted(self.defaults))}."
            )
            raise ValueError(f"no part of this optimizer reads the group option {name!r}: {hint}")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any]) -> None:
        for part in (self.direction, self.rule):
            replace(part, **{name: group[name] for name in part.options()})
        require("lr", group["lr"], "at least 0", lambda v: v >= 0)
        for p in group["params"]:
            if p.is_complex():
                raise ValueError("complex parameters are not supported; optimize torch.view_as_real of them.")
            if not self.space.admits(p):
                raise ValueError(
                    f"in a stack of {self.space.models} models every parameter has a leading axis of that length, "
                    f"not shape {tuple(p.shape)}."
                )

    def __getstate__(self) -> dict[str, Any]:
        # torch keeps only defaults, state and groups: a copy would have no direction.
        return {
            **super().__getstate__(),
            "direction": self.direction,
            "rule": self.rule,
            "space": self.space,
            "track_rates": self.track_rates,
        }

    # ------------------------------------------------------------------------------------------------- the rates

    def _effective_rates(self) -> list[Tensor]:
        """For each parameter (after the first step: each that has had a gradient) lr times rate, of its shape."""
        begun = any("step" in self.state[p] for p, _ in self._members() if p in self.state)
        rates = []
        for p, group in self._members():
            state = self.state.get(p, {})
            if ("step" in state) if begun else p.requires_grad:
                options = self.space.options(group, p)
                rate = options["lr"] * self.rule.current(state, options)
                rates.append(torch.as_tensor(rate, dtype=working_dtype(p), device=p.device).expand(p.shape))
        return rates

    @torch.no_grad()
    def rates(self, bins: int = 50, model: int | None = None) -> Rates:
        """The effective rates now, ``lr`` included, over all weights together. Waits for the device.

        Args:
            bins: number of bins of the histogram.
            model: in a stack, the model to look at; ``None``: all of them together.
        """
        rates = self._effective_rates()
        if self.space.models is not None and model is not None:
            rates = [rate[model] for rate in rates]
        one = Space()
        mean, std = one.mean_std(rates)
        every = torch.cat([rate.reshape(-1).cpu() for rate in rates]) if rates else torch.zeros(1)
        low, high = float(every.min()), float(every.max())
        if not 0 < low < high < float("inf"):
            return Rates(float(mean), float(std), low, high, (every.numel(),), (low, high))
        logs = every.double().log10()
        edges = torch.linspace(float(logs.min()), float(logs.max()), bins + 1, dtype=torch.float64)
        counts = torch.bincount(torch.bucketize(logs, edges[1:-1]), minlength=bins)
        return Rates(float(mean), float(std), low, high, tuple(counts.tolist()), tuple((10**edges).tolist()))

    def _record(self) -> None:
        """Append mean and s.d. of the rates to the history; kept with the first parameter, on its device."""
        keeper = self.state[self.param_groups[0]["params"][0]]
        entry = torch.stack(self.space.mean_std(self._effective_rates()))
        count = keeper.setdefault("lr_counter", 0)
        history = keeper.setdefault("lr_history", entry.new_zeros((16, *entry.shape)))
        if count == len(history):
            history = keeper["lr_history"] = torch.cat([history, torch.zeros_like(history)])
        history[count] = entry
        keeper["lr_counter"] = count + 1

    def _history(self, column: int) -> list[Any]:
        if not self.track_rates:
            raise AttributeError("the rates were not tracked: make the optimizer with track_rates=True.")
        keeper = self.state.get(self.param_groups[0]["params"][0], {})
        return keeper["lr_history"][: keeper["lr_counter"], column].tolist() if "lr_history" in keeper else []

    @property
    def lr_mean(self) -> list[Any]:
        """Mean effective rate over all weights: before the first step, then whenever rates adapted (a window's end).

        Floats; in a stack of K models, lists of K floats. Reading it waits for the device.
        """
        return self._history(0)

    @property
    def lr_std(self) -> list[Any]:
        """The unbiased standard deviation that belongs to each entry of ``lr_mean``."""
        return self._history(1)

    @property
    def lr_counter(self) -> int:
        """How many entries ``lr_mean`` has: one more than the number of windows that have ended."""
        return self.state.get(self.param_groups[0]["params"][0], {}).get("lr_counter", 0)


def write_back_(weight: Tensor, update: Tensor, lr: Number, rate: Number) -> None:
    """weight <- weight - lr * rate * update, in place and in one pass where the numbers are plain."""
    if isinstance(lr, Tensor):
        weight.sub_(lr * rate * update)
    elif isinstance(rate, Tensor):
        weight.addcmul_(rate, update, value=-lr)
    else:
        weight.add_(update, alpha=-(lr * rate))
