"""One record for each public optimizer: what the promises are tested over.

A new optimizer is tested by adding its record here. A check that cannot apply is named in ``skips``, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from surefoot import (
    L4,
    PAL,
    QLAB,
    SPS,
    AdamUpd,
    CoRe,
    DropoutRprop,
    HypergradientDescent,
    HyperReg,
    LossGrad,
    SelfTuning,
    SGDUpd,
    SRprop,
    WNGrad,
)
from surefoot.optim import directions, rules


@dataclass(frozen=True)
class Record:
    name: str
    make: Callable[..., SelfTuning]
    """``make(params, lr=1.0, **options)``: with options of its own that make it adapt within a few steps."""
    per_model: Mapping[str, Any] = field(default_factory=dict)
    """Options with one value for each of three models in a stack; a tuple of triples for a pair."""
    skips: Mapping[str, str] = field(default_factory=dict)
    """Checks that do not apply, by name, and why."""


def cell(name: str, direction: Any, rule: Any, **record: Any) -> Record:
    """A direction x rule without a name of its own; options go to whichever of the two has them."""

    def make(params: Any, lr: Any = 1.0, **options: Any) -> SelfTuning:
        parts = []
        for part in (direction, rule):
            own = {name: options.pop(name) for name in part.options() if name in options}
            parts.append(replace(part, **own))
        return SelfTuning(params, *parts, lr, **options)

    return Record(name, make, **record)


def hyperreg(name: str, divergence: str, algorithm: int, options: Mapping[str, Any], **record: Any) -> Record:
    """One of the divergences' 15 rules, with options of its own."""
    own = {"divergence": divergence, "algorithm": algorithm, "initial_rate": 0.3, **options}
    return Record(name, lambda p, lr=1.0, **o: HyperReg(p, lr, **{**own, **o}), **record)


ONE_RATE = dict.fromkeys(
    ("late_gradient", "per_group_lr"),
    "one rate for all parameters: a parameter on its own, or half of them, would have another",
)
WINDOW = {"window": 4, "initial_rate": 1e-2}
RATES = (1e-2, 3e-3, 3e-2)

RECORDS = [
    Record("srprop", lambda p, lr=1.0, **o: SRprop(p, lr, **{**WINDOW, **o}), {"initial_rate": RATES}),
    Record(
        "srprop-decay",
        lambda p, lr=1.0, **o: SRprop(
            p, lr, **{**WINDOW, "weight_decay": 0.02, "step_sizes": (1e-6, 0.1), **o}
        ),
        {"weight_decay": (0.1, 0.0, 0.3), "etas": ((0.5, 0.7, 0.9), (1.2, 1.1, 1.3))},
    ),
    Record(
        "srprop-subtract",
        lambda p, lr=1.0, **o: SRprop(p, lr, **{**WINDOW, "undo": "subtract", **o}),
        skips=dict.fromkeys(
            ("stack", "tensor_lr", "grad_scaler"),
            "the published undo leaves rounding residues that vote, so the last bit of a weight decides",
        ),
    ),
    Record(
        "sgd-upd",
        lambda p, lr=1.0, **o: SGDUpd(p, lr, **{**WINDOW, "initial_rate": 0.1, **o}),
        {"initial_rate": RATES},
    ),
    Record(
        "sgd-upd-nesterov",
        lambda p, lr=1.0, **o: SGDUpd(
            p, lr, **{**WINDOW, "momentum": 0.8, "nesterov": True, "undo": "none", **o}
        ),
        {"step_sizes": ((1e-6, 1e-5, 1e-4), (0.1, 0.05, 1.0))},
    ),
    Record(
        "adam-upd",
        lambda p, lr=1.0, **o: AdamUpd(p, lr, **{**WINDOW, **o}),
        {"betas": ((0.9, 0.8, 0.5), (0.99, 0.9, 0.999))},
    ),
    Record(
        "adam-upd-amsgrad",
        lambda p, lr=1.0, **o: AdamUpd(p, lr, **{**WINDOW, "amsgrad": True, "weight_decay": 0.01, **o}),
        {"eps": (1e-8, 1e-4, 1e-2), "weight_decay": (0.0, 0.01, 0.1)},
    ),
    Record(
        "core",
        lambda p, lr=1.0, **o: CoRe(p, lr, **o),
        {"initial_rate": RATES, "weight_decay": (0.1, 0.0, 0.2)},
    ),
    Record(
        "core-plastic",
        lambda p, lr=1.0, **o: CoRe(p, lr, **{"score_history": 5, "frozen": 0.3, **o}),
        {"initial_rate": RATES, "betas": ((0.7, 0.8, 0.6), (0.8, 0.9, 0.7), (10.0, 250.0, 50.0), 0.99)},
    ),
    Record(
        "dropout-rprop",
        lambda p, lr=1.0, **o: DropoutRprop(p, lr, **{"step_sizes": (1e-4, 5.0), **o}),
        {"initial_rate": RATES},
    ),
    Record(
        "dropout-rprop-masks",
        lambda p, lr=1.0, **o: DropoutRprop(p, lr, **{"dropout": 0.5, "step_sizes": (1e-4, 5.0), **o}),
        skips={
            "late_gradient": "masks depend on a parameter's position, which is another in an optimizer of its own",
            "per_group_lr": "the same",
            "no_values_are_looked_at": "torch has no random streams on the meta device",
        },
    ),
    hyperreg("hyperreg", "rkl", 1, {}, per_model={"initial_rate": (0.3, 0.03, 30.0)}),
    hyperreg(
        "hyperreg-kl1-published",
        "kl",
        1,
        {"longest_step": None, "weight_decay": 0.01},
        per_model={"growth": (2.0, 1.0, 1.1), "weight_decay": (0.01, 0.0, 0.1)},
    ),
    hyperreg(
        "hyperreg-hellinger2-warmup",
        "hellinger",
        2,
        {"warmup_steps": 4, "warmup_rate": 0.1, "longest_step": None},
        per_model={"warmup_rate": (0.1, 0.2, 0.01), "radius": (1.0, 0.3, 3.0)},
    ),
    hyperreg(
        "hyperreg-neyman3-tensor",
        "neyman",
        3,
        {"scope": "tensor", "longest_step": 0.5, "radius": 0.5},
        per_model={"initial_rate": (0.3, 0.03, 30.0), "longest_step": (0.5, 0.1, 2.0)},
    ),
    hyperreg(
        "hyperreg-rkl2-tensor-reset",
        "rkl",
        2,
        {"scope": "tensor", "warmup_steps": 3, "warmup_rate": 0.2, "after_warmup": "reset"},
        per_model={"warmup_rate": (0.2, 0.1, 0.3)},
    ),
    hyperreg(
        "hyperreg-chi2-3-global",
        "chi2",
        3,
        {"scope": "global", "growth": None, "longest_step": 1.0, "warmup_steps": 3, "warmup_rate": 0.1},
        per_model={"initial_rate": (0.3, 0.03, 30.0), "warmup_rate": (0.1, 0.05, 0.2)},
        skips=ONE_RATE,
    ),
    hyperreg(
        "hyperreg-rkl1-global-momentum",
        "rkl",
        1,
        {"scope": "global", "direction": "momentum", "initial_rate": 0.05},
        per_model={"radius": (1.0, 0.3, 3.0)},
        skips=ONE_RATE,
    ),
    Record(
        "wngrad",
        lambda p, lr=1.0, **o: WNGrad(p, lr, **{"initial_rate": 0.3, **o}),
        {"initial_rate": (0.3, 0.03, 3.0)},
        skips=ONE_RATE,
    ),
    Record(
        "wngrad-step-first",
        lambda p, lr=1.0, **o: WNGrad(p, lr, **{"initial_rate": 0.3, "first": "step", **o}),
        {"initial_rate": (0.3, 0.03, 0.5)},
        skips=ONE_RATE,
    ),
    Record(
        "lossgrad",
        lambda p, lr=1.0, **o: LossGrad(
            p,
            lr,
            **{
                "initial_rate": 0.05,
                "down": 1.5,
                "weight_decay": 0.01,
                "ramp": 1.0,
                "retract": False,
                **o,
            },
        ),
        {"initial_rate": (0.05, 1e-3, 0.2), "down": (1.05, 1.2, 1.5)},
        skips=ONE_RATE,
    ),
    Record(
        "lossgrad-safe",
        lambda p, lr=1.0, **o: LossGrad(
            p,
            lr,
            **{
                "ramp": 1.0,
                "lower_bound": 0.0,
                "max_norm": 1.0,
                "horizon": 40,
                "average": "mean",
                "initial_rate": 0.12,
                **o,
            },
        ),
        {"ramp": (10.0, 2.0, 1.0), "lower_bound": (0.0, -0.5, 0.1), "max_norm": (1.0, 0.5, 5.0)},
        skips=ONE_RATE,
    ),
    Record(
        "lossgrad-next",
        lambda p, lr=1.0, **o: LossGrad(
            p,
            lr,
            **{"probe": "next", "direction": "momentum", "initial_rate": 1e-2, "up": 1.04, "ramp": 1.0, **o},
        ),
        {"threshold": (0.5, 0.3, 0.9), "initial_rate": RATES},
        skips=ONE_RATE,
    ),
    Record(
        "lossgrad-adam-raw",
        lambda p, lr=1.0, **o: LossGrad(
            p,
            lr,
            **{
                "direction": "adam",
                "probe": "raw",
                "initial_rate": 1e-3,
                "probe_every": 3,
                "up": 1.1,
                "ramp": 1.0,
                **o,
            },
        ),
        {"threshold": (0.5, 0.3, 0.9), "weight_decay": (0.0, 0.01, 0.1)},
        skips=ONE_RATE,
    ),
    Record(
        "lossgrad-nesterov",
        lambda p, lr=1.0, **o: LossGrad(
            p,
            lr,
            **{"direction": "nesterov", "initial_rate": 1e-2, "ramp": 1.0, "retract": False, **o},
        ),
        {"up": (1.05, 1.2, 1.5)},
        skips=ONE_RATE,
    ),
    Record(
        "l4",
        lambda p, lr=1.0, **o: L4(
            p,
            lr,
            **{
                "direction": "sgd",
                "smoothing": 0.0,
                "first_lowest": 0.01,
                "forget_steps": 1.0,
                "weight_decay": 0.01,
                **o,
            },
        ),
        {"fraction": (0.15, 0.05, 0.3), "weight_decay": (0.01, 0.0, 0.1)},
        skips=ONE_RATE,
    ),
    Record(
        "l4-momentum",
        lambda p, lr=1.0, **o: L4(p, lr, **{"forget_steps": 20.0, **o}),
        {"attainable": (0.9, 0.5, 1.0), "first_lowest": (0.75, 0.1, 1.0), "forget_steps": (20.0, 5.0, 1e3)},
        skips=ONE_RATE,
    ),
    Record(
        "l4-adam",
        lambda p, lr=1.0, **o: L4(p, lr, **{"direction": "adam", "lower_bound": -1.0, **o}),
        {"smoothing": (0.9, 0.0, 0.5), "lower_bound": (0.0, -1.0, 0.05)},
        skips=ONE_RATE,
    ),
    Record(
        "sps",
        lambda p, lr=1.0, **o: SPS(p, lr, **{"bound": 0.3, "weight_decay": 0.01, **o}),
        {"bound": (0.3, 0.03, 30.0), "c": (0.5, 1.0, 0.3)},
        skips=ONE_RATE,
    ),
    Record(
        "sps-adam-smooth",
        lambda p, lr=1.0, **o: SPS(p, lr, **{"direction": "adam", "bound": 0.01, "growth": 1.05, **o}),
        {"growth": (1.05, 1.5, float("inf")), "bound": (0.01, 1e-3, 0.03)},
        skips=ONE_RATE,
    ),
    Record(
        "pal",
        lambda p, lr=1.0, **o: PAL(
            p, lr, **{"probe_length": 0.1, "longest_step": 0.1, "weight_decay": 0.01, **o}
        ),
        {"probe_length": (0.1, 0.5, 0.01), "longest_step": (0.1, 1.0, 0.3), "momentum": (0.4, 0.0, 0.9)},
        skips=ONE_RATE,
    ),
    Record(
        "pal-sgd",
        lambda p, lr=1.0, **o: PAL(p, lr, **{"probe_length": 0.1, "stretch": 1.0, "momentum": 0.0, **o}),
        {"stretch": (1.0, 1.3, 0.7), "weight_decay": (0.0, 0.01, 0.1)},
        skips={
            **ONE_RATE,
            "small_steps_in_bf16": "on a straight line the curvature is what rounding makes it, and the probed weights are "
            "rounded to 16 bits",
        },
    ),
    Record(
        "qlab",
        lambda p, lr=1.0, **o: QLAB(
            p, lr, **{"initial_rate": 0.05, "weight_decay": 0.01, "step_sizes": (1e-6, 0.2), **o}
        ),
        {"initial_rate": (0.05, 1e-4, 1.0), "weight_decay": (0.01, 0.0, 0.1)},
        skips=ONE_RATE,
    ),
    Record(
        "qlab-adam",
        lambda p, lr=1.0, **o: QLAB(
            p, lr, **{"direction": "adam", "initial_rate": 1e-3, "step_sizes": (1e-5, 0.05), **o}
        ),
        {"growth": (2.0, 1.1, 5.0), "step_sizes": ((1e-5, 1e-4, 1e-6), (0.05, 0.01, 0.1))},
        skips=ONE_RATE,
    ),
    Record(
        "hypergradient",
        lambda p, lr=1.0, **o: HypergradientDescent(p, lr, **{"initial_rate": 0.02, "hyper_rate": 1e-4, **o}),
        {"initial_rate": (0.02, 1e-3, 0.1), "hyper_rate": (1e-3, 1e-2, 0.0)},
        skips=ONE_RATE,
    ),
    Record(
        "hypergradient-nesterov-multiplicative",
        lambda p, lr=1.0, **o: HypergradientDescent(
            p,
            lr,
            **{
                "direction": "nesterov",
                "form": "multiplicative",
                "initial_rate": 0.01,
                "weight_decay": 0.01,
                **o,
            },
        ),
        {"hyper_rate": (0.02, 0.3, 0.0)},
        skips=ONE_RATE,
    ),
    Record(
        "hypergradient-adam",
        lambda p, lr=1.0, **o: HypergradientDescent(
            p, lr, **{"direction": "adam", "initial_rate": 0.01, "hyper_rate": 1e-5, **o}
        ),
        {"hyper_rate": (1e-5, 1e-4, 0.0), "step_sizes": ((1e-5, 0.02, 1e-6), (0.01005, 0.03, 0.1))},
        skips=ONE_RATE,
    ),
    cell("sgd", directions.SGD(weight_decay=0.01), rules.Constant(0.1), per_model={"rate": RATES}),
    cell(
        "momentum",
        directions.Momentum(dampening=0.1),
        rules.Constant(0.02),
        per_model={"momentum": (0.9, 0.0, 0.5)},
    ),
    cell("nesterov", directions.Nesterov(), rules.Constant(0.02), per_model={"momentum": (0.9, 0.0, 0.5)}),
    cell(
        "adam",
        directions.Adam(),
        rules.Constant(0.01),
        per_model={"betas": ((0.9, 0.8, 0.5), (0.99, 0.9, 0.999))},
    ),
    cell(
        "adamw",
        directions.Adam(weight_decay=0.1, decoupled_weight_decay=True),
        rules.Constant(0.01),
        per_model={"weight_decay": (0.1, 0.0, 0.5)},
    ),
    cell("sign", directions.Sign(), rules.Constant(1e-3), per_model={"rate": RATES}),
    cell(
        "momentum-window",
        directions.Momentum(),
        rules.Window(0.02, window=4),
        per_model={"initial_rate": RATES},
    ),
    cell(
        "adam-divergence",
        directions.Adam(),
        rules.Divergence("hellinger", 1, 0.02),
        per_model={"radius": (1.0, 0.3, 3.0), "betas": ((0.9, 0.8, 0.5), (0.99, 0.9, 0.999))},
    ),
    cell(
        "adam-rprop",
        directions.Adam(),
        rules.Rprop(0.01, (0.5, 1.05), (1e-6, 0.1)),
        per_model={"initial_rate": RATES},
    ),
]
