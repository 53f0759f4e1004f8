"""Optimizers: a direction, a rate rule, and one write-back."""

from surefoot.optim import directions, rules
from surefoot.optim.core import Rates, SelfTuning
from surefoot.optim.named import AdamUpd, CoRe, DropoutRprop, HyperReg, LossGrad, SGDUpd, SRprop, WNGrad

__all__ = [
    "AdamUpd",
    "CoRe",
    "DropoutRprop",
    "HyperReg",
    "LossGrad",
    "Rates",
    "SGDUpd",
    "SRprop",
    "SelfTuning",
    "WNGrad",
    "directions",
    "rules",
]
