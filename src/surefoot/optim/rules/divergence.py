"""Hyper-regularization: the rate from a maxmin problem with a phi-divergence (arXiv 2104.05447; ICLR 2019 S1e_ssC5F7).

With beta = 1 / rate and c = ``radius``^2, at every step and for each weight (or tensor, or all weights together)

    max over beta  min over x   g (x - x_t) + 1/2 [beta (x - x_t)^2 - c beta_t phi(beta / beta_t)]

Five generators phi and three ways to solve it. With z = beta_{t+1} / beta_t and s = |g| / (radius beta_t):

=========== ===================== ============================ ==========================
divergence  phi(z)                z, joint:  phi'(z) z^2 = s^2 z, fixed:  phi'(z) = s^2
=========== ===================== ============================ ==========================
kl          z ln z - z + 1        exp(W(2 s^2) / 2)            exp(s^2)
rkl         z - 1 - ln z          (1 + sqrt(1 + 4 s^2)) / 2    1 / (1 - s^2)
hellinger   (sqrt(z) - 1)^2       y^2 with y^4 - y^3 = s^2     1 / (1 - s^2)^2
chi2        (z - 1)^2 / 2         z^3 - z^2 = s^2              1 + s^2
neyman      (z - 1)^2 / z         sqrt(1 + s^2)                1 / sqrt(1 - s^2)
=========== ===================== ============================ ==========================

*Joint* solves for both at once; *fixed* solves for beta at the displacement g / beta_t. rkl, hellinger and neyman have a
pole there: from s = 1 on every larger beta is better, so the clip decides. Since phi' is negative below 1, **beta never
decreases: the rate can only go down**.

What is sourced: the problem, the four divergences (not neyman), that there are three algorithms, exact and approximate,
the growth clip of 2, the start at a fixed rate. Reconstructed: that 1, 2 and 3 are the three below in this order, the
factor 1/2 of chi2 (from the claim that WNGrad is a case), and every closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from surefoot.optim.parts import Number, Slot, State, all_of, require
from surefoot.optim.rules.base import Rule

SCOPES = ("weight", "tensor", "global")
AFTER_WARMUP = ("hold", "reset")

# Each function below returns z - 1, by how much of itself beta grows: z would round what is below 1e-16 away.


def kl_joint(s: Tensor) -> Tensor:
    """ln z = W(2 s^2) / 2, W by Fritsch, Shafer & Crowley (CACM 16, 1973): a sweep makes four right digits of one."""
    s = s.clamp(min=1e-150)  # W(0) / 0 is 0 / 0
    log = torch.log1p(2 * s * s)
    w = log * (1 - torch.log1p(log) / (2 + log))
    for _ in range(2):
        r = torch.log(2 * s * (s / w)) - w
        q = 2 * (1 + w) * (1 + w + 2 / 3 * r)
        w = w * (1 + r / (1 + w) * (q - r) / (q - 2 * r))
    return torch.expm1(w / 2)


def kl_fixed(s: Tensor) -> Tensor:
    """z = exp(s^2)."""
    return torch.expm1(s * s)


def rkl_joint(s: Tensor) -> Tensor:
    """z = (1 + sqrt(1 + 4 s^2)) / 2."""
    return s * (2 * s / (1 + torch.hypot(torch.ones_like(s), 2 * s)))


def rkl_fixed(s: Tensor) -> Tensor:
    """z = 1 / (1 - s^2), infinite from the pole s = 1 on."""
    return torch.where(s >= 1, math.inf, s * s / ((1 - s) * (1 + s)))


def hellinger_joint(s: Tensor) -> Tensor:
    """z = y^2 with y^4 - y^3 = s^2: Newton for v = y - 1, v (1 + v)^3 = s^2, in a form that cancels nothing."""
    v = s * s / (1 + s * s.sqrt())
    for _ in range(5):
        v = (3 * v * v + (s / (1 + v)) ** 2) / (1 + 4 * v)
    return v * (v + 2)


def hellinger_fixed(s: Tensor) -> Tensor:
    """z = 1 / (1 - s^2)^2, infinite from the pole s = 1 on."""
    return torch.where(s >= 1, math.inf, s * s * (2 - s * s) / ((1 - s) * (1 + s)) ** 2)


def chi2_joint(s: Tensor) -> Tensor:
    """The real root of z^3 - z^2 = s^2: z = 1 + 4/3 sinh^2(asinh(3 sqrt(3) s / 2) / 3)."""
    return 4 / 3 * torch.sinh(torch.asinh(1.5 * 3**0.5 * s) / 3) ** 2


def chi2_fixed(s: Tensor) -> Tensor:
    """z = 1 + s^2."""
    return s * s


def neyman_joint(s: Tensor) -> Tensor:
    """z = sqrt(1 + s^2)."""
    return s * (s / (1 + torch.hypot(torch.ones_like(s), s)))


def neyman_fixed(s: Tensor) -> Tensor:
    """z = 1 / sqrt(1 - s^2), infinite from the pole s = 1 on."""
    root = torch.sqrt((1 - s) * (1 + s))
    return torch.where(s >= 1, math.inf, s * s / (root * (1 + root)))


@dataclass(frozen=True)
class Generator:
    """What there is to know of one phi: z - 1 as a function of s."""

    joint: Callable[[Tensor], Tensor]
    fixed: Callable[[Tensor], Tensor]
    runs_away: bool = True
    """Whether ``fixed`` may send beta so high that the rate is zero for ever."""


GENERATORS: Mapping[str, Generator] = {
    "kl": Generator(kl_joint, kl_fixed),
    "rkl": Generator(rkl_joint, rkl_fixed),
    "hellinger": Generator(hellinger_joint, hellinger_fixed),
    "chi2": Generator(chi2_joint, chi2_fixed, runs_away=False),
    "neyman": Generator(neyman_joint, neyman_fixed),
}


def adapt(
    beta: Tensor,
    size: Tensor,
    divergence: str,
    algorithm: int,
    growth: Number | None,
    radius: Number,
    longest_step: Number | None,
) -> tuple[Tensor, Tensor]:
    """beta_{t+1}, and the beta that the step divides by; ``size`` is |u|, everything in float64.

    beta_t <- max(beta_t, |u| / longest_step);  beta_{t+1} = min(z, growth) beta_t, z joint in algorithm 1, else fixed;
    the step divides by beta_{t+1}, in algorithm 3 by beta_t.
    """
    if longest_step is not None:
        beta = torch.maximum(beta, size / longest_step)
    s = (size / (radius * beta)).clamp(max=1e150)  # so that no square overflows
    generator = GENERATORS[divergence]
    rise = generator.joint(s) if algorithm == 1 else generator.fixed(s)
    new = beta + beta * (rise if growth is None else rise.clamp(max=growth - 1))
    return new, beta if algorithm == 3 else new


@dataclass(frozen=True)
class Divergence(Rule):
    """Hyper-regularization: r = 1 / beta, beta by :func:`adapt` at every step; see the module for the formulas.

    With a direction other than SGD the rule looks at the direction's update u in place of the gradient g. Coupled weight
    decay (L2) is in both, decoupled weight decay in neither. ``lr`` multiplies the step and nothing that beta sees.

    Args:
        divergence: "kl", "rkl", "hellinger", "chi2" (Pearson's) or "neyman".
        algorithm: 1 joint, step by beta_{t+1}; 2 fixed displacement, step by beta_{t+1}; 3 the same beta as 2, step by
            beta_t. The numbers are a reconstruction.
        initial_rate: 1 / beta_0, above 0.
        scope: what has a beta of its own: "weight" (|u| is the absolute value), "tensor" or "global" (|u| is the 2-norm;
            in a stack each model's own). With "global" all groups have the same options.
        growth: beta_{t+1} <= growth beta_t: at least 1; ``None`` (or infinity) for no limit, which algorithms 2 and 3
            of all but chi2 refuse: a beta that is infinite stays so.
        radius: sqrt(c), above 0: the displacement, in units of a weight, that counts as large. Where the rule is joint,
            unclipped and not kl or chi2, no step (of a weight, tensor, ..., at lr = 1) is as long.
        longest_step: raise beta so far that no step is longer than this (of a weight, tensor, ..., at lr = 1), above 0.
            ``None`` (or infinity) is the published rule, which diverges where ``initial_rate`` is large. At the first
            step this is the start beta_0 = max(1 / initial_rate, |u| / longest_step); later it is a guard for
            weights whose first gradients are small. In the scopes "tensor" and "global" 1 is a better value than 0.1.
        warmup_steps: that many steps are made with ``warmup_rate``, above 0, of any length, while beta stays as it is.
        after_warmup: "hold" goes on from ``initial_rate``; "reset" from ``warmup_rate``, so ``initial_rate`` is not used.

    State besides the direction's: beta in float64 (8 bytes for each weight; for each tensor; or 24 bytes for all), since
    float32 would lose all growth where |u| / beta is below 2e-4.
    """

    divergence: str = "rkl"
    algorithm: int = 1
    initial_rate: Number = 1.0
    scope: str = "weight"
    growth: Number | None = 2.0
    radius: Number = 1.0
    longest_step: Number | None = 0.1
    warmup_steps: int = 0
    warmup_rate: Number = 1e-2
    after_warmup: str = "hold"

    def check(self) -> None:
        known = ", ".join(GENERATORS)
        require("divergence", self.divergence, f"one of {known}", lambda v: v in GENERATORS)
        require("algorithm", self.algorithm, "1, 2 or 3", lambda v: type(v) is int and v in (1, 2, 3))
        require("radius", self.radius, "above 0 and finite", lambda v: all_of(v > 0, v < math.inf))
        for name in ("initial_rate", "warmup_rate"):
            allowed = "above 0 and finite, as its inverse has to be"
            require(
                name, getattr(self, name), allowed, lambda v: all_of(v > 0, v < math.inf, 1 / v < math.inf)
            )
        require("scope", self.scope, f"one of {', '.join(SCOPES)}", lambda v: v in SCOPES)
        require("growth", self.growth, "at least 1, or None", lambda v: v is None or v >= 1)
        if self.algorithm != 1 and GENERATORS[self.divergence].runs_away:
            require(
                "growth",
                self.growth,
                f"finite for algorithm {self.algorithm} of {self.divergence}, whose beta may become infinite and stay so",
                lambda v: v is not None and v < math.inf,
            )
        require("longest_step", self.longest_step, "above 0, or None", lambda v: v is None or v > 0)
        require(
            "warmup_steps",
            self.warmup_steps,
            "a whole number of at least 0",
            lambda v: isinstance(v, int) and v >= 0,
        )
        require(
            "after_warmup",
            self.after_warmup,
            f"one of {', '.join(AFTER_WARMUP)}",
            lambda v: v in AFTER_WARMUP,
        )
        if self.after_warmup == "reset" and not self.warmup_steps:
            raise ValueError("after_warmup='reset' needs warmup_steps above 0.")

    def _start(self, options: Mapping[str, Any]) -> Number:
        """1 / beta_0."""
        return options["warmup_rate" if options["after_warmup"] == "reset" else "initial_rate"]

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        if options["scope"] == "global":
            return ()
        start = 1 / self._start(options)
        return (State("beta", start, torch.float64, per_model=options["scope"] == "tensor"),)

    def declare_shared(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        if options["scope"] != "global":
            return ()
        return (State("beta", 1 / self._start(options)), State("rate"), State("age"))

    def measure(
        self,
        slots: Sequence[Slot],
        shared: dict[str, Tensor],
        options: Mapping[str, Any],
        loss: Tensor | None,
    ) -> None:
        updates = [slot.update for slot in slots]
        size = slots[0].space.dot(updates, updates).sqrt()
        beta, rate, age = shared["beta"], shared["rate"], shared["age"]
        new, used = _adapt(beta, size.to(beta.device), options)
        # The steps of a parameter would not do to count by: one that is late would warm up alone.
        warm = age >= options["warmup_steps"]
        rate.copy_(torch.where(warm, 1 / used, options["warmup_rate"]))
        beta.copy_(torch.where(warm, new, beta))
        age.add_(1)

    def choose(self, slot: Slot) -> Number:
        o, state = slot.options, slot.state
        slot.adapted = state["step"] >= o["warmup_steps"]
        if o["scope"] == "global":
            return slot.spread(slot.shared["rate"])
        if state["step"] <= o["warmup_steps"]:
            return o["warmup_rate"]
        if o["scope"] == "weight":
            beta, used = _adapt(state["beta"], slot.update.to(torch.float64).abs(), o)
        else:
            size = slot.space.dot([slot.update], [slot.update]).sqrt()
            beta, used = _adapt(state["beta"], size, slot.space.gather(o))
        rate = slot.spread(1 / used)  # before beta is stored: in algorithm 3 both are the old one
        slot.store(beta=beta)
        return rate

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        rate = 1 / state["beta"] if "beta" in state else self._start(options)
        if "age" in state:
            return torch.where(state["age"] >= options["warmup_steps"], rate, options["warmup_rate"])
        return rate if state.get("step", 0) >= options["warmup_steps"] else options["warmup_rate"]


def _adapt(beta: Tensor, size: Tensor, o: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """:func:`adapt` with a group's options."""
    return adapt(beta, size, o["divergence"], o["algorithm"], o["growth"], o["radius"], o["longest_step"])
