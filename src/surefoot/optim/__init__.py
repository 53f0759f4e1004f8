"""Optimizers: a direction, a rate rule, and one write-back."""

from surefoot.optim import averaging, directions, rules
from surefoot.optim.core import Rates, SelfTuning
from surefoot.optim.named import (
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
    SGDUpd,
    SRprop,
    WNGrad,
)

__all__ = [
    "L4",
    "PAL",
    "QLAB",
    "SPS",
    "AdamUpd",
    "CoRe",
    "DropoutRprop",
    "HyperReg",
    "HypergradientDescent",
    "LossGrad",
    "Rates",
    "SGDUpd",
    "SRprop",
    "SelfTuning",
    "WNGrad",
    "averaging",
    "directions",
    "rules",
]
