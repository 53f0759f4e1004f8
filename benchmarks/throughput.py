"""Training throughput from end to end, against the loop that people write today.

    python benchmarks/throughput.py [--repeats 5]

The paper's MNIST network (21,840 parameters) on 6,000 made images of MNIST's shape, one epoch, Adam. The plain loop is
a ``DataLoader`` over a ``TensorDataset`` with ``torch.optim.Adam`` (the fused one, its fastest), once with torch's
default number of threads, as people run it, and once with one thread, as the laboratory's processes do. The laboratory
is one of its runs (one thread, batches cut from whole tensors), and as many runs at once as there are cores, a process
each, which is how it works; then samples are counted over all runs. Wall time, all in turn within each repeat; the
figures are medians over the repeats, the ratios medians of the ratios within a repeat.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader, TensorDataset

from surefoot.lab import catalogue
from surefoot.lab.executor import LocalProcesses
from surefoot.lab.plan import parse_optimizers, specs
from surefoot.lab.runs import RunSpec
from surefoot.lab.tasks.base import Task
from surefoot.lab.tasks.images import paper_cnn
from surefoot.lab.train import train

PATTERNS = 6_000
BATCHES = (5, 25, 100)


def made_task() -> Task:
    """MNIST's shapes, without its files; next to nothing to validate on."""
    draw = torch.Generator().manual_seed(0)
    images = torch.randn(PATTERNS, 1, 28, 28, generator=draw)
    labels = torch.randint(10, (PATTERNS,), generator=draw)
    few = (images[:10], labels[:10])
    return Task("made images", paper_cnn, (images, labels), few, torch.nn.functional.nll_loss)


def plain_loop(task: Task, batch_size: int) -> None:
    """One epoch as a tutorial writes it."""
    model = task.model()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for inputs, targets in DataLoader(TensorDataset(*task.train), batch_size=batch_size, shuffle=True):
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        loss.backward()
        optimizer.step()


def laboratory(task: Task, batch_size: int, optimizer: str) -> None:
    """One epoch as the laboratory runs it."""
    (request,) = parse_optimizers(optimizer)
    settings = catalogue.resolve(request)
    train(task, RunSpec(task.name, "", optimizer, settings, 1e-3, batch_size, epochs=1, seed=0))


def side_by_side(executor: LocalProcesses, batch_size: int, runs: int) -> float:
    """Wall time of a run, when as many as there are cores go on at once; the processes are there already."""
    (request,) = parse_optimizers(f"adam[batch={batch_size},rate=1e-3]")
    task, methods = executor.prepare([request], (1e-3,))
    todo = specs(task, methods, 1, range(runs))
    start = time.perf_counter()
    finished = list(executor.run(todo))
    return (time.perf_counter() - start) / len(finished)


def seconds(work: Callable[[], None], threads: int) -> float:
    """Wall time of one call with that many threads."""
    torch.set_num_threads(threads)
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    task, cores = made_task(), torch.get_num_threads()
    with LocalProcesses(f"{__file__}:made_task", workers=cores) as executor:
        table = measure(task, executor, cores, repeats)
    console = Console(width=100)
    console.print(f"torch {torch.__version__}, wall time, medians of {repeats}")
    console.print(table)


def measure(task: Task, executor: LocalProcesses, cores: int, repeats: int) -> Table:
    """The table: every way at every batch size."""
    table = Table("batch", "loop", "samples / s", "x plain loop", title="one epoch, from end to end")
    for batch_size in BATCHES:
        ways: dict[str, Callable[[], float]] = {
            f"plain, {cores} threads": lambda m=batch_size: seconds(lambda: plain_loop(task, m), cores),
            "plain, 1 thread": lambda m=batch_size: seconds(lambda: plain_loop(task, m), 1),
            "laboratory, adam": lambda m=batch_size: seconds(lambda: laboratory(task, m, "adam"), 1),
            "laboratory, adam-upd": lambda m=batch_size: seconds(lambda: laboratory(task, m, "adam-upd"), 1),
            f"laboratory, adam, {cores} runs at once": lambda m=batch_size: side_by_side(executor, m, cores),
        }
        for way in ways.values():
            way()
        times = {name: [] for name in ways}
        for _ in range(repeats):
            for name, way in ways.items():
                times[name].append(way())
        plain = times[f"plain, {cores} threads"]
        for name, own in times.items():
            ratio = statistics.median(a / b for a, b in zip(plain, own, strict=True))
            table.add_row(str(batch_size), name, f"{PATTERNS / statistics.median(own):,.0f}", f"{ratio:.2f}")
    return table


if __name__ == "__main__":
    main()
