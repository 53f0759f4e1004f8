"""The optimizer: a direction, a rule, and the one place where weights are written.

u  = direction(g, state)        which way
r  = rule(...)                  how far: one number, or one for each weight
p <- p - lr * r * u
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from surefoot.optim.averaging import Average
from surefoot.optim.parts import WEIGHT, Direction, Number, Part, Slot, State, all_of, require, require_whole
from surefoot.optim.precision import is_short, narrow_, rounding, widen, working_dtype
from surefoot.optim.probe import RandomState, called_modules, leaving_no_trace
from surefoot.optim.rules.base import Rule
from surefoot.optim.rules.constant import Constant
from surefoot.optim.space import Space, is_at_hand

Loss = float | Tensor

_FOREIGN_OPTIONS = frozenset(
    {"params", "param_names", "name"}
    # written by add_param_group: the group's lr as it was given, whatever a scheduler makes of it
    | {"given_lr"}
    # written into groups by torch's schedulers
    | {"initial_lr", "min_lr", "max_lr", "swa_lr", "base_momentum", "max_momentum"}
)


_CALLER = 5
"""How far above a warning in :meth:`SelfTuning._check_evaluate` the call of ``step`` is."""

_HISTORY = {"lr_history": torch.float64, "lr_counter": int}
"""What ``track_rates`` keeps beside the first parameter's own state."""


@dataclass(frozen=True)
class Rates:
    """The effective rates (``lr`` included) of all weights at one moment."""

    mean: float
    std: float
    """Unbiased (n - 1)."""
    min: float
    max: float
    histogram: tuple[int, ...]
    """Number of weights in each bin; the bins are even in log10 of the rate. Rates of 0 are in none."""
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
            themselves are what :meth:`rates` gives. ``lr=0`` moves nothing. ``group["given_lr"]`` remembers it.
        maximize: go up instead of down.
        average: what :meth:`averaged` evaluates, from :mod:`surefoot.optim.averaging`; one more copy of the weights.
        max_norm: the norm of all gradients together is clipped to it first, as by ``torch.nn.utils.clip_grad_norm_``, but
            ``p.grad`` is left as it is, and rules that go by the loss see its real slope.
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
        average: Average | None = None,
        max_norm: Number = math.inf,
        maximize: bool = False,
        track_rates: bool = False,
        models: int | None = None,
    ) -> None:
        if not isinstance(direction, Direction):
            raise TypeError(
                f"direction must be one of surefoot.optim.directions, such as Adam(), not {direction!r}."
            )
        if not isinstance(rule, Rule):
            raise TypeError(
                f"rule must be one of surefoot.optim.rules, such as Constant(1e-3), not {rule!r}."
            )
        if not (average is None or isinstance(average, Average)):
            raise TypeError(
                f"average must be None or one of surefoot.optim.averaging, such as Mean(), not {average!r}."
            )
        self.direction = direction
        self.rule = rule
        self.average = average
        self.space = Space(models)
        self.track_rates = track_rates
        names = [name for part in self._parts() for name in part.options()]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two parts of this optimizer have an option named {name!r}.")
        if not isinstance(rule, Constant) and isinstance(lr, (int, float)) and 0 < lr < 0.1:
            warnings.warn(
                f"lr={lr:g} multiplies the rates that {type(rule).__name__} finds by itself; it is not the initial rate, "
                "which has an option of its own. Leave lr at 1 and let a scheduler lower it.",
                stacklevel=2 if type(self) is SelfTuning else 3,
            )
        options = {name: value for part in self._parts() for name, value in part.options().items()}
        common = {
            "maximize": maximize,
            "max_norm": max_norm,
            "cell": " x ".join(type(p).__name__ for p in self._parts()),
        }
        super().__init__(params, {"lr": lr, **options, **common})
        self._remember_random_state()

    def _parts(self) -> tuple[Part, ...]:
        average = () if self.average is None else (self.average,)
        return (self.direction, self.rule, *average)

    # ------------------------------------------------------------------------------------------------- the step

    @overload
    def step(self, closure: None = None, *, loss: None = None, evaluate: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, loss: None = None, evaluate: None = None) -> float: ...
    @overload
    def step(
        self,
        closure: None = None,
        *,
        loss: Loss,
        evaluate: Callable[[], Loss] | None = None,
        probe_loss: Loss | None = None,
    ) -> Loss: ...

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: Loss | None = None,
        evaluate: Callable[[], Loss] | None = None,
        probe_loss: Loss | None = None,
    ) -> Loss | None:
        """Move every parameter that has a gradient.

        Args:
            closure: computes the loss again, with gradients, and returns it, as for any torch optimizer. Where a rule probes
                it is called a second time, so that a probe costs a backward pass too; ``evaluate`` costs none.
            loss: the value that the gradients belong to, where it is at hand: a scalar, in a stack ``[K]``. Rules that
                go by the loss need one of the two; every other rule lets it through.
            probe_loss: where ``evaluate`` computes the loss of a part of the batch only, that part's loss at the weights as
                they are. Not where the part's loss depends on the rest (BatchNorm) or on random numbers (dropout).
            evaluate: computes the loss of the same batch again, forward only. For rules that probe the loss at other
                weights; called at most once a step, never by any other rule. Its dropout masks are those that followed
                the last :meth:`zero_grad` (or the last step), so call that when the batch is ready, before the forward
                pass: where it draws random numbers one more call, in the second step, checks that it gives the step's
                loss. It leaves buffers, gradients and random streams as they are. With a closure none is needed.

        Returns:
            The loss, as it was given or as the closure returned it.

        Raises:
            ValueError: for a sparse gradient, for a closure together with a loss, or for a rule that goes by the loss
                and is given none. Nothing has moved then. Also where ``evaluate`` returns no loss, and for a ``probe_loss``
                with a model in which a part of the batch can't be looked at alone.
            TypeError: for a closure that is no function, such as a loss without its name.
            What ``evaluate`` raises, Ctrl-C included: the weights are then where they were, unless the rule keeps no copy
                of them and looks where the step has gone (``LossGrad`` with ``retract=False``).

        Warns:
            UserWarning: once, where ``evaluate`` draws random numbers and does not give the step's loss.
        """
        if self._swapped:
            raise RuntimeError(
                "a step inside averaged() would be lost: the weights are their averages there."
            )
        replay, called = self._random_state, set()
        if closure is not None:
            if not callable(closure):
                raise TypeError(
                    "closure must be a function that computes the loss again; a loss has a name: step(loss=loss)."
                )
            if loss is not None or evaluate is not None or probe_loss is not None:
                raise ValueError("step takes a closure, or a loss with evaluate, not both.")
            self._remember_random_state()
            replay = self._random_state  # the closure's own zero_grad will remember a later one
            with called_modules() if self.rule.probes else nullcontext(called) as called, torch.enable_grad():
                loss = closure()
        moving = [(i, p, group) for i, (p, group) in enumerate(self._members()) if p.grad is not None]
        for _, p, _ in moving:
            if cast(Tensor, p.grad).is_sparse:
                raise ValueError("sparse gradients are not supported; make the embedding with sparse=False.")
        value = self._loss_value(loss, "loss" if closure is None else "what the closure returns")
        grads = [cast(Tensor, p.grad) for _, p, _ in moving]
        if value is not None and moving:
            grads, value = self._finite(grads, value)
        shared_options = self.param_groups[0]
        clock = self._kept("clock") + 1
        probing = bool(moving) and self.rule.probes_at(clock, shared_options)
        again = closure or evaluate
        if probing and again is None:
            raise ValueError(
                "this rule probes the loss: call step(loss=loss, evaluate=...), or step(closure)."
            )
        probe = partial(
            self._probed,
            cast(Callable[[], Loss], again),
            cast(RandomState, replay),
            [p for module in called for p in module.parameters()],
            with_grad=closure is not None,
            in_part=probe_loss is not None,
        )
        before = value
        if probe_loss is not None and value is not None:
            # As little of a number as the step's own loss.
            before = cast(Tensor, self._loss_value(probe_loss, "probe_loss")).to(value.device) + 0 * value
        if probing and evaluate is not None and self._random_probes == "seen":
            self._check_evaluate(probe, cast(Tensor, before))
        for _, p, group in moving:
            if "step" not in self.state[p]:
                self._begin(p, group)
            elif is_short(p) and "compensation" not in self.state[p]:  # the model has become a 16-bit one
                self.state[p]["compensation"] = torch.zeros_like(p, dtype=torch.float32)
        if self.track_rates and moving and not self._kept("lr_counter"):
            self._record()
        shared, clip = self._shared(), self._clip(grads)
        slots: Iterable[Slot] = (
            self._propose(index, p, grad, group, shared, clip)
            for (index, p, group), grad in zip(moving, grads, strict=True)
        )
        seen: list[Slot] = []
        after = None
        if shared and moving:
            # A global rule has to see them all; otherwise one update at a time is in memory.
            self._keeper()["clock"] = clock
            slots = seen = list(slots)
            self.rule.measure(seen, shared, shared_options, value)
            if probing:
                with self._taking_back(seen, [slot.weight for slot in seen]):
                    after = self._elsewhere(seen, probe)
                if after is not None and self.rule.looks_first:
                    self.rule.judge(seen, shared, shared_options, cast(Tensor, before), *after)
                    probing = False
        retracting = probing and self.rule.retracts(shared_options)
        origins = [slot.weight.clone() for slot in seen] if retracting else []
        latest, adapted = 0, False  # of the parameter that has made most steps: its clock is the history's
        for slot in slots:
            self._apply(slot)
            if not retracting:
                self._finish(slot)
            if slot.state["step"] > latest:
                latest, adapted = slot.state["step"], slot.adapted
        if probing:
            with self._taking_back(seen, origins):
                after = probe() if after is None else after
            self.rule.judge(seen, shared, shared_options, cast(Tensor, before), *after)
        for slot, origin in zip(seen, origins, strict=False):
            keep_share_(slot.weight, origin, self.rule.share(slot))
            self._store(slot)
            self._finish(slot)
        if self.track_rates and adapted:
            self._record()
        self._remember_random_state()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as for any torch optimizer; the dropout masks of a probe are those drawn from here on."""
        super().zero_grad(set_to_none)
        self._remember_random_state()

    _random_state: RandomState | None = None
    _random_probes = "none"
    """Whether a probe has drawn random numbers: "none", "seen", or "checked" once it was seen whether it gives the step's
    own loss."""

    def _remember_random_state(self) -> None:
        if self.rule.probes:
            self._random_state = RandomState(p.device for p, _ in self._members())

    def _probed(
        self,
        evaluate: Callable[[], Loss],
        replay: RandomState,
        others: Iterable[Tensor],
        *,
        with_grad: bool,
        in_part: bool,
    ) -> tuple[Tensor, float]:
        """The batch's loss at the weights as they are, and the rounding that it has gone through.

        ``others``: parameters of other optimizers, whose gradients a closure makes too.
        """
        own = [p for p, _ in self._members()]
        with (
            leaving_no_trace(list(dict.fromkeys((*own, *others))), replay, in_part=in_part) as seen,
            torch.set_grad_enabled(with_grad),
        ):
            loss = evaluate()
            seen.look(loss)
        if seen.drew and self._random_probes == "none":
            self._random_probes = "seen"
        value = cast(Tensor, self._loss_value(loss, "what evaluate returns"))
        return value, rounding((*(p.dtype for p in own), *seen.short))

    def _check_evaluate(self, probe: Callable[[], tuple[Tensor, float]], before: Tensor) -> None:
        """Warn where ``evaluate`` gives another loss than the step's at the step's own weights. Waits for the device."""
        again, eps = probe()
        gap = (again.to(before.device) - before).abs()
        if not bool(gap.isfinite().all()):
            return
        self._random_probes = "checked"
        if bool((gap > math.sqrt(eps) * before.abs()).any()):
            warnings.warn(
                "evaluate does not reproduce the loss, so that a probe sees other random numbers (dropout's masks) than the "
                "step: call zero_grad() when the batch is ready, before the forward pass.",
                stacklevel=_CALLER,
            )

    def _finite(self, grads: Sequence[Tensor], loss: Tensor) -> tuple[list[Tensor], Tensor]:
        """Gradients and loss as they are, or zeros and NaN for a model that has an entry which is not finite.

        So a rule that goes by the loss makes no step there, and no state takes in what is no number.
        """
        finite = self.space.sum(grads).isfinite()
        if is_at_hand(finite) and bool(finite.all()):
            return list(grads), loss
        # 0 times NaN is NaN, so what is not finite becomes 0 first; torch.where takes three times as long.
        sound = [
            g.nan_to_num(0.0, 0.0, 0.0).mul_(self.space.spread(finite, g).to(g.device, g.dtype))
            for g in grads
        ]
        return sound, torch.where(finite, loss.to(finite.device), math.nan)

    @contextmanager
    def _taking_back(self, slots: Sequence[Slot], origins: Sequence[Tensor]) -> Iterator[None]:
        """If the block fails, what there is an origin of is put back, and counts as a step that led nowhere."""
        try:
            yield
        except BaseException:
            for slot, origin in zip(slots, origins, strict=False):
                slot.weight.copy_(origin)
                self._store(slot)
                self._finish(slot)
            self._remember_random_state()
            raise

    def _clip(self, grads: Sequence[Tensor]) -> Tensor | None:
        """What gradients are multiplied by so that their norm is at most ``max_norm``; ``None`` for no limit."""
        largest = self.param_groups[0]["max_norm"]
        if not grads or not (isinstance(largest, Tensor) or largest < math.inf):
            return None
        norm = self.space.dot(grads, grads).sqrt()
        return (torch.as_tensor(largest, dtype=norm.dtype, device=norm.device) / (norm + 1e-6)).clamp(max=1.0)

    def _elsewhere(
        self, slots: Sequence[Slot], probe: Callable[[], tuple[Tensor, float]]
    ) -> tuple[Tensor, float] | None:
        """:meth:`_probed` where the rule wants to look, the weights being put back; ``None`` where the step goes there itself."""
        ahead = [self.rule.ahead(slot) for slot in slots]
        if all(displacement is None for displacement in ahead):
            return None
        before = [slot.parameter.clone() for slot in slots]
        for slot, displacement in zip(slots, ahead, strict=True):
            if displacement is not None:
                slot.parameter.copy_(slot.weight - displacement)
        try:
            return probe()
        finally:
            for slot, weight in zip(slots, before, strict=True):
                slot.parameter.copy_(weight)

    def _loss_value(self, loss: Loss | None, name: str) -> Tensor | None:
        """The loss as the rule gets it: float64, one for each model."""
        if not self.rule.needs_loss:
            return None
        if loss is None and name == "loss":
            raise ValueError("this rule goes by the loss: call step(loss=loss), or step(closure).")
        shape = self.space.shape
        try:
            value = torch.as_tensor(loss, dtype=torch.float64).detach()
        except (TypeError, ValueError):
            raise ValueError(f"{name} must be a number or a tensor of shape {shape}, not {loss!r}.") from None
        if value.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(value.shape)}.")
        return -value if self.param_groups[0]["maximize"] else value

    def _propose(
        self,
        index: int,
        p: Tensor,
        grad: Tensor,
        group: dict[str, Any],
        shared: dict[str, Tensor],
        clip: Tensor | None,
    ) -> Slot:
        """The direction's update for one parameter; nothing has moved yet."""
        state = self.state[p]
        state["step"] += 1
        weight = self._value(p)
        options = self.space.options(group, weight)
        grad = grad.to(weight.dtype)
        if group["maximize"]:
            grad = -grad
        clipped = grad if clip is None else grad * self.space.spread(clip.to(weight.device), weight)
        coupled = self.direction.couple(clipped, weight, options).to(weight.dtype)
        slot = Slot(
            p,
            weight,
            coupled,
            grad,
            state,
            options,
            self.space,
            index,
            shared,
            self.direction,
            update=coupled,
        )
        slot.update = self.direction.propose(slot)
        return slot

    def _apply(self, slot: Slot) -> None:
        """Move one parameter."""
        rate = self.rule.choose(slot)
        update = self.direction.shrink(slot.update, slot.weight, slot.options)
        write_back_(slot.weight, update, slot.options["lr"], rate)
        kept = self.rule.settle(slot)
        if kept is not None:
            slot.weight.copy_(kept)
        self._store(slot)

    def _store(self, slot: Slot) -> None:
        """A short weight's value was computed beside it."""
        if is_short(slot.parameter):
            narrow_(slot.parameter, slot.state["compensation"], slot.weight)

    def _finish(self, slot: Slot) -> None:
        """Take the weight as it now is into the average."""
        if self.average is not None:
            self.average.fold(slot.state["average"], slot.weight, slot.state["step"], slot.options)

    def _members(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.param_groups:
            for p in group["params"]:
                yield p, group

    def _value(self, p: Tensor) -> Tensor:
        """The parameter itself, or for a short one its value in float32."""
        return widen(p, self.state[p]["compensation"]) if is_short(p) else p.detach()

    # ------------------------------------------------------------------------------------------------- the state

    def _declared(self, p: Tensor, group: dict[str, Any]) -> tuple[State, ...]:
        compensation = (State("compensation"),) if is_short(p) else ()
        return (*(state for part in self._parts() for state in part.declare(group)), *compensation)

    def _begin(self, p: Tensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        for declared in self._declared(p, group):
            if not (declared.dtype is None or isinstance(declared.dtype, torch.dtype)):
                state[declared.name] = int(cast(float, declared.init))
                continue
            dtype = declared.dtype or working_dtype(p)
            like = torch.empty(self.space.shape, device=p.device) if declared.per_model else p
            tensor = torch.empty_like(like, dtype=dtype, requires_grad=False)
            init = p if declared.init is WEIGHT else self.space.spread(declared.init, tensor)
            state[declared.name] = tensor.copy_(init) if isinstance(init, Tensor) else tensor.fill_(init)
        state["step"] = 0

    def _first(self) -> Tensor | None:
        """The first parameter, in whose state what belongs to all of them is kept; ``None`` where all groups are empty."""
        return next((p for p, _ in self._members()), None)

    def _keeper(self) -> dict[str, Any]:
        """That parameter's state."""
        return self.state[cast(Tensor, self._first())]

    def _kept(self, count: str) -> int:
        """One of the counts kept there, 0 before it has begun: ``clock`` (a global rule's steps) or ``lr_counter``."""
        first = self._first()
        return 0 if first is None else self.state.get(first, {}).get(count, 0)

    def _shared(self) -> dict[str, Tensor]:
        """What the rule keeps for all parameters together; made at the first call."""
        first = self._first()
        declared = () if first is None else self.rule.declare_shared(self.param_groups[0])
        keeper = self._keeper() if declared else {}
        for state in declared:
            if state.name not in keeper:
                start = torch.as_tensor(state.init, dtype=torch.float64, device=cast(Tensor, first).device)
                keeper[state.name] = start.expand(self.space.shape).clone()
        return {state.name: keeper[state.name] for state in declared}

    def _for_all(self, group: dict[str, Any]) -> dict[str, Any]:
        """What may stand in the first parameter's state beside its own, and its dtype."""
        shared = {state.name: torch.float64 for state in self.rule.declare_shared(group)}
        return {**shared, **_HISTORY, "clock": int}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` gave, in the declared dtypes and on the parameters' devices; shares no tensor.

        Raises:
            ValueError: where the state is not what this direction and rule declare, or does not fit the parameters.
        """
        found: dict[Tensor, dict[str, Any]] = {}
        given = [group["given_lr"] for group in self.param_groups]

        def take(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
            # torch would cast every tensor to its parameter's dtype: it is given the groups alone.
            found.update(self._matched(state_dict))
            return {**state_dict, "state": {}}

        def restore(_: Optimizer) -> None:
            for group, lr in zip(self.param_groups, given, strict=True):
                for name, default in {**self.defaults, "given_lr": lr}.items():
                    group.setdefault(name, default)
            for p, group in self._members():
                if p in found:
                    self.state[p] = self._restored(p, group, found[p])

        # Last of the hooks before and first of the hooks after, so that the user's own see whole states.
        before = self.register_load_state_dict_pre_hook(take)
        after = self.register_load_state_dict_post_hook(restore, prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    def _matched(self, state_dict: dict[str, Any]) -> dict[Tensor, dict[str, Any]]:
        """The saved state of each parameter; refused, before anything is changed, where it is not this optimizer's."""
        groups = [{**self.defaults, **group} for group in state_dict["param_groups"]]
        lengths = [len(group["params"]) for group in groups]
        if lengths != [len(group["params"]) for group in self.param_groups]:
            return {}  # torch's own message says it
        for group in groups:
            if group["cell"] != self.defaults["cell"]:
                raise ValueError(
                    f"the loaded state is that of a {group['cell']} optimizer, and this one is {self.defaults['cell']}."
                )
            self._check_options(group, "the loaded state's group")
            self._check_shared(group, groups[0])
        owners = [(saved_id, group) for group in groups for saved_id in group["params"]]
        matched = {}
        for (saved_id, group), (p, _) in zip(owners, self._members(), strict=True):
            saved = state_dict["state"].get(saved_id)
            if saved is not None:
                self._refuse_foreign(saved_id, p, group, saved)
                matched[p] = saved
        return matched

    def _refuse_foreign(self, saved_id: Any, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> None:
        declared = {state.name: state for state in self._declared(p, group)}
        present = set(saved) - self._for_all(group).keys()
        # "compensation": weights may have been 16-bit there, or have become so here.
        odd = (present ^ (declared.keys() | {"step"})) - {"compensation"}
        if present and odd:
            raise ValueError(
                f"the loaded state is not this optimizer's: it differs in {', '.join(sorted(odd))}."
            )
        for name in sorted(present & declared.keys()):
            shape = self.space.shape if declared[name].per_model else p.shape
            if isinstance(saved[name], Tensor) and saved[name].shape != shape:
                raise ValueError(
                    f"the loaded state does not fit: {name} of parameter {saved_id} has shape "
                    f"{tuple(saved[name].shape)}, the parameter {tuple(p.shape)}."
                )

    def _restored(self, p: Tensor, group: dict[str, Any], saved: dict[str, Any]) -> dict[str, Any]:
        dtypes = {declared.name: declared.dtype or working_dtype(p) for declared in self._declared(p, group)}
        dtypes |= {"step": int, **self._for_all(group)}
        return {
            name: int(value) if dtypes[name] is int else value.detach().to(p.device, dtypes[name], copy=True)
            for name, value in saved.items()
            if name in dtypes
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its options are checked like the constructor's, and ones that nothing reads are refused."""
        for name, value in param_group.items():
            if isinstance(value, list) and name not in ("params", "param_names"):
                param_group[name] = tuple(value)
        self._check_options(param_group, "a parameter group")
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        lr = group["lr"]
        group.setdefault("given_lr", lr.clone() if isinstance(lr, Tensor) else lr)
        try:
            for p in group["params"]:
                self._check_parameter(p)
            self._check_shared(group, self.param_groups[0])
        except BaseException:
            self.param_groups.pop()
            raise

    def _check_options(self, group: dict[str, Any], where: str) -> None:
        """Refuse options that nothing reads, and values out of range."""
        for name in sorted(group.keys() - self.defaults.keys() - _FOREIGN_OPTIONS):
            nearest = difflib.get_close_matches(name, sorted(self.defaults), 1)
            hint = (
                f"did you mean {nearest[0]!r}?"
                if nearest
                else f"it is none of {', '.join(sorted(self.defaults))}."
            )
            raise ValueError(f"no part of this optimizer reads the option {name!r} of {where}: {hint}")
        options = {**self.defaults, **group}
        for part in self._parts():
            replace(part, **{name: options[name] for name in part.options()}).check_group(options)
        declared = {state.name for state in self.direction.declare(options)}
        for name in self.rule.needs(options):
            if name not in declared:
                raise ValueError(
                    f"{type(self.rule).__name__} with these options needs a direction that keeps {name}."
                )
        require("lr", options["lr"], "a finite number of at least 0", lambda v: all_of(v >= 0, v < math.inf))
        require("max_norm", options["max_norm"], "above 0", lambda v: v > 0)
        require("maximize", options["maximize"], "True or False", lambda v: isinstance(v, bool))
        for name in self.defaults:
            for value in options[name] if isinstance(options[name], tuple) else (options[name],):
                if isinstance(value, Tensor) and value.ndim and value.shape != self.space.shape:
                    allowed = "0-d" if self.space.models is None else f"0-d or of shape {self.space.shape}"
                    raise ValueError(
                        f"{name} as a tensor must be {allowed}, not of shape {tuple(value.shape)}."
                    )

    def _check_shared(self, group: dict[str, Any], first: dict[str, Any]) -> None:
        """Refuse options of its own in a group where the rule has one rate for all."""
        is_global = self.rule.declare_shared(first) or self.rule.declare_shared(group)
        for name in ("max_norm", *(self.rule.options() if is_global else ())):
            if not same_value(group[name], first[name]):
                raise ValueError(f"{name} is one for all groups here; a group may have an lr of its own.")

    def _check_parameter(self, p: Tensor) -> None:
        if p.is_complex():
            raise ValueError("complex parameters are not supported; optimize torch.view_as_real of them.")
        if not self.space.admits(p):
            raise ValueError(
                f"in a stack of {self.space.models} models every parameter has a leading axis of that length, "
                f"not shape {tuple(p.shape)}."
            )

    def __getstate__(self) -> dict[str, Any]:
        if self._swapped:
            raise RuntimeError("a copy made inside averaged() would take the averages for its weights.")
        # torch keeps only defaults, state and groups: a copy would have no direction.
        return {
            **super().__getstate__(),
            "direction": self.direction,
            "rule": self.rule,
            "average": self.average,
            "space": self.space,
            "track_rates": self.track_rates,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.defaults.pop("differentiable", None)  # torch puts it there; nothing here reads it
        self._remember_random_state()

    # ------------------------------------------------------------------------------------------------- the average

    _swapped = False

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, every parameter is its average, for an evaluation; afterwards it is what it was.

        Without an ``average`` nothing is swapped. Statistics that a model has gathered at the iterates (BatchNorm's)
        are not averaged: ``torch.optim.swa_utils.update_bn`` gathers them anew inside.

        Raises:
            RuntimeError: inside, from :meth:`step`, and where the optimizer is copied or pickled.
        """
        if self.average is None or self._swapped:
            yield
            return
        swapped = [p for p, _ in self._members() if "average" in self.state.get(p, {})]
        iterates = [p.detach().clone() for p in swapped]
        self._swapped = True
        try:
            with torch.no_grad():
                for p in swapped:
                    p.copy_(self.state[p]["average"])
            yield
        finally:
            with torch.no_grad():
                for p, iterate in zip(swapped, iterates, strict=True):
                    p.copy_(iterate)
            self._swapped = False

    # ------------------------------------------------------------------------------------------------- the rates

    def _effective_rates(self) -> list[Tensor]:
        """For each parameter (after the first step: each that has had a gradient) lr times rate, of its shape."""
        shared = self._shared() if self._kept("clock") else {}
        begun = any("step" in self.state[p] for p, _ in self._members() if p in self.state)
        rates = []
        for p, group in self._members():
            state = self.state.get(p, {})
            if ("step" in state) if begun else p.requires_grad:
                options = self.space.options(group, p)
                kept = {name: self.space.spread(value.to(p.device), p) for name, value in shared.items()}
                current = self.rule.current({**state, **kept}, options)
                rate = options["lr"] * self.space.spread(current, p, torch.float64)
                rates.append(torch.as_tensor(rate, dtype=working_dtype(p), device=p.device).expand(p.shape))
        return rates

    @torch.no_grad()
    def rates(self, bins: int = 50, model: int | None = None) -> Rates:
        """The effective rates now, ``lr`` included, over all weights together. Waits for the device.

        Args:
            bins: number of bins of the histogram, at least 1.
            model: in a stack, the model to look at; ``None``: all of them together.

        Raises:
            ValueError: for a model where there is no stack, or no bins.
        """
        require_whole("bins", bins, 1)
        rates = self._effective_rates()
        if model is not None:
            if self.space.models is None:
                raise ValueError("model is for a stack; this optimizer was made without models=.")
            rates = [rate[model] for rate in rates]
        mean, std = (float(value) for value in Space().mean_std(rates))
        every = torch.cat([torch.zeros(0), *(rate.reshape(-1).double().cpu() for rate in rates)])
        if not every.numel():
            return Rates(math.nan, math.nan, math.nan, math.nan, (), ())
        low, high = float(every.min()), float(every.max())
        logs = every[(every > 0) & (every < math.inf)].log10()
        if not logs.numel() or logs.min() == logs.max():
            return Rates(
                mean,
                std,
                low,
                high,
                (logs.numel(),),
                (float((10**logs).min()) if logs.numel() else low, high),
            )
        edges = torch.linspace(
            float(logs.min()), float(logs.max()), bins + 1, dtype=torch.float64, device="cpu"
        )
        counts = torch.bincount(torch.bucketize(logs, edges[1:-1]), minlength=bins)
        return Rates(mean, std, low, high, tuple(counts.tolist()), tuple((10**edges).tolist()))

    @torch.no_grad()
    def rates_by_model(self) -> list[Rates]:
        """What :meth:`rates` gives for each model of a stack, but for the histogram. Waits for the device once."""
        models = self.space.models
        if models is None:
            raise ValueError("rates_by_model is for a stack; this optimizer was made without models=.")
        rates = [rate for rate in self._effective_rates() if rate.numel()]
        if not rates:
            return [Rates(math.nan, math.nan, math.nan, math.nan, (), ())] * models
        mean, std = self.space.mean_std(rates)
        rows = [rate.reshape(models, -1).double() for rate in rates]
        low = torch.stack([row.amin(1).to(mean.device) for row in rows]).amin(0)
        high = torch.stack([row.amax(1).to(mean.device) for row in rows]).amax(0)
        numbers = torch.stack([mean, std, low, high], dim=1).tolist()
        return [Rates(own[0], own[1], own[2], own[3], (), ()) for own in numbers]

    def _record(self) -> None:
        """Append mean and s.d. of the rates to the history; kept with the first parameter, on its device."""
        keeper = self._keeper()
        entry = torch.stack(self.space.mean_std(self._effective_rates()))
        count = keeper.setdefault("lr_counter", 0)
        history = keeper.setdefault("lr_history", entry.new_zeros((16, *entry.shape)))
        if count == len(history):
            history = keeper["lr_history"] = torch.cat([history, torch.zeros_like(history)])
        history[count] = entry
        keeper["lr_counter"] = count + 1

    def _history(self, column: int) -> list[Any]:
        count = self.lr_counter
        return self._keeper()["lr_history"][:count, column].tolist() if count else []

    @property
    def lr_mean(self) -> list[Any]:
        """Mean effective rate over all weights: before the first step, then after each step that adapted rates.

        For the window rule that is the end of each window, on the clock of the parameter that has made most steps; for
        rules that adapt at every step, and for a constant rate (whose lr a scheduler may move), every step. Floats; in
        a stack of K models, lists of K floats. Reading it waits for the device.
        """
        return self._history(0)

    @property
    def lr_std(self) -> list[Any]:
        """The unbiased standard deviation that belongs to each entry of ``lr_mean``."""
        return self._history(1)

    @property
    def lr_counter(self) -> int:
        """How many entries ``lr_mean`` has: for the window rule, one more than the number of windows that have ended."""
        if not self.track_rates:
            raise AttributeError("the rates were not tracked: make the optimizer with track_rates=True.")
        return self._kept("lr_counter")


def same_value(a: Any, b: Any) -> bool:
    """Whether two values of an option are equal."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or torch.equal(torch.as_tensor(a), torch.as_tensor(b))
    return a == b


def keep_share_(weight: Tensor, origin: Tensor, share: Number) -> None:
    """weight <- origin + share (weight - origin), in place: the origin itself where ``share`` is 0."""
    shares = torch.as_tensor(share, dtype=weight.dtype, device=weight.device)
    weight.copy_(torch.where(shares > 0, torch.lerp(origin, weight, shares), origin))


def write_back_(weight: Tensor, update: Tensor, lr: Number, rate: Number) -> None:
    """weight <- weight - lr * rate * update, in place and in one pass where the numbers are plain."""
    if isinstance(lr, Tensor):
        weight.sub_(lr * rate * update)
    elif isinstance(rate, Tensor):
        weight.addcmul_(rate, update, value=-lr)
    else:
        weight.add_(update, alpha=-(lr * rate))
