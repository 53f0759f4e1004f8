"""LOSSGRAD's threshold and down along the plain gradient: which settings train faster, and which lose networks.

    python benchmarks/lossgrad_threshold.py --data DIR [--seeds 6] [--workers 2] [--page FILE.md]

Five tasks of which four had no part in choosing the candidates, and of the fifth (digits) seeds that had none. Every
finished run is kept in ``--out``, so the same command goes on where it was stopped.

The rule by which the default is chosen was written before the first run: of the candidates whose number of dead networks
cannot be told from the fewest (Fisher's exact test, two-sided, p > 0.05), the one with the lowest training loss (geometric
mean of the ratio to the task's best candidate, dead networks counted with the loss that they have).
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _shared import (
    Job,
    Ledger,
    Record,
    batches,
    evaluated,
    fresh_model,
    made_with,
    parser,
    run_missing,
    run_options,
    short,
    task_of,
)
from scipy.stats import fisher_exact
from sklearn.datasets import load_breast_cancer
from study_tasks import fashion
from torch import Tensor, nn

import surefoot
from surefoot.lab.report.words import listing
from surefoot.lab.tasks import Task
from surefoot.lab.tasks.images import accuracy

CANDIDATES = ((0.5, 1.05), (0.45, 1.05), (0.4, 1.05), (0.5, 1.1), (0.4, 1.1))
"""threshold and down; up is 1.05, the rest is LossGrad's default."""
STARTS = (1e-8, 1e-6, 1e-4, 1e-2, 1.0, 1e2)
FIRST_SEED = 1000
"""Seeds below had a part in choosing the candidates."""
BATCHES = 400
LAST = 40
DEAD = 0.95
"""A network whose mean loss over the last batches is above this share of its first loss has died, or never lived."""
SIZES = {"digits": 24, "digits-mlp": 24, "mnist-sigmoid": 100, "fashion-autoencoder": 100, "cancer-deep": 20}


def autoencoder(data: Path | None) -> Task:
    """The first 12,000 images of Fashion-MNIST, as numbers from 0 to 1, through 32 units and back."""
    task = fashion(data)
    shrunk = [_unit(part[0]) for part in (task.train, task.validation)]
    return replace(
        task,
        name="fashion-autoencoder",
        model=lambda: nn.Sequential(
            nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 128), nn.ReLU(),
            nn.Linear(128, 784), nn.Sigmoid(),
        ),
        train=(shrunk[0], shrunk[0]),
        validation=(shrunk[1], shrunk[1]),
        loss=nn.functional.mse_loss,
        metric=nn.functional.mse_loss,
    )  # fmt: skip


def _unit(images: Tensor) -> Tensor:
    low, high = images.min(), images.max()
    return ((images - low) / (high - low)).flatten(1)


def cancer() -> Task:
    """scikit-learn's 569 tumours, standardized, and six hidden layers without normalization: one that dies easily."""
    inputs, targets = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(inputs, dtype=torch.float32)[order], torch.tensor(targets)[order]
    x = (x - x[:469].mean(0)) / x[:469].std(0)
    layers: list[nn.Module] = [nn.Linear(30, 32), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(32, 32), nn.ReLU()]
    return Task(
        name="cancer-deep",
        model=lambda: nn.Sequential(*_anew(layers), nn.Linear(32, 2)),
        train=(x[:469], y[:469]),
        validation=(x[469:], y[469:]),
        loss=nn.functional.cross_entropy,
        metric=accuracy,
    )


def _anew(layers: Sequence[nn.Module]) -> list[nn.Module]:
    """The layers with weights of their own."""
    return [
        nn.Linear(x.in_features, x.out_features) if isinstance(x, nn.Linear) else nn.ReLU() for x in layers
    ]


@cache
def made(task: str, data: str | None) -> Task:
    """A task of this study, loaded once in each process."""
    if task == "fashion-autoencoder":
        return autoencoder(Path(data) if data else None)
    return cancer() if task == "cancer-deep" else task_of(task, data)


def run(task: str, options: dict[str, Any], initial_rate: float, seed: int, data: str | None) -> Record:
    """One run: its first loss, the mean of its last ones, and the step size that it came to."""
    this = made(task, data)
    model = fresh_model(this, seed)
    optimizer = surefoot.LossGrad(model.parameters(), initial_rate=initial_rate, **options)
    losses = []
    for inputs, targets in batches(this.train, SIZES[task], seed, BATCHES):

        def loss(x: Tensor = inputs, y: Tensor = targets) -> Tensor:
            return this.loss(model(x), y)

        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step(loss=value, evaluate=loss)
        losses.append(value.item())
    ended = statistics.fmean(losses[-LAST:])
    return {
        "first": losses[0],
        "last": ended if math.isfinite(ended) else math.inf,
        "validation": evaluated(this, model, this.validation)[0],
        "step_size": optimizer.rates(bins=1).max,
    }


def dead(record: Record) -> bool:
    """Whether it has learnt nothing."""
    return not record["last"] <= DEAD * record["first"]


def named(threshold: float, down: float) -> str:
    """A candidate as it is written in code."""
    return f"threshold={threshold:g}, down={down:g}"


def told_apart(one: int, other: int, runs: int) -> float:
    """p of Fisher's exact test that two counts out of so many runs each are of one chance."""
    return float(np.asarray(fisher_exact([[one, runs - one], [other, runs - other]]))[1])


Results = dict[tuple[str, tuple[float, float]], list[Record]]


def judged(
    results: Results,
) -> tuple[dict[tuple[float, float], int], dict[tuple[float, float], float], list[tuple[float, float]]]:
    """Dead networks and mean ratio of the loss of every candidate, and those in the running, the best first."""
    runs = sum(len(results[task, CANDIDATES[0]]) for task in SIZES)
    deaths = {c: sum(dead(r) for task in SIZES for r in results[task, c]) for c in CANDIDATES}
    logs: dict[tuple[float, float], list[float]] = defaultdict(list)
    for task in SIZES:
        means = {c: statistics.fmean(math.log(r["last"]) for r in results[task, c]) for c in CANDIDATES}
        for c, mean in means.items():
            logs[c].append(mean - min(means.values()))
    ratios = {c: math.exp(statistics.fmean(values)) for c, values in logs.items()}
    fewest = min(deaths.values())
    running = [c for c in CANDIDATES if told_apart(deaths[c], fewest, runs) > 0.05]
    return deaths, ratios, sorted(running, key=ratios.__getitem__)


def page(results: Results, seeds: int) -> str:
    """The page, every number and the verdict from the runs."""
    deaths, ratios, running = judged(results)
    runs = sum(len(results[task, CANDIDATES[0]]) for task in SIZES)
    lines = [
        "# LOSSGRAD along the plain gradient: which threshold, which down",
        "",
        "Written by `benchmarks/lossgrad_threshold.py` from its kept runs; run again by",
        "",
        "    make lossgrad-threshold DATA=folder",
        "",
        f"`LossGrad` with its default ramp and retraction, {BATCHES} batches from the starts "
        f"{listing([f'{s:g}' for s in STARTS])}, {seeds} seeds each. The candidates were found on other tasks (MNIST, CIFAR-10, "
        "Fashion-MNIST, IMDb) and on digits with other seeds; these had no part. *Dead*: mean loss of the last "
        f"{LAST} batches above {DEAD:.0%} of the first loss. *Loss*: geometric mean of that loss over the task's best candidate, "
        "over the tasks.",
        "",
        f"Chosen, by the rule written before the first run (see the program's docstring): **{named(*running[0])}**, of "
        f"{listing([named(*c) for c in running])}, whose numbers of dead networks cannot be told from the fewest.",
        "",
        "| | dead | loss |",
        "| --- | --- | --- |",
        *(f"| {named(*c)} | {deaths[c]} of {runs} | {ratios[c]:.2f} |" for c in CANDIDATES),
        "",
        "## Each task",
        "",
        "Dead; training loss after the run, median (quartiles); validation loss, median.",
        "",
        "| | " + " | ".join(f"{task} (batch {size})" for task, size in SIZES.items()) + " |",
        "| --- | " + " | ".join(["---"] * len(SIZES)) + " |",
    ]
    for c in CANDIDATES:
        cells = []
        for task in SIZES:
            found = results[task, c]
            low, middle, high = statistics.quantiles([r["last"] for r in found], n=4)
            validation = statistics.median(r["validation"] for r in found)
            cells.append(
                f"{sum(map(dead, found))} of {len(found)}; {short(middle)} ({short(low)} to {short(high)}); {short(validation)}"
            )
        lines.append(f"| {named(*c)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", made_with(), ""])


def main() -> None:
    """Run what is missing, then write the page."""
    arguments = parser(__doc__)
    run_options(arguments, "lossgrad_threshold", seeds=6)
    given = arguments.parse_args()
    jobs: list[Job] = [
        {"task": task, "options": {"threshold": c[0], "down": c[1], "up": 1.05, "ramp": 10.0}, "initial_rate": start, "seed": seed}
        for task in SIZES for seed in range(FIRST_SEED, FIRST_SEED + given.seeds) for start in STARTS for c in CANDIDATES
    ]  # fmt: skip
    ledger = Ledger(given.out / "runs.jsonl")
    run_missing(jobs, partial(run, data=given.data), ledger, given.workers)
    results: Results = defaultdict(list)
    for job in jobs:
        record = ledger.get(job)
        assert record is not None
        results[job["task"], (job["options"]["threshold"], job["options"]["down"])].append(record)
    given.page.parent.mkdir(parents=True, exist_ok=True)
    given.page.write_text(page(results, given.seeds), encoding="utf8")
    print(f"Page: {given.page}")


if __name__ == "__main__":
    main()
