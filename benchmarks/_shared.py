"""What the benchmarks share: runs that are kept, processes that make them, timing, and pictures for the pages."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import surefoot
from surefoot.lab.report import words
from surefoot.lab.runs import NUMERICS
from surefoot.lab.streams import seed_everything, stream_seed
from surefoot.lab.tasks import TASKS, Task, load

Job = Mapping[str, Any]
"""What decides one run's numbers, in plain values."""
Record = dict[str, Any]


class Ledger:
    """Finished runs in a file, an object of JSON a line: whoever is killed goes on from there."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = path.read_bytes() if path.exists() else b""
        whole = kept[: kept.rfind(b"\n") + 1]
        if whole != kept:  # the last line was being written
            path.write_bytes(whole)
        self._records = {
            self._key(line["job"]): line["record"] for line in map(json.loads, whole.splitlines())
        }

    @staticmethod
    def _key(job: Job) -> str:
        return json.dumps({"numerics": NUMERICS, **job}, sort_keys=True)

    def get(self, job: Job) -> Record | None:
        """The record of a finished run."""
        return self._records.get(self._key(job))

    def add(self, job: Job, record: Record) -> None:
        """Keep a finished run."""
        line = json.dumps({"job": {"numerics": NUMERICS, **job}, "record": record}) + "\n"
        with self.path.open("a", encoding="utf8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        self._records[self._key(job)] = record


def run_missing(jobs: Sequence[Job], work: Callable[..., Record], ledger: Ledger, workers: int) -> None:
    """``work(**job)`` for every job that the ledger lacks, one thread each, in processes of their own."""
    todo = [job for job in jobs if ledger.get(job) is None]
    print(f"{len(jobs) - len(todo)} of {len(jobs)} runs are there, {len(todo)} to go", flush=True)
    if not todo:
        return
    began = time.monotonic()
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        running = {pool.submit(work, **job): job for job in todo}
        for count, finished in enumerate(as_completed(running), 1):
            job = running[finished]
            ledger.add(job, finished.result())
            passed = time.monotonic() - began
            print(f"{passed:6.0f} s  {count}/{len(todo)}  {' '.join(_plain(job))}", flush=True)


def _plain(job: Job) -> list[str]:
    return [str(value) for value in job.values() if not isinstance(value, dict)]


@cache
def task_of(name: str, data: str | None) -> Task:
    """One of surefoot's tasks, loaded once in each process."""
    reads_files = "data" in inspect.signature(TASKS[name]).parameters
    return load(name, Path(data) if data and reads_files else None)


def fresh_model(task: Task, seed: int) -> nn.Module:
    """The model that the laboratory makes from this seed."""
    seed_everything(stream_seed(seed, "weights"), torch.device("cpu"))
    return task.model().train()


def batches(
    train: tuple[Tensor, Tensor], size: int, seed: int, number: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """So many batches, epoch after epoch, in the laboratory's order."""
    draw = torch.Generator().manual_seed(stream_seed(seed, "order"))
    while True:
        for index in torch.randperm(len(train[0]), generator=draw).split(size):
            if number == 0:
                return
            number -= 1
            yield train[0][index], train[1][index]


@torch.no_grad()
def evaluated(task: Task, model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Loss and metric (the accuracy, of most tasks) over all of ``data``."""
    model.eval()
    loss = metric = 0.0
    assert task.metric is not None
    for inputs, targets in zip(*(part.split(500) for part in data), strict=True):
        outputs = model(inputs)
        loss += float(task.loss(outputs, targets)) * len(inputs)
        metric += float(task.metric(outputs, targets)) * len(inputs)
    model.train()
    return loss / len(data[0]), metric / len(data[0])


def cpu_seconds(work: Callable[[], object], at_least: float) -> float:
    """CPU time of one call, over as many calls as fill ``at_least`` seconds."""
    calls, spent = 0, 0.0
    start = time.process_time()
    while spent < at_least:
        work()
        calls += 1
        spent = time.process_time() - start
    return spent / calls


def ratio(own: Sequence[float], base: Sequence[float]) -> float:
    """Median of the ratios within a repeat."""
    return statistics.median(a / b for a, b in zip(own, base, strict=True))


def parser(description: str | None) -> argparse.ArgumentParser:
    """A benchmark's arguments; its docstring is the help."""
    return argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def timing_options(made: argparse.ArgumentParser) -> None:
    """The options of the benchmarks of CPU time."""
    made.add_argument("--repeats", type=int, default=7)
    made.add_argument("--seconds", type=float, default=0.2, help="CPU time of each measurement (default 0.2)")


def run_options(made: argparse.ArgumentParser, name: str, seeds: int) -> None:
    """The options of the benchmarks whose runs are kept."""
    made.add_argument("--data", default=os.environ.get("SUREFOOT_DATA"), help="folder of the data sets")
    made.add_argument("--seeds", type=int, default=seeds)
    made.add_argument("--workers", type=int, default=2, help="processes, of one thread each (default 2)")
    made.add_argument("--out", type=Path, default=Path("surefoot-out") / name, help="folder of the kept runs")
    made.add_argument(
        "--page", type=Path, default=Path("docs/results") / f"{name}.md", help="the pictures lie beside it"
    )


def log_axis(ticks: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis of Plotly's with these ticks, written as the reports write rates."""
    return {"type": "log", "tickvals": list(ticks), "ticktext": [words.rate(tick) for tick in ticks]}


def picture(figure: Any, path: Path, width: int, height: int) -> None:
    """Write a Plotly figure where the extension says; needs kaleido, and a Chrome or Chromium."""
    figure.update_layout(template="plotly_white", font={"size": 12}, paper_bgcolor="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.write_image(path, width=width, height=height)


def short(value: float) -> str:
    """A number to three digits, as the reports write it."""
    return words.rate(float(f"{value:.3g}")) if math.isfinite(value) else f"{value}"


def spanned(values: Iterable[float]) -> str:
    """The least and the greatest, as a person says it."""
    low, high = min(found := list(values)), max(found)
    return short(low) if short(low) == short(high) else f"{short(low)} to {short(high)}"


def made_with() -> str:
    """The last line of a page."""
    return f"Run with: surefoot {surefoot.__version__}, torch {torch.__version__}, float32, one thread a run."
