"""Table 1 of the L-algorithms' paper, run again: each row at its published best setting, beside the published number.

    python benchmarks/table1.py --data DIR [--seeds 5] [--epochs 5] [--out surefoot-out/table1] [--page FILE.md]

It is ``surefoot compare mnist`` with the rows of ``surefoot.papers.l_algorithms`` and goes on from what ``--out`` holds;
the page is written from the stored runs alone.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from surefoot.lab import plan, stats
from surefoot.lab.report.words import listing
from surefoot.lab.runs import RunResult
from surefoot.lab.store import Store
from surefoot.papers.l_algorithms import EPOCHS, RUNS, TABLE_1, Row


def command(arguments: argparse.Namespace) -> list[str]:
    """The comparison's command line."""
    rows = ",".join(row.request for row in TABLE_1)
    words = ["compare", "mnist", "--optimizers", rows, "--seeds", str(arguments.seeds)]
    words += ["--epochs", str(arguments.epochs), "--out", str(arguments.out), "--engine", "separate"]
    return words + (["--data", str(arguments.data)] if arguments.data else [])


def runs_of(row: Row, stored: Sequence[RunResult], seeds: int, epochs: int) -> list[RunResult]:
    """The stored runs of a row, by seed."""
    (request,) = plan.parse_optimizers(row.request)
    return sorted(
        (
            r
            for r in stored
            if r.spec.optimizer == request.optimizer
            and (r.spec.rate, r.spec.batch_size, r.spec.epochs) == (row.rate, row.batch_size, epochs)
            and r.spec.seed < seeds
            and all(r.spec.settings[name] == value for name, value in request.settings.items())
        ),
        key=lambda r: r.spec.seed,
    )


def interval(values: stats.Estimate, digits: int) -> str:
    """Mean and 95 % interval."""
    return f"{values.mean:.{digits}f} [{values.low:.{digits}f}, {values.high:.{digits}f}]"


def page(stored: Sequence[RunResult], arguments: argparse.Namespace) -> str:
    """The results as Markdown."""
    lines = [
        "# MNIST: Table 1 of the L-algorithms' paper, run again",
        "",
        "Written by `benchmarks/table1.py` from its stored runs; run again by",
        "",
        "    make table1 DATA=folder",
        "",
        f"Each row at its published best setting (L, M in patterns): {arguments.epochs} epochs"
        f"{'' if arguments.epochs == EPOCHS else f' (published: {EPOCHS})'}, {arguments.seeds} seeds that differ in "
        "weights and in the order of the data. *Min loss* is the smallest of a run's means over blocks of 3,000 "
        "patterns of training loss. The published spreads are not over seeds (see `surefoot/papers/l_algorithms.py`), "
        "so compare means.",
        "",
        "| method | L | M | rate | min loss, published (epoch) | min loss, ours: mean ± s.d. [95 %] | epoch "
        "| ours / published | final validation loss [95 %] | accuracy [95 %] | ms a step | s a run | diverged |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    environments, apart = set(), []
    for row in TABLE_1:
        runs = runs_of(row, stored, arguments.seeds, arguments.epochs)
        if len(runs) != arguments.seeds:
            raise SystemExit(f"error: {len(runs)} of {arguments.seeds} runs of {row.name} are stored.")
        low = stats.estimate(r.min_train_loss for r in runs)
        epoch = stats.estimate(r.min_train_loss_patterns / 60_000 for r in runs)
        loss = stats.estimate(r.final_validation_loss for r in runs)
        accuracy = stats.estimate(r.final_validation_metric for r in runs)
        if not low.low <= row.min_loss <= low.high:
            origin = "" if row.source == "paper" else f", {row.source}"
            apart.append(f"{row.name} ({low.mean / row.min_loss:.2f} x the published{origin})")
        published = f"{row.min_loss:.3f} ± {row.min_loss_sd:.3f}" + (f" ({row.epoch})" if row.epoch else "")
        lines.append(
            f"| {row.name} | {row.window_patterns or '–'} | {row.batch_size} | {row.rate:g} | {published} "
            f"| {low.mean:.4f} ± {low.sd:.4f} [{low.low:.4f}, {low.high:.4f}] | {epoch.mean:.1f} | {low.mean / row.min_loss:.2f} "
            f"| {interval(loss, 4)} | {interval(accuracy, 4)} "
            f"| {stats.estimate(1e3 * r.step_seconds for r in runs).mean:.2f} "
            f"| {stats.estimate(r.seconds for r in runs).mean:.0f} | {sum(r.status == 'diverged' for r in runs)} |"
        )
        environments |= {
            ", ".join(
                f"{name} {r.environment[name]}"
                for name in ("surefoot", "torch", "processor", "device", "threads")
            )
            for r in runs
        }
    verdict = (
        f"The published mean lies outside our 95 % interval for {listing(apart)}."
        if apart
        else "Every published mean lies within our 95 % interval."
    )
    if any("thesis" in name for name in apart):
        verdict += " The scripts behind the rows that the paper quotes from the thesis are not public."
    return "\n".join([*lines, "", verdict, "", "Run with: " + "; ".join(sorted(environments)) + ".", ""])


def main() -> None:
    """Run what is missing, then write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=os.environ.get("SUREFOOT_DATA"))
    parser.add_argument("--seeds", type=int, default=RUNS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=Path("surefoot-out/table1"))
    parser.add_argument("--page", type=Path, default=Path("docs/results/mnist_table1.md"))
    arguments = parser.parse_args()
    subprocess.run([sys.executable, "-m", "surefoot", *command(arguments)], check=True)
    with Store(arguments.out / "runs.sqlite") as store:
        arguments.page.write_text(page(store.all(), arguments), encoding="utf8")
    print(f"Page: {arguments.page}")


if __name__ == "__main__":
    main()
