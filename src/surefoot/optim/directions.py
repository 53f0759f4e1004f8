"""Which way: a direction turns the gradient into the update ``u`` that the weight goes against.

Each is a frozen dataclass (its fields are the options that a parameter group may override) and one pure function of
tensors. Times a constant rate they are the optimizers of ``torch.optim``:

=============== ================================= ==========================================
direction       times ``rules.Constant(r)``       update
=============== ================================= ==========================================
``SGD``         ``torch.optim.SGD(lr=r)``         u = g
``Momentum``    ``SGD(momentum=mu)``              b <- mu b + (1 - dampening) g;  u = b
``Nesterov``    ``SGD(momentum=mu, nesterov)``    b <- mu b + g;  u = g + mu b
``Adam``        ``Adam`` / ``AdamW``              u = m_hat / (sqrt(v_hat) + eps)
``Sign``        signSGD                           u = sign(g)
=============== ================================= ==========================================

Weight decay ``w`` is *coupled* by default (g <- g + w weight, as in ``torch.optim.SGD`` and ``Adam``); with
``decoupled_weight_decay`` it is added to the update instead (u <- u + w weight, as in ``AdamW``), so that the rate
scales it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from surefoot.optim.parts import Direction, Number, Slot, State, all_of, is_some, require, require_pair


@dataclass(frozen=True)
class SGD(Direction):
    """The gradient itself: u = g."""

    def propose(self, slot: Slot) -> Tensor:
        return slot.grad


@dataclass(frozen=True)
class Sign(Direction):
    """The sign of the gradient: u = sign(g), with sign(0) = 0. Weight decay is decoupled from the sign by default."""

    decoupled_weight_decay: bool = field(default=True, kw_only=True)

    def propose(self, slot: Slot) -> Tensor:
        return torch.sign(slot.grad)


@dataclass(frozen=True)
class Momentum(Direction):
    """Heavy ball as in ``torch.optim.SGD``: b <- mu b + (1 - dampening) g, from b = g at the first step; u = b."""

    momentum: Number = 0.9
    dampening: Number = 0.0

    def check(self) -> None:
        super().check()
        require("momentum", self.momentum, "in [0, 1)", lambda v: all_of(v >= 0, v < 1))
        require("dampening", self.dampening, "in [0, 1]", lambda v: all_of(v >= 0, v <= 1))

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("momentum_buffer"),)

    def propose(self, slot: Slot) -> Tensor:
        o, buffer = slot.options, slot.state["momentum_buffer"]
        if slot.state["step"] == 1:
            return buffer.copy_(slot.grad)
        dampening = o["dampening"]
        fresh = slot.grad * (1 - dampening) if is_some(dampening) else slot.grad
        return buffer.mul_(o["momentum"]).add_(fresh)

    def raw(self, slot: Slot) -> Tensor:
        return slot.grad

    def gain(self, options: Mapping[str, Any]) -> Number:
        return (1 - options["dampening"]) / (1 - options["momentum"])


@dataclass(frozen=True)
class Nesterov(Direction):
    """Nesterov's momentum as in ``torch.optim.SGD``: b <- mu b + g;  u = g + mu b."""

    momentum: Number = 0.9

    def check(self) -> None:
        super().check()
        require("momentum", self.momentum, "in [0, 1)", lambda v: all_of(v >= 0, v < 1))

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("momentum_buffer"),)

    def propose(self, slot: Slot) -> Tensor:
        momentum = slot.options["momentum"]
        buffer = slot.state["momentum_buffer"].mul_(momentum).add_(slot.grad)
        return slot.grad + momentum * buffer

    def raw(self, slot: Slot) -> Tensor:
        return slot.grad

    def gain(self, options: Mapping[str, Any]) -> Number:
        return 1 / (1 - options["momentum"])


_fused_adam_: Callable[..., None] = cast(Any, torch)._fused_adam_
"""What ``torch.optim.Adam(fused=True)`` calls; its public form takes three times as long to get there."""


def adam_(
    g: Tensor,
    m: Tensor,
    v: Tensor,
    betas: tuple[Number, Number],
    step: int,
    eps: Number,
    largest: Tensor | None = None,
) -> Tensor:
    """m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  returns u = m_hat / (sqrt(v_hat) + eps).

    ``largest``: AMSGrad's running maximum of v, which takes v's place in u. On the CPU torch's fused kernel does all in one
    pass, where it serves, in less than half the time; on other devices it has not been tried.
    """
    beta1, beta2 = betas
    is_plain = largest is None and not any(isinstance(number, Tensor) for number in (beta1, beta2, eps))
    if is_plain and m.device.type == "cpu" and _are_alike(g, m, v):
        u = torch.zeros_like(m)
        views = _in_memory_order(u, g, m, v)
        if views is not None:
            _fused_adam_(
                *([view] for view in views),
                [],
                [torch.tensor(float(step), dtype=torch.float32, device="cpu")],
                lr=-1.0,  # from a weight of 0 it so comes to u
                beta1=beta1,
                beta2=beta2,
                weight_decay=0.0,
                eps=eps,
                amsgrad=False,  # its maximum takes a NaN or not, depending on where it lies
                maximize=False,
            )
            return u
    m.lerp_(g, 1 - beta1)
    v.mul_(beta2)
    # Not a lerp: an overflowed v must stay infinite, and lerp makes NaN of it.
    v = v.add_(g.square() * (1 - beta2)) if isinstance(beta2, Tensor) else v.addcmul_(g, g, value=1 - beta2)
    if largest is not None:
        v = torch.maximum(largest, v, out=largest)
    return adam_ratio(m, v, beta1, beta2, step, eps)


def _are_alike(g: Tensor, m: Tensor, v: Tensor) -> bool:
    """Whether the fused kernel, which takes all for what the first is, can be given these. Compiled code cannot call it."""
    return (
        not torch.compiler.is_compiling()
        and type(g) is type(m) is type(v) is Tensor
        and g.shape == m.shape == v.shape
        and g.dtype == m.dtype == v.dtype
        and g.device == m.device == v.device
        and not (g.is_neg() or g._is_zerotensor())
    )


def _in_memory_order(first: Tensor, *others: Tensor) -> list[Tensor] | None:
    """The tensors with their axes in the order of the first one's strides, so that they are contiguous; or else ``None``."""
    tensors = [first, *others]
    if all(tensor.is_contiguous() for tensor in tensors):
        return tensors
    order = sorted(range(first.ndim), key=first.stride, reverse=True)
    views = [tensor.permute(order) for tensor in tensors]
    return views if all(view.is_contiguous() for view in views) else None


def adam_ratio(m: Tensor, v: Tensor, beta1: Number, beta2: Number, step: int, eps: Number) -> Tensor:
    """u = m_hat / (sqrt(v_hat) + eps), with m_hat = m / (1 - beta1^t) and v_hat = v / (1 - beta2^t)."""
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    # Both corrections go into the denominator, where they cost one pass over the tensor less.
    return m / v.sqrt().mul_(correction1 / correction2**0.5).add_(correction1 * eps)


@dataclass(frozen=True)
class Adam(Direction):
    """Adam (Kingma & Ba, arXiv 1412.6980), as in ``torch.optim``; with ``decoupled_weight_decay``, AdamW.

    m <- b1 m + (1 - b1) g;  v <- b2 v + (1 - b2) g^2;  u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps).
    With ``amsgrad`` the running maximum of v takes its place. ``betas`` in [0, 1), ``eps`` at least 0.
    """

    betas: tuple[Number, Number] = (0.9, 0.999)
    eps: Number = 1e-8
    amsgrad: bool = False

    def check(self) -> None:
        super().check()
        require_pair("betas", self.betas, "both in [0, 1)", lambda a, b: all_of(a >= 0, a < 1, b >= 0, b < 1))
        require("eps", self.eps, "at least 0", lambda v: v >= 0)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        names = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(options["amsgrad"])
        return tuple(State(name) for name in names)

    def propose(self, slot: Slot) -> Tensor:
        o, state = slot.options, slot.state
        largest = state["max_exp_avg_sq"] if o["amsgrad"] else None
        m, v = state["exp_avg"], state["exp_avg_sq"]
        return adam_(slot.grad, m, v, o["betas"], state["step"], o["eps"], largest)

    def raw(self, slot: Slot) -> Tensor:
        o, state = slot.options, slot.state
        v = state["max_exp_avg_sq"] if o["amsgrad"] else state["exp_avg_sq"]
        return adam_ratio(slot.grad, v, 0.0, o["betas"][1], state["step"], o["eps"])


BY_NAME: Mapping[str, type[Direction]] = {
    "sgd": SGD,
    "momentum": Momentum,
    "nesterov": Nesterov,
    "adam": Adam,
    "sign": Sign,
}


def by_name(name: str, **options: Any) -> Direction:
    """The direction called "sgd", "momentum", "nesterov", "adam" or "sign", with these options."""
    require("direction", name, f"one of {', '.join(BY_NAME)}", lambda v: v in BY_NAME)
    return BY_NAME[name](**options)


@dataclass(frozen=True)
class AnnealedAdam(Direction):
    """CoRe's direction: Adam whose first beta moves from a to b (Eckhoff & Reiher, CoRe optimizer 1.1).

    ``betas`` = (a, b, c, b2):  b1_t = b + (a - b) exp(-((t - 1) / c)^2);  m <- b1_t m + (1 - b1_t) g;
    v <- b2 v + (1 - b2) g^2;  u = m / (1 - b1_t^t) / (sqrt(v / (1 - b2^t)) + eps), or sign(m) where b2 < 0.
    Weight decay shrinks each weight in proportion to its own step: u <- u + weight_decay |u| weight.
    """

    betas: tuple[Number, Number, Number, float] = (0.7375, 0.8125, 250.0, 0.99)
    eps: Number = 1e-8
    weight_decay: Number = field(default=0.1, kw_only=True)
    decoupled_weight_decay: bool = field(default=True, kw_only=True)

    def check(self) -> None:
        super().check()
        require("betas", self.betas, "four numbers (a, b, c, b2)", lambda v: len(v) == 4)
        a, b, c, beta2 = self.betas
        require("betas[0] (a)", a, "in [0, 1)", lambda v: all_of(v >= 0, v < 1))
        require("betas[1] (b)", b, "in [0, 1)", lambda v: all_of(v >= 0, v < 1))
        require("betas[2] (c)", c, "above 0", lambda v: v > 0)
        require("betas[3] (b2)", beta2, "a number below 1", lambda v: not isinstance(v, Tensor) and v < 1)
        require("eps", self.eps, "at least 0", lambda v: v >= 0)
        require("decoupled_weight_decay", self.decoupled_weight_decay, "True here", lambda v: v is True)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        names = ["exp_avg"] + ["exp_avg_sq"] * (options["betas"][3] >= 0)
        return tuple(State(name) for name in names)

    def shrink(self, update: Tensor, weight: Tensor, options: Mapping[str, Any]) -> Tensor:
        if is_some(options["weight_decay"]):
            return update + options["weight_decay"] * update.abs() * weight
        return update

    def propose(self, slot: Slot) -> Tensor:
        g, o, state, step = slot.grad, slot.options, slot.state, slot.state["step"]
        a, b, c, beta2 = o["betas"]
        fading = ((1 - step) / c) * ((1 - step) / c)
        beta1 = b + (a - b) * (torch.exp(-fading) if isinstance(fading, Tensor) else math.exp(-fading))
        m = state["exp_avg"]
        if beta2 < 0:
            return torch.sign(m.lerp_(g, 1 - beta1))
        return adam_(g, m, state["exp_avg_sq"], (beta1, beta2), step, o["eps"])

    def raw(self, slot: Slot) -> Tensor:
        beta2 = slot.options["betas"][3]
        if beta2 < 0:
            return torch.sign(slot.grad)
        return adam_ratio(
            slot.grad, slot.state["exp_avg_sq"], 0.0, beta2, slot.state["step"], slot.options["eps"]
        )
