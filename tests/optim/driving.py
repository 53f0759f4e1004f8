"""How these tests drive a torch optimizer over the problems of ``oracles``: gradients made outside autograd."""

from __future__ import annotations

import copy
import io

import torch
from oracles import NoisyQuadratic

SHAPES = ((), (1,), (11,), (5, 4), (2, 3, 2, 2), (1, 1, 1))


def problems(steps, *, shapes=SHAPES, seed=0, **options):
    """One problem a shape, each with its own noise."""
    return [NoisyQuadratic(shape, steps, seed=100 * seed + i, **options) for i, shape in enumerate(shapes)]


def parameters(tasks, dtype=torch.float64):
    """Fresh parameters at the problems' starts."""
    return [torch.nn.Parameter(torch.tensor(task.start, dtype=dtype)) for task in tasks]


def put_gradients(params, tasks, t, *, scale=1.0):
    """Set every parameter's ``.grad`` for step ``t``; a parameter without a gradient of its own is left alone."""
    for p, task in zip(params, tasks, strict=True):
        if p.requires_grad:
            p.grad = torch.as_tensor(scale * task.gradient(p.detach().numpy(), t), dtype=p.dtype).reshape(
                p.shape
            )


def values(params):
    """Copies of the parameters' values."""
    return [p.detach().clone() for p in params]


def through_bytes(state):
    """A state dict as it comes back from a file that is read in torch's safe mode."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_memory(state):
    """A state dict that shares nothing with the optimizer it came from."""
    return copy.deepcopy(state)


def assert_close(actual, expected, tolerance=1e-12, context=""):
    """Every pair of tensors agrees to ``tolerance``, absolutely for small numbers and relatively for large ones."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        torch.testing.assert_close(
            a.detach(),
            torch.as_tensor(e, dtype=a.dtype).detach().reshape(a.shape),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, i=i: f"{context} tensor {i}: {text}",
        )


def assert_same(actual, expected, context=""):
    """Every pair of tensors is equal bit for bit (two NaNs differ)."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        e = torch.as_tensor(e, dtype=a.dtype).reshape(a.shape)
        assert torch.equal(a.detach(), e), f"{context} tensor {i}: {(a - e).abs().max()} apart"
