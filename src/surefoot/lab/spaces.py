"""What a search varies: for each optimizer of the catalogue a space of its own, and how a user changes it.

A space has a dimension for each name: a setting of the optimizer, one entry of a setting that is a tuple (``betas.0``),
``rate`` or ``batch``. No dimension depends on another. Standard library only.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard, cast

from surefoot.lab.errors import UserError
from surefoot.lab.plan import MethodRequest, parse_value, written
from surefoot.lab.runs import Scalar, Value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyright: ignore[reportMissingImports]

RATE, BATCH = "rate", "batch"
DIGITS = 4
"""What is drawn from a range is rounded to so many significant digits (on a linear one, of its width): a setting that
can be read, typed and compared, and no worse for it."""
POINTS = 5
"""Of a linear range in a grid, unless it says how many."""
MOST_POINTS = 1000
_SCALES = ("log", "linear")


@dataclass(frozen=True)
class Range:
    """Every number from ``low`` to ``high``."""

    low: float
    high: float
    log: bool = False
    """Whether its logarithm is searched evenly."""
    whole: bool = False
    """Whether it has whole numbers only."""
    points: int | None = None
    """In a grid; ``None``: one a decade on a logarithmic range, ``POINTS`` on a linear one."""

    def rounded(self, value: float) -> float:
        """The nearest number of the range with a few digits."""
        if self.whole:
            return int(min(max(round(value), self.low), self.high))
        if self.log:
            value = float(f"{value:.{DIGITS - 1}e}")
        else:
            value = round(value, DIGITS - 1 - math.floor(math.log10(self.high - self.low)))
        return min(max(value, self.low), self.high)

    def grid(self) -> Choices:
        """Points evenly spaced over it, both ends included."""
        count = self.points or (round(math.log10(self.high / self.low)) + 1 if self.log else POINTS)
        count = max(count, 2)
        steps = [index / (count - 1) for index in range(count)]
        if self.log:
            found = [self.low * (self.high / self.low) ** step for step in steps]
        else:
            found = [self.low + (self.high - self.low) * step for step in steps]
        return Choices(tuple(dict.fromkeys(map(self.rounded, found))))


@dataclass(frozen=True)
class Choices:
    """Each of these values."""

    values: tuple[Value, ...]


Dimension = Range | Choices
Space = Mapping[str, Dimension]
Setting = Mapping[str, Value]
"""A point of a space."""


def _log(low: float, high: float) -> Range:
    return Range(low, high, log=True)


_WINDOW = {"window": _log(10, 1000), "etas.0": Range(0.3, 0.9), "etas.1": Range(1.05, 1.5)}
_BETAS = {"betas.0": Range(0.5, 0.99), "betas.1": Choices((0.9, 0.99, 0.999))}
_MOMENTUM = {"momentum": Range(0.5, 0.99)}
_HYPERREG = {RATE: _log(1e-2, 1e4), "longest_step": _log(1e-2, 1)}
_LOSSGRAD = {
    RATE: _log(1e-6, 1),
    "up": Range(1.01, 1.3),
    "down": Range(1.01, 1.5),
    "threshold": Range(0.2, 0.8),
}
_L4 = {RATE: _log(1e-2, 0.5), "attainable": Range(0.5, 0.99)}
_SPS = {RATE: _log(1e-2, 10), "c": Range(0.1, 1.0)}
_QLAB = {RATE: _log(1e-6, 1), "growth": Range(1.2, 4.0)}
_HYPER_RATE = {"hyper_rate": _log(1e-9, 1e-2)}
_PARAMETER_FREE = {RATE: _log(0.1, 10)}

SPACES: Mapping[str, Space] = {
    "sgd": {RATE: _log(1e-4, 10)},
    "momentum": {RATE: _log(1e-4, 1), **_MOMENTUM},
    "nesterov": {RATE: _log(1e-4, 1), **_MOMENTUM},
    "adam": {RATE: _log(1e-5, 0.1), **_BETAS},
    "adamw": {RATE: _log(1e-5, 0.1), **_BETAS, "weight_decay": _log(1e-4, 1)},
    "srprop": {RATE: _log(1e-5, 0.1), **_WINDOW},
    "sgd-upd": {RATE: _log(1e-4, 1), **_WINDOW, "momentum": Range(0.0, 0.95)},
    "adam-upd": {RATE: _log(1e-5, 0.1), **_WINDOW},
    "momentum-window": {RATE: _log(1e-4, 1), **_WINDOW, **_MOMENTUM},
    "nesterov-window": {RATE: _log(1e-4, 1), **_WINDOW, **_MOMENTUM},
    "core": {RATE: _log(1e-5, 1e-2), "etas.0": Range(0.5, 0.95), "etas.1": Range(1.05, 1.4)},
    "dropout-rprop": {RATE: _log(1e-3, 1), "etas.0": Range(0.1, 0.9), "etas.1": Range(1.005, 1.2)},
    **{
        f"hyperreg-{divergence}{algorithm}": _HYPERREG
        for divergence in ("kl", "rkl", "h", "x", "n")
        for algorithm in (1, 2, 3)
    },
    "wngrad": {RATE: _log(1e-3, 1e3)},
    "lossgrad": _LOSSGRAD,
    **{f"lossgrad-{direction}": _LOSSGRAD for direction in ("momentum", "nesterov", "adam", "sign")},
    **dict.fromkeys(("l4", "l4-momentum", "l4-adam"), _L4),
    **dict.fromkeys(("sps", "sps-momentum", "sps-adam"), _SPS),
    "pal": {RATE: _log(1e-3, 1), "stretch": Range(0.8, 2.0), "momentum": Range(0.0, 0.9)},
    **dict.fromkeys(("qlab", "qlab-momentum", "qlab-adam"), _QLAB),
    "hypergradient": {RATE: _log(1e-4, 1), **_HYPER_RATE},
    "hypergradient-momentum": {RATE: _log(1e-4, 1), **_HYPER_RATE, **_MOMENTUM},
    "hypergradient-nesterov": {RATE: _log(1e-4, 1), **_HYPER_RATE, **_MOMENTUM},
    "hypergradient-adam": {RATE: _log(1e-5, 0.1), "hyper_rate": _log(1e-11, 1e-4)},
    "prodigy": {**_PARAMETER_FREE, "betas.0": Range(0.5, 0.99)},
    "schedulefree-adamw": {RATE: _log(1e-4, 0.1), "betas.0": Range(0.5, 0.99)},
    "schedulefree-sgd": {RATE: _log(1e-2, 10), **_MOMENTUM},
    "dadapt-adam": {**_PARAMETER_FREE, "betas.0": Range(0.5, 0.99)},
    "dadapt-sgd": {**_PARAMETER_FREE, "momentum": Range(0.0, 0.95)},
    "dog": {**_PARAMETER_FREE, "reps_rel": _log(1e-8, 1e-3)},
    "ldog": {**_PARAMETER_FREE, "reps_rel": _log(1e-8, 1e-3)},
    "momo": {RATE: _log(1e-2, 10), "beta": Range(0.5, 0.99)},
    "momo-adam": {RATE: _log(1e-4, 1), "betas.0": Range(0.5, 0.99)},
}
"""What is searched for each optimizer unless the user says otherwise. A range is over whole numbers where the optimizer's
setting is one (``window``); that the optimizer takes both ends of each is tested."""


def parse_dimension(text: str) -> tuple[str, Dimension]:
    """One ``--range``: ``name=low:high``, with ``:log`` and a grid's number of points after it if wanted, or ``name=a|b|c``.

    Raises:
        UserError: it is neither.
    """
    name, equals, values = (part.strip() for part in text.partition("="))
    if not equals or not name or not values:
        raise UserError(f"--range is {text!r}; write name=low:high, name=low:high:log or name=value|value.")
    entries = values.split("|")
    if len(entries) > 1 or ":" not in values:
        return name, _choices(
            [parse_value(entry.strip(), name, text) for entry in entries], f"--range {text}"
        )
    low, high, *more = (entry.strip() for entry in values.split(":"))
    scale = more.pop(0) if more and more[0] in _SCALES else "linear"
    first, last, *counts = (
        _number(parse_value(entry, name, text), f"--range {text}") for entry in (low, high, *more)
    )
    if len(counts) > 1:
        raise UserError(f"--range {text!r} has more than low:high:log:points.")
    return name, _range(first, last, scale, counts[0] if counts else None, f"--range {text}")


def read_space(path: Path) -> dict[str, Dimension]:
    """The space of a TOML file: for each name a list of values, a table with ``low``, ``high``, ``scale``, ``points``, or a value.

    Raises:
        UserError: the file cannot be read, or something else is in it.
    """
    try:
        record = tomllib.loads(path.read_text(encoding="utf8"))
    except OSError as error:
        raise UserError(f"--space is {str(path)!r}, which cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"--space is {str(path)!r}, which is no TOML: {str(error).rstrip('.')}.") from None
    return dict(_dimensions(record, f"--space {path}"))


def check(space: Space, fixed: Sequence[str]) -> None:
    """Refuses a space that gives something twice: beside what is ``fixed``, or a tuple besides one of its entries.

    Raises:
        UserError: it does.
    """
    for name in space:
        for other in (*fixed, *space):
            if other in fixed and overlap(name, other):
                raise UserError(f"{other} is given a value and {name} a range; leave one of them out.")
            if other != name and overlap(name, other):
                raise UserError(f"{name} and {other} cannot both have a range; leave one of them out.")


def overlap(one: str, other: str) -> bool:
    """Whether two names are the same setting, or one is an entry of the other."""
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")


def typed(space: Space, defaults: Setting) -> dict[str, Dimension]:
    """The space with its ranges over whole numbers where the setting is a whole number.

    Args:
        space: what was asked for.
        defaults: every setting of the optimizer. Names that are not among them are left as they are.

    Raises:
        UserError: a range where the setting is no number, an entry that there is not, or ends that are not whole.
    """
    return {name: _typed(name, dimension, defaults) for name, dimension in space.items()}


def gridded(space: Space) -> dict[str, Dimension]:
    """The space with the points of a grid in place of every range."""
    return {name: d.grid() if isinstance(d, Range) else d for name, d in space.items()}


def size(space: Space) -> float:
    """How many points it has; infinity if it has a range of numbers that are not whole."""
    sizes = (
        len(d.values) if isinstance(d, Choices) else d.high - d.low + 1 if d.whole else math.inf
        for d in space.values()
    )
    return math.prod(sizes)


def points(space: Space) -> Iterator[Setting]:
    """Every point of a space that has finitely many, the last dimension fastest."""
    values = [
        d.values if isinstance(d, Choices) else range(int(d.low), int(d.high) + 1) for d in space.values()
    ]
    return (dict(zip(space, point, strict=True)) for point in itertools.product(*values))


def ends(space: Space) -> list[Setting]:
    """Points that have, together, both ends of every range and each of the choices."""
    values = [d.values if isinstance(d, Choices) else (d.low, d.high) for d in space.values()]
    longest = max(map(len, values), default=1)
    return [
        {name: entry[min(index, len(entry) - 1)] for name, entry in zip(space, values, strict=True)}
        for index in range(longest)
    ]


def in_words(dimension: Dimension) -> str:
    """For a person."""
    if isinstance(dimension, Choices):
        return " | ".join(map(written, dimension.values))
    whole = "whole numbers " if dimension.whole else ""
    return f"{whole}{written(dimension.low)} to {written(dimension.high)}{', logarithmic' if dimension.log else ''}"


def plain(space: Space) -> dict[str, dict[str, Any]]:
    """The space as plain values, with all that decides what is tried."""
    return {name: asdict(replace(d, points=None) if isinstance(d, Range) else d) for name, d in space.items()}


def request(base: MethodRequest, defaults: Setting, setting: Setting) -> MethodRequest:
    """``base`` with a point of the space, under a label that asks for the same as an optimizer of ``--optimizers``.

    Args:
        base: the optimizer, with what is fixed.
        defaults: every setting of the optimizer.
        setting: the point.
    """
    settings, searched = dict(base.settings), dict(setting)
    rate, batch = searched.pop(RATE, base.rate), searched.pop(BATCH, base.batch_size)
    for name, value in searched.items():
        whole, _, index = name.partition(".")
        if index and whole in defaults:
            entries = list(cast(Sequence[Scalar], settings.get(whole, defaults[whole])))
            entries[int(index)] = cast(Scalar, value)
            value = tuple(entries)
        settings[whole] = value
    shown = {RATE: rate, **({} if batch is None else {BATCH: batch}), **settings}
    inside = ",".join(f"{name}={written(value)}" for name, value in shown.items())
    label = f"{base.optimizer}[{inside}]"
    return MethodRequest(label, base.optimizer, settings, cast("int | None", batch), cast(float, rate))


def _dimensions(record: Mapping[str, Any], where: str) -> Iterator[tuple[str, Dimension]]:
    for name, value in record.items():
        here = f"{where}, {name}"
        if not isinstance(value, dict):
            values = value if isinstance(value, list) else [value]
            yield name, _choices([_from_toml(entry, name, here) for entry in values], here)
        elif value and all(key.isdigit() for key in value):  # betas.0 = ..., which TOML takes for a table
            yield from _dimensions({f"{name}.{key}": entry for key, entry in value.items()}, where)
        elif not {"low", "high"} <= value.keys() <= {"low", "high", "scale", "points"}:
            raise UserError(f"{here} is a table; it needs low and high, and may have scale and points.")
        else:
            low, high = (_number(value[end], here) for end in ("low", "high"))
            points = _number(value["points"], here) if "points" in value else None
            yield name, _range(low, high, value.get("scale", "linear"), points, here)


def _from_toml(value: Any, name: str, where: str) -> Value:
    if isinstance(value, str):
        return parse_value(value, name, where)
    if isinstance(value, list):
        return tuple(cast(Scalar, _from_toml(entry, name, where)) for entry in value)
    if isinstance(value, bool | int | float):
        return value
    raise UserError(f"{where} has {value}, which is neither a number nor true, false or a word.")


def _choices(values: Sequence[Value], where: str) -> Choices:
    for value in values:
        if sum(written(value) == written(other) for other in values) > 1:
            raise UserError(f"{where} has the value {written(value)} twice; leave one of them out.")
    if not values:
        raise UserError(f"{where} has no values.")
    return Choices(tuple(values))


def _range(low: float, high: float, scale: str, points: float | None, where: str) -> Range:
    if scale not in _SCALES:
        raise UserError(f"{where} has the scale {scale!r}; it must be log or linear.")
    if not low < high:
        raise UserError(
            f"{where} goes from {written(low)} to {written(high)}; the first must be the smaller."
        )
    if scale == "log" and low <= 0:
        raise UserError(f"{where} begins at {written(low)}; a logarithmic range must begin above 0.")
    if points is not None and not (float(points).is_integer() and 2 <= points <= MOST_POINTS):
        raise UserError(
            f"{where} has {written(points)} points; it must be a whole number from 2 to {MOST_POINTS}."
        )
    return Range(low, high, scale == "log", points=None if points is None else int(points))


def _number(value: Any, where: str) -> float:
    if not _is_number(value) or not math.isfinite(value):
        raise UserError(f"{where} has {written(value)!r} where a finite number is wanted.")
    return value


def _typed(name: str, dimension: Dimension, defaults: Setting) -> Dimension:
    whole, _, index = name.partition(".")
    if name in (RATE, BATCH):
        default: Value = 1.0 if name == RATE else 1
        for value in dimension.values if isinstance(dimension, Choices) else (dimension.low, dimension.high):
            if not (_is_number(value) and value > 0 and (name == RATE or float(value).is_integer())):
                kind = "a number above 0" if name == RATE else "a whole number of at least 1"
                raise UserError(f"The search has a {name} of {written(value)}; it must be {kind}.")
    elif whole not in defaults:
        return dimension  # the catalogue knows what was meant
    else:
        default = defaults[whole]
    if index:
        entries = default if isinstance(default, tuple) else ()
        if not (index.isdigit() and int(index) < len(entries)):
            names = ", ".join(f"{whole}.{i}" for i in range(len(entries))) or f"only {whole} itself"
            raise UserError(f"There is no {name} to search; there is {names}.")
        default = entries[int(index)]
    if isinstance(dimension, Choices):
        return dimension
    if isinstance(default, float):
        return replace(dimension, low=float(dimension.low), high=float(dimension.high))
    if isinstance(default, bool | str | tuple):
        raise UserError(
            f"{name} is no number, so it has no range; name its values: --range {name}={written(default)}|..."
        )
    if not (float(dimension.low).is_integer() and float(dimension.high).is_integer()):
        raise UserError(
            f"{name} takes whole numbers; its range cannot be {written(dimension.low)} to {written(dimension.high)}."
        )
    return replace(dimension, low=int(dimension.low), high=int(dimension.high), whole=True)


def _is_number(value: Value) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
