"""How far: a rule gives the rate ``r``, one number or one for each weight. A file a family.

A new family is a new file here: a pure function of tensors with the paper's formula, and a frozen dataclass that
declares its options and state and calls it (:mod:`surefoot.optim.rules.base`).
"""

from surefoot.optim.rules.base import Rule
from surefoot.optim.rules.constant import Constant
from surefoot.optim.rules.divergence import Divergence
from surefoot.optim.rules.hypergradient import Hypergradient
from surefoot.optim.rules.lossgrad import LossGrad
from surefoot.optim.rules.parabola import PAL, QLAB
from surefoot.optim.rules.polyak import L4, Polyak
from surefoot.optim.rules.rprop import CoReRates, Rprop
from surefoot.optim.rules.window import Window

__all__ = [
    "L4",
    "PAL",
    "QLAB",
    "CoReRates",
    "Constant",
    "Divergence",
    "Hypergradient",
    "LossGrad",
    "Polyak",
    "Rprop",
    "Rule",
    "Window",
]
