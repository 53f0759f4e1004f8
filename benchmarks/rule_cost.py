"""What a rule costs beside the model: LOSSGRAD's probe in a training step, and each divergence on a linear regression.

    python benchmarks/rule_cost.py [--repeats 7]

CPU time, one thread. In each repeat every optimizer takes its turn, so a machine whose speed drifts moves all of them; the
figures are medians over the repeats, the ratios medians of the ratios within a repeat.

*Training steps* are forward, backward and the optimizer's, batches of 100 made images of the data sets' shapes, on the
networks of the papers. The *linear regression* is scikit-learn's diabetes study (442 patterns, 11 weights), an iteration
over all patterns (GD) or over one (SGD); a report on hyper-regularization timed its own, in Python, and its published
microseconds are printed beside.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch
from _shared import cpu_seconds, parser, ratio, timing_options
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import surefoot
from surefoot.lab.tasks import load
from surefoot.lab.tasks.images import CLASSES, lossgrad_cnn, paper_cnn
from surefoot.optim import directions, rules
from surefoot.optim.rules.divergence import GENERATORS

STEPS = 8
"""In one measured call: a probe at every 8th step is in each."""
NEVER = 10**9
NETWORKS: Mapping[
    str, tuple[Callable[[], nn.Module], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]
] = {
    "MNIST, 21,840 weights": (paper_cnn, (1, 28, 28), nn.functional.nll_loss),
    "CIFAR-10, 189,230 weights": (lossgrad_cnn, (3, 32, 32), nn.functional.cross_entropy),
}
FORWARD = "a forward pass alone"
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
SMALL = 1e-4
"""A rate for those that keep theirs: that of LossGrad at its start."""
STEPPERS: Mapping[str, Make] = {
    "torch SGD": lambda p: torch.optim.SGD(p, SMALL),
    "sgd x constant": lambda p: surefoot.SelfTuning(p, directions.SGD(), rules.Constant(SMALL)),
    "LossGrad, a probe every step": surefoot.LossGrad,
    f"LossGrad, every {STEPS}": lambda p: surefoot.LossGrad(p, ramp=1.0, probe_every=STEPS),
    "LossGrad, none": lambda p: surefoot.LossGrad(p, ramp=1.0, probe_every=NEVER),
}


def _divergence(divergence: str, algorithm: int) -> Make:
    return lambda p: surefoot.HyperReg(p, divergence=divergence, algorithm=algorithm, initial_rate=SMALL)


REGRESSORS: Mapping[str, Make] = {
    "torch SGD": STEPPERS["torch SGD"],
    "sgd x constant": STEPPERS["sgd x constant"],
    **{
        f"{name}, {algorithm}": _divergence(name, algorithm) for name in GENERATORS for algorithm in (1, 2, 3)
    },
}
REPORTED = {"GD": (64.90, 338.80), "SGD": (382.80, 512.00)}
"""The report's microseconds for an iteration: plain, and with its method."""


def steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    number: int,
) -> None:
    """So many training steps."""
    inputs, targets = batch

    def evaluate() -> Tensor:
        return loss(model(inputs), targets)

    for _ in range(number):
        optimizer.zero_grad()
        value = evaluate()
        value.backward()
        if isinstance(optimizer, surefoot.SelfTuning):
            optimizer.step(loss=value, evaluate=evaluate)
        else:
            optimizer.step()


@torch.no_grad()
def forwards(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], batch: tuple[Tensor, Tensor], number: int
) -> None:
    """So many forward passes, as a probe makes them."""
    for _ in range(number):
        loss(model(batch[0]), batch[1])


def in_turn(
    makers: Mapping[str, Make],
    network: Callable[[], nn.Module],
    loss: Callable[[Tensor, Tensor], Tensor],
    batch: tuple[Tensor, Tensor],
    repeats: int,
    at_least: float,
) -> dict[str, list[float]]:
    """Seconds of one training step with each optimizer, and of a forward pass, in each repeat."""
    works: dict[str, Callable[[], None]] = {FORWARD: partial(forwards, network(), loss, batch, STEPS)}
    for name, make in makers.items():
        torch.manual_seed(0)
        model = network()
        works[name] = partial(steps, model, make(list(model.parameters())), loss, batch, STEPS)
    for work in works.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(cpu_seconds(work, at_least) / STEPS)
    return times


def training(repeats: int, at_least: float) -> Table:
    """A training step of each network with each optimizer."""
    table = Table("network, batch 100", "optimizer", "ms a step", "x torch SGD", title="LOSSGRAD's probe")
    draw = torch.Generator().manual_seed(0)
    for title, (network, shape, loss) in NETWORKS.items():
        batch = torch.randn(100, *shape, generator=draw), torch.randint(CLASSES, (100,), generator=draw)
        times = in_turn(STEPPERS, network, loss, batch, repeats, at_least)
        for name, own in times.items():
            table.add_row(
                title, name, f"{1e3 * statistics.median(own):.2f}", f"{ratio(own, times['torch SGD']):.2f}"
            )
    return table


def regression(repeats: int, at_least: float) -> Table:
    """An iteration of the linear regression with each rule."""
    task = load("regression")
    x, y = (torch.cat(parts) for parts in zip(task.train, task.validation, strict=True))
    batches = {"GD": (x, y), "SGD": (x[:1], y[:1])}
    columns = (column for name in batches for column in (f"{name}, us", "x torch SGD"))
    table = Table("rule", *columns, title="An iteration of a linear regression")
    times = {
        name: in_turn(REGRESSORS, lambda: nn.Linear(10, 1), nn.functional.mse_loss, batch, repeats, at_least)
        for name, batch in batches.items()
    }
    for rule in (FORWARD, *REGRESSORS):
        cells: list[str] = []
        for own in times.values():
            cells += [
                f"{1e6 * statistics.median(own[rule]):.0f}",
                f"{ratio(own[rule], own['torch SGD']):.2f}",
            ]
        table.add_row(rule, *cells)
    for rule, position in (("report, plain", 0), ("report, its method", 1)):
        cells = []
        for name in batches:
            cells += [
                f"{REPORTED[name][position]:.0f}",
                f"{REPORTED[name][position] / REPORTED[name][0]:.2f}",
            ]
        table.add_row(rule, *cells)
    return table


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    timing_options(made)
    given = made.parse_args()
    torch.set_num_threads(1)
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, one thread, CPU time, medians of {given.repeats}")
    console.print(training(given.repeats, given.seconds))
    console.print(regression(given.repeats, given.seconds))


if __name__ == "__main__":
    main()
