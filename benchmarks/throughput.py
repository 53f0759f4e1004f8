"""Throughput of a whole sweep, against the loop that people write today.

    python benchmarks/throughput.py [--repeats 3] [--runs 64]

Many runs of one optimizer (Adam, 16 rates from each seed) over made images of MNIST's shape, one epoch each. The plain
loop is a ``DataLoader`` over a ``TensorDataset`` with ``torch.optim.Adam`` (the fused one, its fastest), one run after
another, once with torch's default number of threads, as people run it, and once with one thread. The laboratory works with
a process a core: each run by itself (``--engine separate``), and in the way that it finds fastest (``--engine auto``), once
its timings are remembered. Wall time from the first specification to the last result, samples counted over all runs; all
ways in turn within each repeat; medians over the repeats; the ratios are medians of those to the faster of the two plain
loops within a repeat.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from _shared import parser
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from surefoot.lab.executor import Executor, LocalProcesses, usable_cores
from surefoot.lab.plan import parse_optimizers, specs
from surefoot.lab.runs import RunSpec
from surefoot.lab.tasks.base import Task
from surefoot.lab.tasks.images import paper_cnn

PATTERNS = {
    "cnn": {5: 1_500, 25: 3_000, 100: 6_000, 500: 6_000},
    "mlp": {5: 3_000, 25: 12_000, 100: 24_000, 500: 30_000},
}
"""By batch size: a run should take about a quarter of a second, or its start would count."""
RATES = tuple(10 ** (-4 + i / 8) for i in range(16))
NETWORKS: dict[str, Callable[[], nn.Sequential]] = {
    "cnn": paper_cnn,
    "mlp": lambda: nn.Sequential(
        nn.Flatten(), nn.Linear(784, 50), nn.ReLU(), nn.Linear(50, 10), nn.LogSoftmax(dim=1)
    ),
}


def made_task(network: str, patterns: int) -> Task:
    """MNIST's shapes, without its files; next to nothing to validate on."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(patterns, 1, 28, 28, generator=draw)
    labels = torch.randint(10, (patterns,), generator=draw)
    few = (images[:10], labels[:10])
    return Task(f"made {network}", NETWORKS[network], (images, labels), few, nn.functional.nll_loss)


def _written(network: str, patterns: int, folder: str) -> str:
    """A file with that task, for the workers."""
    file = Path(folder) / "made.py"
    file.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport throughput\n\n\n"
        f"def task():\n    return throughput.made_task({network!r}, {patterns})\n",
        encoding="utf8",
    )
    return f"{file}:task"


def plain_loop(task: Task, batch_size: int, threads: int) -> float:
    """Samples a second of one epoch as a tutorial writes it."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for inputs, targets in DataLoader(TensorDataset(*task.train), batch_size=batch_size, shuffle=True):
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
    return len(task.train[0]) / (time.perf_counter() - start)


def sweep(pool: Executor, runs: Sequence[RunSpec], patterns: int) -> tuple[float, str]:
    """Samples a second over all runs, and how they were trained."""
    start = time.perf_counter()
    results = list(pool.run(pool.arrange(runs)))
    seconds = time.perf_counter() - start
    assert all(result.status == "finished" for result in results)
    engine = statistics.mode(str(result.environment["engine"]) for result in results)
    return len(runs) * patterns / seconds, engine


def cell(network: str, batch_size: int, number: int, repeats: int) -> list[tuple[str, ...]]:
    """The rows of one network and batch size."""
    patterns, cores = PATTERNS[network][batch_size], usable_cores()
    task = made_task(network, patterns)
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalProcesses(reference := _written(network, patterns, folder), workers=cores) as separate,
        LocalProcesses(reference, workers=cores, engine="auto") as auto,
    ):
        (request,) = parse_optimizers(f"adam[batch={batch_size}]")
        info, methods = separate.prepare([request], RATES)
        runs = specs(info, methods, 1, range(-(-number // len(RATES))))[:number]
        ways: dict[str, Callable[[], tuple[float, str]]] = {
            f"plain, {cores} threads": lambda: (plain_loop(task, batch_size, cores), ""),
            "plain, 1 thread": lambda: (plain_loop(task, batch_size, 1), ""),
            "laboratory, separate": lambda: sweep(separate, runs, patterns),
            "laboratory, auto": lambda: sweep(auto, runs, patterns),
        }
        for name, way in ways.items():  # warm, and timed
            if name.startswith("laboratory"):
                way()
        found: dict[str, list[float]] = {name: [] for name in ways}
        engines: dict[str, str] = {}
        for _ in range(repeats):
            for name, way in ways.items():
                speed, engines[name] = way()
                found[name].append(speed)
    plain = [max(pair) for pair in zip(*(own for name, own in found.items() if "plain" in name), strict=True)]
    rows = []
    for name, own in found.items():
        speed = statistics.median(own)
        ratio = statistics.median(a / b for a, b in zip(own, plain, strict=True))
        per_minute = 60 * speed / patterns
        way = name + (f" ({engines[name]})" if name == "laboratory, auto" else "")
        rows.append((network, str(batch_size), way, f"{speed:,.0f}", f"{per_minute:,.0f}", f"{ratio:.2f}"))
    return rows


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--repeats", type=int, default=3)
    made.add_argument("--runs", type=int, default=64)
    made.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    made.add_argument(
        "--batches", nargs="+", type=int, default=list(PATTERNS["cnn"]), choices=list(PATTERNS["cnn"])
    )
    given = made.parse_args()
    heads = ("network", "batch", "way", "samples / s", "runs / min", "x plain loop")
    table = Table(*heads, title=f"{given.runs} runs of one epoch, from end to end")
    console = Console(width=120)
    for network in given.networks:
        for batch_size in given.batches:
            for row in cell(network, batch_size, given.runs, given.repeats):
                table.add_row(*row)
                console.print(" | ".join(row))
    console.print(f"torch {torch.__version__}, wall time, medians of {given.repeats}")
    console.print(table)


if __name__ == "__main__":
    main()
