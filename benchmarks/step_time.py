"""Time of one optimizer step, against torch's fused Adam and against the memory-traffic floor.

    python benchmarks/step_time.py [--repeats 7]

Two parameter sets: 5 M weights in 40 tensors and 100 k in 60, float32, gradients fixed, one thread, CPU time. In each
repeat every optimizer takes its turn, so a machine whose speed drifts moves all of them; the figures are medians over
the repeats, the ratios medians of the ratios within a repeat.

The floor is the time that the machine needs to read and write each byte that a step must touch once, at the bandwidth
measured by scaling an array of four times the weights in place (as much memory as Adam uses): weights and gradients (read w and g, write w) and the state that
the direction and the rule must read and write at every step.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _shared import cpu_seconds, parser, ratio, timing_options
from rich.console import Console
from rich.table import Table
from torch import Tensor

import surefoot
from surefoot.optim import directions, rules

SETS = {"5 M in 40 tensors": (5_000_000, 40), "100 k in 60 tensors": (100_000, 60)}


@dataclass(frozen=True)
class Entry:
    """One optimizer to time."""

    name: str
    make: Callable[[list[Tensor]], torch.optim.Optimizer]
    floats: float
    """Float32 words that a step must move for each weight: reads and writes, once each."""


# Words: w read + written and g read are 3; each state tensor that changes at every step 2, one that is only read 1.
ENTRIES = [
    Entry("torch Adam, fused", lambda p: torch.optim.Adam(p, fused=True), 7),
    Entry("torch Adam, foreach", lambda p: torch.optim.Adam(p, foreach=True), 7),
    Entry("torch SGD, fused", lambda p: torch.optim.SGD(p, 1e-3, fused=True), 3),
    Entry("sgd x constant", lambda p: surefoot.SelfTuning(p, directions.SGD(), rules.Constant()), 3),
    Entry(
        "momentum x constant", lambda p: surefoot.SelfTuning(p, directions.Momentum(), rules.Constant()), 5
    ),
    Entry(
        "nesterov x constant", lambda p: surefoot.SelfTuning(p, directions.Nesterov(), rules.Constant()), 5
    ),
    Entry("adam x constant", lambda p: surefoot.SelfTuning(p, directions.Adam(), rules.Constant()), 7),
    Entry("sign x constant", lambda p: surefoot.SelfTuning(p, directions.Sign(), rules.Constant()), 3),
    # A window of 50: its end reads rate, snapshot and sign and writes all three, once in 50 steps.
    Entry("SRprop", surefoot.SRprop, 4 + 5.5 / 50),
    Entry("SGDUpd", surefoot.SGDUpd, 4 + 5.5 / 50),
    Entry("AdamUpd", surefoot.AdamUpd, 8 + 5.5 / 50),
    Entry("CoRe", surefoot.CoRe, 9.5),
    Entry("DropoutRprop", surefoot.DropoutRprop, 5.5),
    # A rate in float64 for each weight; one for all, whose norm reads the updates once more.
    Entry("HyperReg", surefoot.HyperReg, 7),
    Entry("WNGrad", surefoot.WNGrad, 4),
    # The slope reads the gradients once more; what the probe's forward pass costs is the model's affair.
    Entry("LossGrad", surefoot.LossGrad, 4),
]


def parameters(weights: int, tensors: int) -> list[Tensor]:
    """Equal tensors, with gradients."""
    draw = torch.Generator().manual_seed(0)
    made = [torch.randn(weights // tensors, generator=draw).requires_grad_() for _ in range(tensors)]
    for p in made:
        p.grad = torch.randn(p.shape, generator=draw)
    return made


def floor_seconds_per_word(weights: int, at_least: float) -> float:
    """Seconds to move one float32 word: an in-place scaling reads and writes each, of as many as Adam's step touches."""
    array = torch.ones(4 * weights)
    return cpu_seconds(lambda: array.mul_(1.0), at_least) / (2 * array.numel())


def step(optimizer: torch.optim.Optimizer) -> None:
    """One step; surefoot's are told a loss, which those that probe it compute in no time."""
    if isinstance(optimizer, surefoot.SelfTuning):
        optimizer.step(loss=1.0, evaluate=lambda: 1.0)
    else:
        optimizer.step()


def measure(weights: int, tensors: int, repeats: int, at_least: float) -> Table:
    """The table of one parameter set."""
    optimizers = [(entry, entry.make(parameters(weights, tensors))) for entry in ENTRIES]
    for _, optimizer in optimizers:
        step(optimizer)
    times: dict[str, list[float]] = {entry.name: [] for entry in ENTRIES}
    words = []
    for _ in range(repeats):
        words.append(floor_seconds_per_word(weights, at_least))
        for entry, optimizer in optimizers:
            times[entry.name].append(cpu_seconds(partial(step, optimizer), at_least))
    table = Table(
        "optimizer",
        "ms a step",
        "x fused Adam",
        "x its traffic floor",
        title=f"{weights:,} weights in {tensors} tensors",
    )
    fused = times[ENTRIES[0].name]
    for entry in ENTRIES:
        own = times[entry.name]
        floor = [word * entry.floats * weights for word in words]
        table.add_row(
            entry.name,
            f"{1e3 * statistics.median(own):.3f}",
            f"{ratio(own, fused):.2f}",
            f"{ratio(own, floor):.2f}",
        )
    return table


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    timing_options(made)
    arguments = made.parse_args()
    torch.set_num_threads(1)
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, one thread, CPU time, medians of {arguments.repeats}")
    for weights, tensors in SETS.values():
        console.print(measure(weights, tensors, arguments.repeats, arguments.seconds))


if __name__ == "__main__":
    main()
