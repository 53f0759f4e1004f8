"""Sums over "the parameters", whatever they are: those of one model, or of a stack of K models.

The only room that knows which. In a stack every parameter has a leading axis of K models, every hyper-parameter that is
a number may be a tensor ``[K]``, and every sum is one for each model, ``[K]``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.optim.precision import working_dtype


def is_at_hand(value: Tensor) -> bool:
    """Whether the host may look at a value without waiting for a device: it is the host's own."""
    return value.device.type == "cpu"


@dataclass(frozen=True)
class Space:
    """One model (``models=None``) or a stack of K models (``models=K``)."""

    models: int | None = None

    def __post_init__(self) -> None:
        if self.models is not None and not (isinstance(self.models, int) and self.models >= 1):
            raise ValueError(f"models must be None or a whole number of at least 1, not {self.models!r}.")

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one number for each model: ``()``, or ``(K,)`` in a stack."""
        return () if self.models is None else (self.models,)

    def dimensions(self, weight: Tensor) -> int:
        """Dimensions of a parameter without the stack's axis: 1 for a bias, 2 for a matrix."""
        return weight.ndim - len(self.shape)

    def admits(self, weight: Tensor) -> bool:
        """Whether a parameter has the leading axis that a stack needs."""
        return self.models is None or (weight.ndim >= 1 and weight.shape[0] == self.models)

    def spread(self, value: Any, weight: Tensor, dtype: torch.dtype | None = None) -> Any:
        """A number for each model, ``[K]``, shaped to broadcast against ``weight``; anything else unchanged.

        It comes on the weight's device and in the dtype that arithmetic on the weight is done in, unless another is
        given.
        """
        if isinstance(value, tuple):
            return tuple(self.spread(v, weight, dtype) for v in value)
        if self.models is not None and isinstance(value, Tensor) and value.shape == self.shape:
            dtype = dtype or working_dtype(weight)
            return value.to(weight.device, dtype).view(-1, *[1] * (weight.ndim - 1))
        return value

    def gather(self, options: Mapping[str, Any]) -> Mapping[str, Any]:
        """What :meth:`options` spread, a number for each model being a tensor ``[K]`` again."""
        if self.models is None:
            return options
        return {name: self._gathered(value) for name, value in options.items()}

    def _gathered(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(self._gathered, value))
        return value.reshape(self.shape) if isinstance(value, Tensor) and value.ndim else value

    def options(self, group: Mapping[str, Any], weight: Tensor) -> Mapping[str, Any]:
        """A group's options with every number spread over ``weight``."""
        if self.models is None:
            return group
        return {name: self.spread(value, weight) for name, value in group.items() if name != "params"}

    def sum(self, tensors: Iterable[Tensor]) -> Tensor:
        """Sum of all entries of all tensors, in float64, on the first one's device; zero for no tensor."""
        total: Tensor | None = None
        for tensor in tensors:
            part = tensor.reshape(*self.shape, -1).sum(-1, dtype=torch.float64)
            total = part if total is None else total + part.to(total.device)
        return torch.zeros(self.shape, dtype=torch.float64) if total is None else total

    def dot(self, xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Tensor:
        """Sum over all tensors of the products of their entries: <x, y>, in float64."""
        return self.sum(x.to(torch.float64) * y for x, y in zip(xs, ys, strict=True))

    def mean_std(self, tensors: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Mean and unbiased standard deviation (n - 1) of all entries of all tensors; 0 for a single entry."""
        count = sum(t.numel() for t in tensors) // (self.models or 1)
        mean = self.sum(tensors) / max(count, 1)
        doubles = (t.double() for t in tensors)  # one at a time: they are twice as large
        variance = self.sum((t - self.spread(mean.to(t.device), t)).square() for t in doubles) / max(
            count - 1, 1
        )
        return mean, variance.sqrt()
