"""Whether two models of one make differ in nothing but the values of their parameters and buffers."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_forward_hooks", "_forward_pre_hooks"}
_GENERATORS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


def difference(first: nn.Module, other: nn.Module) -> str | None:
    """What else than the values of parameters and buffers tells the two apart, or may do so; ``None``: nothing.

    One of them can then stand for the other when it is given the other's parameters and buffers.
    """
    pairs = list(zip(first.named_modules(), other.named_modules(), strict=False))
    if [name for name, _ in first.named_modules()] != [name for name, _ in other.named_modules()]:
        return "the number of its layers"
    comparison = _Comparison({id(a): id(b) for (_, a), (_, b) in pairs})
    for (name, a), (_, b) in pairs:
        where = f"{type(a).__name__}{f' {name}' if name else ''}"
        if type_before_parametrizations(a) is not type_before_parametrizations(b):
            return "the kind of its layers"
        own, others = ({k: v for k, v in vars(m).items() if k not in _OF_EVERY_MODULE} for m in (a, b))
        for key in own.keys() | others.keys():
            if key not in own or key not in others or not comparison.alike(own[key], others[key]):
                what = "a hook" if key.endswith("_hooks") else f"attribute {key}"
                return f"{what} of {where}, which is neither parameter nor buffer,"
    for kind in ("parameter", "buffer"):
        tensors = [dict(getattr(model, f"named_{kind}s")()) for model in (first, other)]
        shapes = [{n: (t.shape, t.dtype, t.requires_grad) for n, t in own.items()} for own in tensors]
        if shapes[0] != shapes[1]:
            return f"the shape of its {kind}s"
    return None


class _Comparison:
    """Of two objects part by part; what is of no known kind is taken to differ."""

    def __init__(self, twins: Mapping[int, int]) -> None:
        self._twins = twins  # by id: a module of the first model, and the one in its place in the other
        self._met: dict[tuple[int, int], Any] = {}  # with the objects, so that no other can get their ids

    def alike(self, a: Any, b: Any) -> bool:
        if isinstance(a, nn.Module):
            return self._twins.get(id(a)) == id(b)
        if type(a) is not type(b) or isinstance(a, _GENERATORS):  # which would draw the same for every model
            return False
        if isinstance(a, Tensor):  # one that is trained would not be the stack's
            return not a.requires_grad and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        if isinstance(a, np.ndarray):
            return a.dtype == b.dtype and np.array_equal(a, b)
        if a is b and isinstance(a, str | bytes | type | BuiltinFunctionType | FunctionType):
            return True
        if (id(a), id(b)) in self._met:  # on the way round a circle
            return True
        self._met[id(a), id(b)] = (a, b)
        if isinstance(a, Mapping):
            keys = list(zip(a, b, strict=False)) if all(isinstance(key, int) for key in a) else None
            if keys is not None:  # hooks, numbered as they came
                return len(a) == len(b) and all(self.alike(a[i], b[j]) for i, j in keys)
            return a.keys() == b.keys() and all(self.alike(a[key], b[key]) for key in a)
        if isinstance(a, str | bytes | AbstractSet):
            return a == b
        if isinstance(a, Sequence):
            return len(a) == len(b) and all(map(self.alike, a, b))
        if isinstance(a, FunctionType):
            return a.__code__ is b.__code__ and self.alike(self._bound_to(a), self._bound_to(b))
        if isinstance(a, MethodType):
            return a.__func__ is b.__func__ and self.alike(a.__self__, b.__self__)
        if isinstance(a, partial):
            return self.alike((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
        if type(a).__eq__ is not object.__eq__:
            return bool(a == b)
        return a is b or (hasattr(a, "__dict__") and self.alike(vars(a), vars(b)))

    @staticmethod
    def _bound_to(function: FunctionType) -> tuple[Any, ...]:
        cells = tuple(cell.cell_contents for cell in function.__closure__ or ())
        return (*cells, function.__defaults__ or (), function.__kwdefaults__ or {})
