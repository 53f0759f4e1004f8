"""A. Andersen, the L-algorithms (2024): the MNIST experiment and its published numbers.

The net has 21,840 parameters; 5 epochs; the loss is the smallest of a run's 100 means over blocks of 3,000 patterns,
averaged over 5 runs. The published spreads are not over seeds: in the published scripts every run after a process's
first has the same initial weights and the same order of patterns, so only means are to be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

EPOCHS = 5
RUNS = 5
STEP_SIZES = (1e-10, 1.0)
ETAS = (0.5, 1.2)


@dataclass(frozen=True)
class Row:
    """A row of Table 1: a method at the best setting of its grid."""

    name: str
    """As published."""
    optimizer: str
    """The same, by surefoot's name."""
    window_patterns: int | None
    """L: patterns between two changes of the rates."""
    batch_size: int
    """M, in patterns."""
    rate: float
    min_loss: float
    min_loss_sd: float
    epoch: int | None
    """When the smallest loss was reached; ``None``: not given."""
    source: str = "paper"
    """"thesis": quoted in the paper from the author's thesis, whose scripts for these runs are not public."""

    @property
    def request(self) -> str:
        """The row in the command line's words. ``window`` is in steps there: L / M."""
        settings = [f"batch={self.batch_size}", f"rate={self.rate:g}"]
        if self.window_patterns is not None:
            settings += [
                f"window={self.window_patterns // self.batch_size}",
                "etas={:g}:{:g}".format(*ETAS),
                "step_sizes={:g}:{:g}".format(*STEP_SIZES),
            ]
        return f"{self.optimizer}[{','.join(settings)}]"


TABLE_1 = (
    Row("S-Rprop", "srprop", 30000, 600, 1e-3, 0.025, 0.003, None, "thesis"),
    Row("SGD", "sgd", None, 5, 1e-3, 0.027, 0.005, None, "thesis"),
    Row("SGD+M", "momentum", None, 25, 1e-2, 0.013, 0.001, 5),
    Row("SGD-Upd", "sgd-upd", 15000, 25, 1e-1, 0.008, 0.001, 5),
    Row("Adam", "adam", None, 25, 1e-3, 0.013, 0.001, 4),
    Row("Adam-Upd", "adam-upd", 15000, 5, 1e-3, 0.004, 0.000, 5),
)
