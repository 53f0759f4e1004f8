"""Rprop's family: a rate for each weight, raised while successive signs agree and lowered where they differ.

Here with a decision at every step; :mod:`surefoot.optim.rules.window` makes the same decision once a window. Riedmiller
& Braun 1993 (Rprop), Igel & Huesken 2003 (iRprop-), Mosca & Magoulas arXiv 1509.04612 (with dropout), Eckhoff & Reiher
2023 (CoRe).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from surefoot.optim.parts import (
    Number,
    Slot,
    State,
    all_of,
    require,
    require_limits,
    require_pair,
    require_whole,
)
from surefoot.optim.rules.base import Rule


def adapt(
    rate: Tensor, agreement: Tensor, etas: tuple[Number, Number], step_sizes: tuple[Number, Number]
) -> Tensor:
    """rate <- clip(rate * phi, step_sizes), phi = eta+ where ``agreement`` > 0, eta- where < 0, else 1."""
    eta_minus, eta_plus = etas
    smallest, largest = step_sizes
    lowered = torch.where(agreement < 0, rate * eta_minus, rate)
    return torch.where(agreement > 0, rate * eta_plus, lowered).clamp_(min=smallest).clamp_(max=largest)


@dataclass(frozen=True)
class SignRule(Rule):
    """The options that the family shares.

    ``initial_rate``: above 0; also outside ``step_sizes``, which it is then pulled into when the rates first adapt.
    ``etas`` = (eta-, eta+) with 0 < eta- <= 1 <= eta+; ``step_sizes`` = (smallest, largest), both above 0.
    """

    initial_rate: Number = 1e-2
    etas: tuple[Number, Number] = (0.5, 1.2)
    step_sizes: tuple[Number, Number] = (1e-6, 50.0)

    def check(self) -> None:
        require("initial_rate", self.initial_rate, "above 0", lambda v: v > 0)
        require_pair(
            "etas",
            self.etas,
            "0 < etas[0] <= 1 <= etas[1]",
            lambda low, high: all_of(low > 0, low <= 1, high >= 1),
        )
        require_limits("step_sizes", self.step_sizes)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("rate", options["initial_rate"]), State("sign", 0.0, torch.int8))

    def current(self, state: Mapping[str, Any], options: Mapping[str, Any]) -> Number:
        return state.get("rate", options["initial_rate"])


def update_mask(slot: Slot) -> Tensor | None:
    """One Bernoulli(1 - dropout) draw for each weight; ``None`` where all may move (biases always).

    The draw depends on the seed, the step and the parameter's position alone, so a resumed run draws the same, and
    torch's own random stream is left as it is.
    """
    dropout, seed = slot.options["dropout"], slot.options["seed"]
    if dropout == 0 or slot.space.dimensions(slot.weight) < 2:
        return None
    stream = torch.Generator(slot.weight.device)
    stream.manual_seed((seed + 1_000_003 * (slot.state["step"] + 1_000_003 * slot.index)) % 2**63)
    shape = slot.weight.shape[len(slot.space.shape) :]
    return torch.rand(shape, generator=stream, device=slot.weight.device) >= dropout


# A generator of its own is nothing that can be compiled.
eager_update_mask = cast(Callable[[Slot], Tensor | None], torch.compiler.disable(update_mask))


def irprop_minus(
    u: Tensor,
    rate: Tensor,
    sign: Tensor,
    mask: Tensor | None,
    etas: tuple[Number, Number],
    step_sizes: tuple[Number, Number],
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask-aware iRprop- (Mosca & Magoulas): returns the rates to move by, the new rates, the new remembered signs.

    change = p u;  rate <- clip(rate * phi(change));  no move and p <- 0 where change < 0, else p <- sign(u).
    Where mask * u = 0: no move, and p keeps its value, so that a later comparison is not skipped. The rates ignore the
    mask.
    """
    change = sign * u
    rate = adapt(rate, change, etas, step_sizes)
    active = u != 0 if mask is None else mask & (u != 0)
    turned = change < 0
    moves = torch.where(active & ~turned, rate, torch.zeros_like(rate))
    sign = torch.where(active, torch.where(turned, torch.zeros_like(u), torch.sign(u)).to(sign.dtype), sign)
    return moves, rate, sign


@dataclass(frozen=True)
class Rprop(SignRule):
    """iRprop- on the direction's signs, aware of masks (section :func:`irprop_minus`).

    ``dropout`` in [0, 1): the chance that a weight (never a bias) sits out a step, drawn from ``seed`` (a whole number
    of at least 0; the models of a stack share their masks). The remembered sign starts at +1.
    State besides the direction's: the rate and an 8-bit sign.
    """

    dropout: float = 0.0
    seed: int = 0

    def check(self) -> None:
        super().check()
        require("dropout", self.dropout, "in [0, 1)", lambda v: 0 <= v < 1)
        require_whole("seed", self.seed, 0)

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        return (State("rate", options["initial_rate"]), State("sign", 1.0, torch.int8))

    def choose(self, slot: Slot) -> Tensor:
        o, state = slot.options, slot.state
        slot.adapted = True
        mask = eager_update_mask(slot)
        moves, rate, sign = irprop_minus(
            slot.update, state["rate"], state["sign"], mask, o["etas"], o["step_sizes"]
        )
        slot.store(rate=rate, sign=sign)
        return moves


def is_frozen(score: Tensor, count: int, rows: int) -> Tensor:
    """Which weights are among the ``count`` with the largest scores, in each of ``rows`` models (ties included)."""
    flat = score.reshape(rows, -1)
    threshold = 0.999999 * flat.topk(count, dim=1).values[:, -1:]
    return (flat >= threshold).view_as(score)


@dataclass(frozen=True)
class CoReRates(SignRule):
    """CoRe's rates: every step, by the sign of the smoothed gradient against the last, without backtracking.

    rate <- clip(rate * phi(P sign(u) sign(u_last)), step_sizes);  the weight moves by P * rate * u.
    Plasticity P (only with ``score_history`` = T > 0): a weight whose score S is among the ``int(frozen * numel)``
    largest of its tensor is held (P = 0) once t > T. S <- S + m rate u P / T, S decaying by 1 - 1/T once t > T.
    ``frozen`` in [0, 1]: a share of each tensor.
    """

    initial_rate: Number = 1e-3
    etas: tuple[Number, Number] = (0.7375, 1.2)
    step_sizes: tuple[Number, Number] = (1e-6, 1e-2)
    score_history: int = 0
    frozen: float = 0.0

    def check(self) -> None:
        super().check()
        require_whole("score_history", self.score_history, 0)
        require("frozen", self.frozen, "in [0, 1]", lambda v: 0 <= v <= 1)
        if self.frozen and not self.score_history:
            raise ValueError(
                "frozen needs a score_history above 0: without scores there is nothing to freeze by."
            )

    def declare(self, options: Mapping[str, Any]) -> tuple[State, ...]:
        scores = (State("score"),) if options["score_history"] else ()
        return (*super().declare(options), *scores)

    def needs(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("exp_avg",) if options["score_history"] else ()

    def choose(self, slot: Slot) -> Tensor:
        o, state, u = slot.options, slot.state, slot.update
        slot.adapted = True
        history, late = o["score_history"], state["step"] > o["score_history"]
        held: Tensor | None = None
        if history and late:
            rows = slot.space.models or 1
            if count := int(o["frozen"] * (u.numel() // rows)):
                held = is_frozen(state["score"], count, rows)
            slot.store(score=(1 - 1 / history) * state["score"])

        def plastic(x: Tensor) -> Tensor:
            return x if held is None else torch.where(held, torch.zeros_like(x), x)

        rate = adapt(state["rate"], plastic(u * state["sign"]), o["etas"], o["step_sizes"])
        moves = plastic(rate)
        slot.store(rate=rate, sign=torch.sign(u))
        if history:
            slot.store(score=state["score"] + state["exp_avg"] * (u * moves) / history)
        return moves
