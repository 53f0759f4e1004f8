"""Optimizers: a direction, a rate rule, and one write-back."""

from surefoot.optim import directions, rules
from surefoot.optim.core import Rates, SelfTuning
from surefoot.optim.named import AdamUpd, CoRe, DropoutRprop, SGDUpd, SRprop

__all__ = [
    "AdamUpd",
    "CoRe",
    "DropoutRprop",
    "Rates",
    "SGDUpd",
    "SRprop",
    "SelfTuning",
    "directions",
    "rules",
]
