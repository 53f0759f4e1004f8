"""Weights of 16 bits: the part of a step that they cannot hold is kept beside them.

A bfloat16 weight has 8 significant bits, so a step below 1/512 of it would be lost. Its value here is the sum of the
parameter and a float32 tensor, ``compensation``, exactly a float32 number; arithmetic is done on the sum.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype that the arithmetic is done in: the weight's own, but at least float32."""
    return torch.promote_types(weight.dtype, torch.float32)


def is_short(weight: Tensor) -> bool:
    """Whether a weight has too few bits to add small steps to."""
    return weight.dtype in (torch.bfloat16, torch.float16)


def rounding(dtypes: Iterable[torch.dtype]) -> float:
    """The relative rounding of what has gone through numbers of all these dtypes: that of the coarsest."""
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def widen(weight: Tensor, compensation: Tensor) -> Tensor:
    """The value of a short weight, in float32."""
    return weight.float() + compensation


def narrow_(weight: Tensor, compensation: Tensor, value: Tensor) -> None:
    """Store a float32 value as a short weight and what is left over."""
    weight.copy_(value)
    compensation.copy_(value - weight.float())
