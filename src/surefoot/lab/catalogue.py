"""The optimizers by the names of the command line. Settings and defaults are read off the optimizers themselves."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol, cast, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from surefoot.lab.errors import UserError
from surefoot.lab.packages import RIVALS, Adapted, Rival
from surefoot.lab.plan import written
from surefoot.lab.runs import Scalar, Value
from surefoot.lab.schedules import NONE, SCHEDULES
from surefoot.optim import (
    L4,
    PAL,
    QLAB,
    SPS,
    AdamUpd,
    CoRe,
    DropoutRprop,
    HyperReg,
    LossGrad,
    SelfTuning,
    SGDUpd,
    SRprop,
    WNGrad,
)
from surefoot.optim.directions import SGD, Adam, Momentum, Nesterov
from surefoot.optim.parts import Direction, Number
from surefoot.optim.rules import Constant, Hypergradient, Rule, Window

if TYPE_CHECKING:
    from surefoot.lab.plan import MethodRequest

_SINGLE = torch.finfo(torch.float32)
_RATE_NAMES = ("rate", "initial_rate", "fraction", "bound", "probe_length")
"""What the optimizers call the number that a comparison varies: a learning rate, or what took its place (L4's share of the
whole step, the Polyak step's bound, the distance of PAL's probe)."""
_NOT_SETTINGS = frozenset({"params", "lr", "maximize", "track_rates", "models", *_RATE_NAMES})
_SCHEDULE = "schedule"  # a setting of every optimizer

Trainee = SelfTuning | Adapted
"""What a run drives, and all that it needs is what both have: ``zero_grad()``, ``step(loss=..., evaluate=...)``,
``rates()``, ``averaged()`` around an evaluation, and that a scheduler of torch's takes it."""


class _Make(Protocol):
    """An optimizer from all its settings and a rate; those that are numbers may be tensors ``[models]`` in a stack."""

    def __call__(
        self, params: Iterable[Tensor], settings: Mapping[str, Any], rate: Number, models: int | None = None
    ) -> SelfTuning: ...


@dataclass(frozen=True)
class Entry:
    """One optimizer: what it is, its settings with their defaults, and how it is made from all of them and a rate."""

    summary: str
    settings: Mapping[str, Value]
    make: _Make
    per_model: Mapping[str, bool | tuple[bool, ...]]
    """Of each setting, whether (of a tuple, which part) in a stack it may be a number for each model: by its annotation."""
    origin: Mapping[str, Value] = field(default_factory=dict)
    """What else decides its numbers and is no setting: for another package's, that package's version."""
    implied: Callable[[Mapping[str, Value]], Mapping[str, Value]] = lambda asked: {}
    """Defaults that other settings decide."""


def _cell(
    direction: type[Direction], rule: type[Rule], fixed: Mapping[str, Value] | None = None, **defaults: Value
) -> Entry:
    """A direction times a rule; ``fixed`` options are no settings, ``defaults`` replace the classes' own."""
    fixed = fixed or {}
    options: dict[type, dict[str, Any]] = {
        part: {f.name: f.default for f in fields(part)} for part in (direction, rule)
    }
    rate_name = next(name for name in _RATE_NAMES if name in options[rule])

    def make(
        params: Iterable[Tensor], settings: Mapping[str, Any], rate: Number, models: int | None = None
    ) -> SelfTuning:
        values = {**settings, **fixed, rate_name: rate}
        made = {part: part(**{name: values[name] for name in options[part]}) for part in options}
        return SelfTuning(params, cast(Direction, made[direction]), cast(Rule, made[rule]), models=models)

    own = {name: value for part in options for name, value in options[part].items()}
    settings = {
        name: defaults.get(name, value) for name, value in own.items() if name not in {*_NOT_SETTINGS, *fixed}
    }
    hints = {**get_type_hints(direction), **get_type_hints(rule)}
    return Entry(f"{direction.__name__} x {rule.__name__}", settings, make, _per_model(hints, settings))


def _named(optimizer: type[SelfTuning], **fixed: Value) -> Entry:
    """An optimizer with a name and a signature of its own; ``fixed`` options are no settings."""
    signature = inspect.signature(optimizer).parameters
    rate_name = next(name for name in _RATE_NAMES if name in signature)

    def make(
        params: Iterable[Tensor], settings: Mapping[str, Any], rate: Number, models: int | None = None
    ) -> SelfTuning:
        options = {**settings, **fixed, rate_name: rate, "models": models}
        return cast(Callable[..., SelfTuning], optimizer)(params, **options)

    settings = {name: p.default for name, p in signature.items() if name not in {*_NOT_SETTINGS, *fixed}}
    summary = (inspect.getdoc(optimizer) or "").partition("\n")[0].split(". ")[0].rstrip(".")
    summary = ", ".join([summary, *(f"{name} {value}" for name, value in fixed.items())])
    return Entry(summary, settings, make, _per_model(get_type_hints(optimizer.__init__), settings))


def _per_model(hints: Mapping[str, Any], names: Iterable[str]) -> dict[str, bool | tuple[bool, ...]]:
    """Which options, or parts of tuples, may be a tensor."""

    def admits(hint: Any) -> bool | tuple[bool, ...]:
        if get_origin(hint) is tuple:
            return tuple(bool(admits(part)) for part in get_args(hint))
        return hint is Tensor or any(admits(part) is True for part in get_args(hint))

    return {name: admits(hints[name]) for name in names}


def _lossgrad(direction: str) -> Entry:
    """LossGrad with ``retract`` written out, and without its horizon, which ``schedule`` has."""
    entry = _named(LossGrad, direction=direction)
    settings = {name: value for name, value in entry.settings.items() if name != "horizon"}
    return replace(
        entry,
        settings={**settings, "retract": True},
        implied=lambda asked: {"retract": asked.get("probe") != "next"},
    )


_DIVERGENCES = {"kl": "kl", "rkl": "rkl", "h": "hellinger", "x": "chi2", "n": "neyman"}
"""As the papers abbreviate them; x is chi."""

CATALOGUE: Mapping[str, Entry | Rival] = {
    "sgd": _cell(SGD, Constant),
    "momentum": _cell(Momentum, Constant),
    "nesterov": _cell(Nesterov, Constant),
    "adam": _cell(Adam, Constant),
    "adamw": _cell(
        Adam,
        Constant,
        fixed={"decoupled_weight_decay": True},
        weight_decay=inspect.signature(torch.optim.AdamW).parameters["weight_decay"].default,
    ),
    "srprop": _named(SRprop),
    "sgd-upd": _named(SGDUpd),
    "adam-upd": _named(AdamUpd),
    "momentum-window": _cell(Momentum, Window),
    "nesterov-window": _cell(Nesterov, Window),
    "core": _named(CoRe),
    "dropout-rprop": _named(DropoutRprop),
    **{
        f"hyperreg-{short}{algorithm}": _named(HyperReg, divergence=divergence, algorithm=algorithm)
        for short, divergence in _DIVERGENCES.items()
        for algorithm in (1, 2, 3)
    },
    "wngrad": _named(WNGrad),
    "lossgrad": _lossgrad("sgd"),
    **{
        f"lossgrad-{direction}": _lossgrad(direction)
        for direction in ("momentum", "nesterov", "adam", "sign")
    },
    "l4": _named(L4, direction="sgd"),
    "l4-momentum": _named(L4, direction="momentum"),
    "l4-adam": _named(L4, direction="adam"),
    "sps": _named(SPS, direction="sgd"),
    "sps-momentum": _named(SPS, direction="momentum"),
    "sps-adam": _named(SPS, direction="adam"),
    "pal": _named(PAL),
    "qlab": _named(QLAB, direction="sgd"),
    "qlab-momentum": _named(QLAB, direction="momentum"),
    "qlab-adam": _named(QLAB, direction="adam"),
    "hypergradient": _cell(SGD, Hypergradient),
    "hypergradient-momentum": _cell(Momentum, Hypergradient),
    "hypergradient-nesterov": _cell(Nesterov, Hypergradient),
    "hypergradient-adam": _cell(Adam, Hypergradient, hyper_rate=1e-8),
    **RIVALS,
}
"""Every optimizer that a comparison can name."""


def resolve(request: MethodRequest, rates: Sequence[float] = ()) -> dict[str, Value]:
    """All that decides what was asked for: its settings, defaults included and each of its default's type, and its origin.

    A run without a schedule is known as it was before there were any: only another ``schedule`` is among them.

    Every rate is tried too (``request.rate`` or ``rates``), on a parameter of no consequence, so that what an optimizer
    refuses is known before anything is trained; and so is what weights of single precision cannot take.

    Raises:
        UserError: no such optimizer or setting, or a value that it does not take.
    """
    entry = _entry(request.optimizer)
    implied = entry.implied(request.settings) if isinstance(entry, Entry) else {}
    defaults = {**entry.settings, **implied, _SCHEDULE: NONE}
    for name in request.settings:
        if name not in defaults:
            raise UserError(
                f"Optimizer {request.optimizer} has no setting {name!r}; {_nearest(name, defaults)}."
            )
    settings = {
        name: _coerced(request.settings.get(name, default), default, f"{request.optimizer}[{name}]")
        for name, default in defaults.items()
    }
    schedule = settings.pop(_SCHEDULE)
    if schedule not in SCHEDULES:
        raise UserError(
            f"{request.optimizer}[{_SCHEDULE}] is one of {', '.join(SCHEDULES)}, not {written(schedule)}."
        )
    try:
        for rate in rates if request.rate is None else (request.rate,):
            entry.make([torch.zeros(2, 2, requires_grad=True)], settings, rate)
            if not _SINGLE.tiny <= rate <= _SINGLE.max:
                raise UserError(
                    f"Optimizer {request.label}: rate {rate:g} cannot be used; weights of single precision take rates "
                    f"from {_SINGLE.tiny:.2g} to {_SINGLE.max:.2g}."
                )
    except (ValueError, TypeError) as error:
        raise UserError(f"Optimizer {request.label}: {str(error).rstrip('.')}.") from error
    for name, value in settings.items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and _SINGLE.max < abs(number) < math.inf:
                raise UserError(
                    f"{request.optimizer}[{name}] takes numbers of single precision, up to {_SINGLE.max:.2g}, "
                    f"not {written(number)}."
                )
    return {**settings, **entry.origin, **({} if schedule == NONE else {_SCHEDULE: schedule})}


def schedule_of(settings: Mapping[str, Value]) -> str:
    """Which of the schedules :func:`resolve`'s settings ask for."""
    return str(settings.get(_SCHEDULE, NONE))


def build(params: Iterable[Tensor], optimizer: str, settings: Mapping[str, Value], rate: float) -> Trainee:
    """The optimizer over ``params`` with :func:`resolve`'s settings (lists, as JSON gives them back, are tuples).

    Raises:
        UserError: they are of another version of the package that the optimizer comes from.
    """
    entry = _entry(optimizer)
    for name, found in entry.origin.items():
        if settings.get(name) != found:
            raise UserError(f"Optimizer {optimizer} is {found} here; the run is of {settings.get(name)}.")
    return entry.make(
        params,
        {
            name: _coerced(settings[name], default, f"{optimizer}[{name}]")
            for name, default in entry.settings.items()
        },
        rate,
    )


def build_stack(
    params: Iterable[Tensor],
    optimizer: str,
    settings: Sequence[Mapping[str, Value]],
    rates: Sequence[float],
    device: torch.device,
) -> SelfTuning:
    """One optimizer over ``params`` ``[K, ...]`` for K runs, as :func:`build` makes one for each of them.

    Raises:
        UserError: it is another package's.
    """
    entry = _entry(optimizer)
    if isinstance(entry, Rival):
        raise UserError(f"Optimizer {optimizer} is another package's, which trains one model at a time.")

    def together(values: Sequence[Any]) -> Any:
        if all(value == values[0] for value in values):
            return values[0]  # a plain number is less work
        if isinstance(values[0], tuple):
            return tuple(map(together, zip(*values, strict=True)))
        return torch.tensor(values, dtype=torch.float64, device=device)

    merged = {
        name: together([_coerced(own[name], default, f"{optimizer}[{name}]") for own in settings])
        for name, default in entry.settings.items()
    }
    return entry.make(params, merged, together(rates), models=len(settings))


def stack_key(optimizer: str, settings: Mapping[str, Value]) -> Hashable:
    """The same for settings with which runs of this optimizer can be in one stack: all but the numbers of each model's own.

    ``None``: none can, since the optimizer is another package's.
    """
    entry = _entry(optimizer)
    if isinstance(entry, Rival):
        return None

    def fixed(value: Value, own: bool | tuple[bool, ...]) -> Hashable:
        if isinstance(value, Sequence) and not isinstance(value, str):
            parts = own if isinstance(own, tuple) else (own,) * len(value)
            return tuple(map(fixed, value, parts))
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return "a number" if own is True and is_number else (type(value), value)

    return tuple(
        (name, fixed(value, entry.per_model.get(name, False))) for name, value in sorted(settings.items())
    )


def _entry(name: str) -> Entry | Rival:
    if name not in CATALOGUE:
        raise UserError(f"There is no optimizer {name!r}; {_nearest(name, CATALOGUE)}.")
    return CATALOGUE[name]


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}" if near else f"there are {', '.join(known)}"


def _coerced(value: Value, default: Value, setting: str) -> Value:
    """``value`` in the type of ``default``: equal settings must be equal however they were written."""
    if isinstance(default, Sequence) and not isinstance(default, str):
        if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != len(default):
            raise UserError(
                f"{setting} takes {len(default)} values, such as {written(default)}, not {written(value)}."
            )
        return tuple(_scalar(v, d, setting) for v, d in zip(value, default, strict=True))
    return _scalar(value, default, setting)


def _scalar(value: Value, default: Scalar, setting: str) -> Scalar:
    if type(value) is type(default):
        return cast(Scalar, value)
    if value is None and type(default) is str:
        return "none"  # a word after all
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and type(default) is float:
        return float(cast(float, value))
    if number and type(default) is int and float(cast(float, value)).is_integer():
        return int(cast(float, value))
    kind = {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[type(default)]
    raise UserError(f"{setting} takes {kind}, such as {written(default)}, not {written(value)}.")
