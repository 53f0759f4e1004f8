"""What is evaluated: the iterates themselves, or a mean of them that is kept beside the weights.

An average never moves a weight: training is the same with and without, and :meth:`SelfTuning.averaged` swaps it in for
an evaluation. Rules that go by the loss of one batch at a time do not anneal, so the mean of their iterates is often
much better than the last one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from surefoot.optim.parts import Number, Part, State, all_of, require


@dataclass(frozen=True)
class Average(Part):
    """Base of all averages: a ← a + c_t (w - a), with w the weight after its t-th step and c_1 = 1."""

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("average"),)

    def coefficient(self, step: int, options: Mapping[str, Any]) -> Number:
        """c_t."""
        raise NotImplementedError

    def fold(self, average: Tensor, weight: Tensor, step: int, options: Mapping[str, Any]) -> None:
        """Take one more iterate into the average, in place."""
        average.lerp_(weight, self.coefficient(step, options))


@dataclass(frozen=True)
class Mean(Average):
    """The mean of all iterates, c_t = 1 / t, or with ``gamma`` above 0 of the later ones rather than the early ones.

    c_t = (1 + gamma) / (t + gamma): iterate i weighs about (i / t)^gamma (polynomial-decay averaging, Shamir & Zhang,
    arXiv 1212.1824). ``gamma``: at least 0; 8 weighs the last fifth of training most.
    """

    gamma: Number = 0.0

    def check(self) -> None:
        require("gamma", self.gamma, "at least 0", lambda v: v >= 0)

    def coefficient(self, step: int, options: Mapping[str, Any]) -> Number:
        gamma = options["gamma"]
        return (1 + gamma) / (step + gamma)


@dataclass(frozen=True)
class Exponential(Average):
    """The exponential mean, c_t = (1 - decay) / (1 - decay^t), in which the initial weights have no part.

    ``decay`` in [0, 1); 0.999 looks back over about a thousand steps.
    """

    decay: Number = 0.999

    def check(self) -> None:
        require("decay", self.decay, "in [0, 1)", lambda v: all_of(v >= 0, v < 1))

    def coefficient(self, step: int, options: Mapping[str, Any]) -> Number:
        decay = options["decay"]
        return (1 - decay) / (1 - decay**step)


BY_NAME: Mapping[str, type[Average]] = {"mean": Mean, "exponential": Exponential}


def by_name(name: str) -> Average | None:
    """The average called "mean" or "exponential", as it comes; ``None`` for "none"."""
    known = ("none", *BY_NAME)
    require("average", name, f"one of {', '.join(known)}", lambda v: v in known)
    return BY_NAME[name]() if name != "none" else None
