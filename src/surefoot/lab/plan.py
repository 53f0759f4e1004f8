"""What the user asked for, parsed: which optimizers with which settings, which rates, and the runs that follow."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

from surefoot.lab.errors import UserError
from surefoot.lab.runs import Method, RunSpec, Scalar, TaskInfo, Value

_OPTIMIZER = re.compile(r"\s*(?P<name>[A-Za-z][A-Za-z0-9_-]*)\s*(?:\[(?P<settings>.*)\]\s*)?", re.DOTALL)
_SETTING = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_FLOAT = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_INFINITY = re.compile(r"[+-]?inf", re.IGNORECASE)
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.+/-]*")
_CONSTANTS: Mapping[str, Scalar] = {"true": True, "false": False, "none": None}
MOST_RUNS = 100_000
"""A comparison of more runs is refused: it would take minutes to plan and most likely years to train."""

_LONGEST_INTEGER = 18  # digits: what fits into 64 bits, and so into every tensor and every database


@dataclass(frozen=True)
class MethodRequest:
    """One optimizer with one combination of settings, as the user wrote it."""

    label: str
    """The optimizer and the settings given, one alternative of each: ``"adam-upd[window=600]"``."""
    optimizer: str
    settings: Mapping[str, Value]
    """Only those that the user gave, without the reserved names ``batch`` and ``rate``."""
    batch_size: int | None
    """From the reserved setting ``batch``; ``None``: not given."""
    rate: float | None
    """From the reserved setting ``rate``; ``None``: every rate of the grid."""


def parse_optimizers(text: str) -> list[MethodRequest]:
    """The optimizers of ``--optimizers``, every alternative of every setting multiplied out, in the order written.

    Grammar: ``name`` or ``name[setting=value,...]``, separated by commas. ``|`` separates the alternatives of a
    setting, ``:`` the entries of a tuple: ``"adam,srprop[window=50|600,etas=0.5:1.2]"`` asks for three. A value is a
    number, ``true``, ``false``, ``none`` or a word. The labels, joined by commas, parse to the same requests again.

    Raises:
        UserError: the text does not follow the grammar, or asks twice for the same thing.
    """
    requests = [request for item in _split_outside_brackets(text) for request in _expand(item)]
    seen: set[str] = set()
    for request in requests:
        if request.label in seen:
            raise UserError(f"--optimizers names {request.label!r} twice; leave one of them out.")
        seen.add(request.label)
    return requests


def parse_rates(text: str) -> tuple[float, ...]:
    """The initial rates of ``--rates``, ascending: ``"1e-5:1e1"`` is every decade with both ends; or ``"1e-3,3e-3"``.

    Raises:
        UserError: nothing is left, an entry is not a positive number, or a range is reversed or not whole decades.
    """
    rates = [rate for item in text.split(",") for rate in _rates_of(item.strip(), text)]
    return tuple(sorted(set(rates)))


def parse_value(text: str, key: str, label: str) -> Value:
    """The value of setting ``key``, as ``label`` has it: a scalar, or with ``:`` in it a tuple of them.

    Raises:
        UserError: it is no value.
    """
    entries = [_scalar(entry, key, label) for entry in text.split(":")]
    return entries[0] if len(entries) == 1 else tuple(entries)


def written(value: Value) -> str:
    """A value as it is written on the command line: :func:`parse_value` gives it back."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ":".join(map(written, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def check_size(requests: Sequence[MethodRequest], rates: Sequence[float], seeds: int) -> None:
    """Refuses a comparison of too many runs, before any of them is made up.

    Raises:
        UserError: it has more than ``MOST_RUNS``.
    """
    runs = seeds * sum(len(rates) if request.rate is None else 1 for request in requests)
    if runs > MOST_RUNS:
        raise UserError(
            f"The comparison has {runs:,} runs and may have at most {MOST_RUNS:,}; "
            "ask for fewer seeds, rates or optimizers."
        )


def specs(task: TaskInfo, methods: Sequence[Method], epochs: int, seeds: Sequence[int]) -> list[RunSpec]:
    """The runs of a comparison, each once: methods with the same settings and rate share theirs.

    The seeds come outermost, so that an interrupted comparison has whole seeds to compare, not whole optimizers.
    """
    runs = (
        RunSpec(
            task=task.name,
            task_version=task.version,
            optimizer=method.optimizer,
            settings=method.settings,
            rate=rate,
            batch_size=method.batch_size,
            epochs=epochs,
            seed=seed,
        )
        for seed in seeds
        for method in methods
        for rate in method.rates
    )
    return list({run.key: run for run in runs}.values())


def _split_outside_brackets(text: str) -> Iterator[str]:
    start, opened = 0, False
    for position, character in enumerate(text):
        if character == "[":
            if opened:
                raise UserError(f"--optimizers has a '[' inside brackets at {_excerpt(text, position)}.")
            opened = True
        elif character == "]":
            if not opened:
                raise UserError(f"--optimizers has a ']' without a '[' at {_excerpt(text, position)}.")
            opened = False
        elif character == "," and not opened:
            yield text[start:position]
            start = position + 1
    if opened:
        raise UserError(f"--optimizers has a '[' without a ']' in {text[start:].strip()!r}.")
    yield text[start:]


def _excerpt(text: str, position: int) -> str:
    return repr(text[max(0, position - 20) : position + 1].strip())


def _expand(item: str) -> Iterator[MethodRequest]:
    """Every combination of the alternatives in one ``name[...]``."""
    if not item.strip():
        raise UserError(
            "--optimizers has an empty name; write them separated by single commas: adam,srprop[window=50]."
        )
    match = _OPTIMIZER.fullmatch(item)
    if match is None:
        raise UserError(
            f"--optimizers has {item.strip()!r}, which is neither a name nor name[setting=value,...] "
            "such as srprop[window=50|600]."
        )
    name, inside = match["name"], match["settings"]
    if inside is None:
        yield MethodRequest(name, name, {}, None, None)
        return
    alternatives: dict[str, list[str]] = {}
    for setting in inside.split(","):
        key, values = _alternatives(setting, item.strip())
        if key in alternatives:
            raise UserError(f"{item.strip()!r} gives {key} twice; separate alternatives by '|': {key}=1|2.")
        alternatives[key] = values
    combinations = math.prod(map(len, alternatives.values()))
    if combinations > MOST_RUNS:
        raise UserError(
            f"--optimizers asks for {combinations:,} combinations of settings of {name!r}; "
            f"a comparison may have at most {MOST_RUNS:,} runs."
        )
    for texts in itertools.product(*alternatives.values()):
        label = f"{name}[{','.join(f'{key}={text}' for key, text in zip(alternatives, texts, strict=True))}]"
        settings = {key: parse_value(text, key, label) for key, text in zip(alternatives, texts, strict=True)}
        batch = _batch(settings.pop("batch"), label) if "batch" in settings else None
        rate = _rate(settings.pop("rate"), label) if "rate" in settings else None
        yield MethodRequest(label, name, settings, batch, rate)


def _alternatives(setting: str, item: str) -> tuple[str, list[str]]:
    """``"etas = 0.5 : 1.2 | 1"`` is ``("etas", ["0.5:1.2", "1"])``."""
    key, equals, values = (part.strip() for part in setting.partition("="))
    if not equals or not _SETTING.fullmatch(key):
        raise UserError(f"{item!r} has {setting.strip()!r} where a setting is wanted, such as window=50.")
    texts = [":".join(entry.strip() for entry in text.split(":")) for text in values.split("|")]
    for text in texts:
        if not all(text.split(":")):
            raise UserError(
                f"{item!r} gives {key} an empty value; write {key}=1, {key}=1|2 or {key}=1:2 for a tuple."
            )
        if texts.count(text) > 1:
            raise UserError(f"{item!r} gives {key} the value {text} twice; leave one of them out.")
    return key, texts


def _scalar(text: str, key: str, label: str) -> Scalar:
    if text.lower() in _CONSTANTS:
        return _CONSTANTS[text.lower()]
    if _INTEGER.fullmatch(text):
        if len(text.lstrip("+-")) > _LONGEST_INTEGER:
            raise UserError(f"{label!r} gives {key} the value {text}, an integer of more than 64 bits.")
        return int(text)
    if _INFINITY.fullmatch(text):
        return float(text)
    if _FLOAT.fullmatch(text):
        number = float(text)
        if math.isinf(number):
            raise UserError(
                f"{label!r} gives {key} the value {text}, which is too large for a number; write inf."
            )
        return number
    if _WORD.fullmatch(text) and text.lower() != "nan":
        return text
    raise UserError(
        f"{label!r} gives {key} the value {text}, which is neither a number nor true, false, none or a word."
    )


def _batch(value: Value, label: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"{label!r} needs a batch of at least 1 pattern, a whole number.")
    return value


def _rate(value: Value, label: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise UserError(f"{label!r} needs a rate above 0, a finite number.")
    return float(value)


def _rates_of(item: str, text: str) -> list[float]:
    """One entry of ``--rates``: a number, or a range of decades. Decimal, so that 1e-5 x 10^3 is exactly 1e-2."""
    if not item:
        raise UserError(
            f"--rates {text!r} has an empty entry; write decades as 1e-5:1e1, or numbers separated by commas."
        )
    ends = [_positive(end.strip(), text) for end in item.split(":")]
    if len(ends) == 1:
        return [float(ends[0])]
    if len(ends) > 2:
        raise UserError(
            f"--rates {text!r} has more than one ':' in {item!r}; write the first and the last decade: 1e-5:1e1."
        )
    low, high = ends
    if low > high:
        raise UserError(f"--rates {text!r} is empty, for {low} is above {high}; write the smaller one first.")
    decades = (high / low).log10()
    if decades != decades.to_integral_value():
        raise UserError(
            f"--rates {text!r} is not a whole number of decades from {low} to {high}; name the rates one by one."
        )
    return [float(low.scaleb(decade)) for decade in range(int(decades) + 1)]


def _positive(text: str, whole: str) -> Decimal:
    try:
        number = Decimal(text)
        value = float(number)
    except (InvalidOperation, ValueError, OverflowError):
        raise UserError(f"--rates {whole!r} has {text!r}, which is not a number such as 1e-3.") from None
    if not 0 < value < math.inf:
        raise UserError(f"--rates {whole!r} has {text}, which is not a finite number above 0.")
    return number
