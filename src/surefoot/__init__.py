"""surefoot: PyTorch optimizers that find their own step size, and a laboratory that shows which of them to trust.

The public face, and nothing else. Names are looked up when first used (PEP 562), so that ``surefoot --help`` need not
wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from surefoot._version import __version__

if TYPE_CHECKING:
    from surefoot.optim import (
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
        Rates,
        SelfTuning,
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
    "__version__",
]


def __getattr__(name: str) -> object:
    if name == "optim":
        return import_module("surefoot.optim")
    if name in __all__:
        return getattr(import_module("surefoot.optim"), name)
    raise AttributeError(f"module 'surefoot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
