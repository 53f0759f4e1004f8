"""Optimizers that others maintain, through their own packages and never rewritten. Nothing is imported before it is named.

Each package's class is derived from, with one of the adapters here in front of it, so that the laboratory drives it like
an optimizer of surefoot's: ``step(loss=..., evaluate=...)``, :meth:`~Adapted.rates` and :meth:`~Adapted.averaged`.
"""

from __future__ import annotations

import inspect
import io
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from surefoot.lab.errors import UserError
from surefoot.lab.runs import Value
from surefoot.optim import Rates
from surefoot.optim.space import Space

_NOT_SETTINGS = frozenset({"lr", "foreach", "fsdp_in_use", "log_every", "slice_p"})
"""The rate, and how a step is computed rather than what it is."""


class Adapted(Optimizer):
    """What the laboratory asks of an optimizer, for one whose effective rate is its ``lr``."""

    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        loss: Tensor | None = None,
        evaluate: Callable[[], Tensor] | None = None,
    ) -> Any:
        """The package's own step. Only Momo goes by the loss, and none evaluates it again."""
        return self._move(closure, loss)

    def _move(self, closure: Callable[[], float] | None, loss: Tensor | None) -> Any:
        return cast(Any, super()).step(closure)

    @torch.no_grad()
    def rates(self) -> Rates:
        """The effective rates now, over all weights together, without a histogram. Waits for the device."""
        rates = [
            (p, torch.as_tensor(rate, dtype=torch.float64))
            for group in self.param_groups
            for p, rate in zip(group["params"], self._effective(group), strict=True)
        ]
        mean, std = Space().mean_std([rate.expand(p.shape) for p, rate in rates])
        numbers = [float(rate) for _, rate in rates]
        return Rates(float(mean), float(std), min(numbers), max(numbers), (), ())

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the weights are those that the method's authors evaluate; afterwards they are what they were."""
        yield

    def _effective(self, group: Mapping[str, Any]) -> Sequence[float | Tensor]:
        """What each parameter's update was multiplied by in the last step, as far as the package tells."""
        return [self._rate(group)] * len(group["params"])

    def _rate(self, group: Mapping[str, Any]) -> float:
        return group["lr"]

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _fill_gradients(self) -> None:
        """A gradient of zero for each parameter that has none, at which some packages fail."""
        for p in self._parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)


class _Distance(Adapted):
    """Prodigy and DAdaptAdam: lr times the distance ``d`` that they estimate."""

    def _rate(self, group: Mapping[str, Any]) -> float:
        return group["lr"] * group["d"]


class _NormedDistance(Adapted):
    """DAdaptSGD: besides, over the norm of the first gradient; unknown before there is one."""

    def _move(self, closure: Callable[[], float] | None, loss: Tensor | None) -> Any:
        try:
            return super()._move(closure, loss)
        except (
            ZeroDivisionError
        ):  # no gradient but zero so far: nothing has moved, and the next one is the first
            return loss

    def _rate(self, group: Mapping[str, Any]) -> float:
        norm = group.get("g0_norm", math.nan)
        return group["lr"] * group["d"] / norm if norm else 0.0


class _ScheduleFree(Adapted):
    """Gradients are taken at one point and the loss is evaluated at another: the package's two modes."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        cast(Any, self).train()

    def _rate(self, group: Mapping[str, Any]) -> float:
        return group["scheduled_lr"] if group["k"] else group["lr"]  # its own warm-up included

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with _put_back(self._parameters()):  # the package's way back rounds
            cast(Any, self).eval()
            try:
                yield
            finally:
                cast(Any, self).train()


class _DoG(Adapted):
    """DoG and LDoG: evaluated at the package's polynomial-decay average, without which they are not meant to be used."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._averager = import_module("dog").PolynomialDecayAverager(nn.ParameterList(self._parameters()))

    def _move(self, closure: Callable[[], float] | None, loss: Tensor | None) -> Any:
        self._fill_gradients()
        value = super()._move(closure, loss)
        self._averager.step()
        return value

    def _effective(self, group: Mapping[str, Any]) -> Sequence[float | Tensor]:
        return group.get("eta") or [math.nan] * len(group["params"])  # unknown before the first gradient

    @contextmanager
    def averaged(self) -> Iterator[None]:
        with _put_back(self._parameters()):
            _copy(self._averager.averaged_model.parameters(), self._parameters())
            yield


class _ByLoss(Adapted):
    """MomoAdam goes by the loss. Its lr is a cap; how far below it a step went, it does not tell."""

    def _move(self, closure: Callable[[], float] | None, loss: Tensor | None) -> Any:
        return cast(Any, super(Adapted, self)).step(closure, loss)


class _Momo(_ByLoss):
    """Momo too, and it fails at a parameter without gradient."""

    def _move(self, closure: Callable[[], float] | None, loss: Tensor | None) -> Any:
        self._fill_gradients()
        return super()._move(closure, loss)


@torch.no_grad()
def _copy(sources: Iterable[Tensor], targets: Iterable[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


@contextmanager
def _put_back(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Whatever happens to the parameters inside, afterwards they are what they were, to the bit."""
    kept = [p.detach().clone() for p in parameters]
    try:
        yield
    finally:
        _copy(kept, parameters)


@dataclass(frozen=True)
class Rival:
    """One optimizer of a package. Everything but its summary needs the package, and says in a sentence if it is missing."""

    summary: str
    distribution: str
    """As pip knows the package."""
    path: str
    """Module and class."""
    adapter: type[Adapted]

    @property
    def origin(self) -> Mapping[str, Value]:
        """The package and its version, which decides the numbers.

        Raises:
            UserError: it is not installed.
        """
        return {"package": f"{self.distribution} {self._version()}"}

    @property
    def settings(self) -> Mapping[str, Value]:
        """The plain options of the class, with their defaults.

        Raises:
            UserError: the package is not installed.
        """
        return {
            name: _default(parameter)
            for name, parameter in inspect.signature(self._imported()).parameters.items()
            if name not in _NOT_SETTINGS and _is_plain(parameter.default)
        }

    def make(self, params: Iterable[Tensor], settings: Mapping[str, Value], rate: float) -> Adapted:
        """The optimizer, with ``rate`` as its lr.

        Raises:
            UserError: the package is not installed.
        """
        optimizer = _behind(self.adapter, self._imported())
        with _quietly():
            return cast(Callable[..., Adapted], optimizer)(params, lr=rate, **settings)

    def _imported(self) -> type[Optimizer]:
        self._version()  # a module of that name may be another package's
        module, _, name = self.path.partition(".")
        return getattr(import_module(module), name)

    def _version(self) -> str:
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            raise UserError(
                f"{self.path.partition('.')[2]} is in the package {self.distribution}, which is not installed; "
                f"install it by: pip install {self.distribution}"
            ) from None


@cache
def _behind(adapter: type[Adapted], optimizer: type[Optimizer]) -> type[Adapted]:
    return type(optimizer.__name__, (adapter, optimizer), {})


def _is_plain(default: Any) -> bool:
    values = default if isinstance(default, tuple) else (default,)
    return all(isinstance(value, bool | int | float | str) for value in values)


def _default(parameter: inspect.Parameter) -> Value:
    """The default; a number such as ``weight_decay=0`` is no whole one unless the signature says so."""
    default = parameter.default
    counts = parameter.annotation in (int, "int")
    return float(default) if type(default) is int and not counts else default


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what some packages print or log when they are made, which would come once for every run."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(before)


RIVALS: Mapping[str, Rival] = {
    "prodigy": Rival(
        "Prodigy (Mishchenko and Defazio 2023), meant for rate 1",
        "prodigyopt",
        "prodigyopt.Prodigy",
        _Distance,
    ),
    "schedulefree-adamw": Rival(
        "Schedule-Free AdamW (Defazio et al. 2024)",
        "schedulefree",
        "schedulefree.AdamWScheduleFree",
        _ScheduleFree,
    ),
    "schedulefree-sgd": Rival(
        "Schedule-Free SGD (Defazio et al. 2024)",
        "schedulefree",
        "schedulefree.SGDScheduleFree",
        _ScheduleFree,
    ),
    "dadapt-adam": Rival(
        "D-Adaptation with Adam (Defazio and Mishchenko 2023), meant for rate 1",
        "dadaptation",
        "dadaptation.DAdaptAdam",
        _Distance,
    ),
    "dadapt-sgd": Rival(
        "D-Adaptation with SGD (Defazio and Mishchenko 2023), meant for rate 1",
        "dadaptation",
        "dadaptation.DAdaptSGD",
        _NormedDistance,
    ),
    "dog": Rival(
        "Distance over gradients (Ivgi et al. 2023), averaged, meant for rate 1",
        "dog-optimizer",
        "dog.DoG",
        _DoG,
    ),
    "ldog": Rival(
        "DoG for each tensor (Ivgi et al. 2023), averaged, meant for rate 1",
        "dog-optimizer",
        "dog.LDoG",
        _DoG,
    ),
    "momo": Rival(
        "Momentum with a model-based rate (Schaipp et al. 2023), the rate being a cap",
        "momo-opt",
        "momo.Momo",
        _Momo,
    ),
    "momo-adam": Rival(
        "Adam with a model-based rate (Schaipp et al. 2023), the rate being a cap",
        "momo-opt",
        "momo.MomoAdam",
        _Momo,
    ),
}
"""The optimizers of other packages by the names of the command line."""
