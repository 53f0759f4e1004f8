"""LOSSGRAD's claim that the initial rate does not matter: the published rule and surefoot's, from 1e-8 to 10.

    python benchmarks/insensitivity.py --data DIR [--seeds 2] [--workers 2] [--page FILE.md]

The first 800 batches on CIFAR-10 (the paper's network), MNIST and scikit-learn's digits. Every finished run is kept in
``--out``, so the same command goes on where it was stopped; the page is written from the kept runs alone.
"""

from __future__ import annotations

import inspect
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import plotly.graph_objects as go
import torch
from _shared import (
    Ledger,
    Record,
    batches,
    evaluated,
    fresh_model,
    log_axis,
    made_with,
    parser,
    picture,
    run_missing,
    run_options,
    short,
    spanned,
    task_of,
)
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots
from torch import nn

import surefoot
from surefoot.lab.report.words import listing, rate

TASKS = {"cifar10": 100, "mnist": 100, "digits": 24}
"""Batch sizes: the paper's, and the digits' own."""
PUBLISHED, DEFAULT = RULES = ("published rule", "LossGrad()")
RATES = tuple(10.0**exponent for exponent in range(-8, 2))
BATCHES = 800
LAST = 50
"""The loss after a run is the mean over so many of its last batches."""
LEARNT = 0.9
"""A run has learnt something if that mean is below this share of its first loss."""
COLLAPSED = 0.1
"""One that has learnt nothing is called so if the step size of its second half is below this share of its start."""
OUTCOMES = {
    "learnt": "in every seed",
    "mixed": "learnt in one seed, not in another",
    "collapsed": "nothing was learnt, and the step size fell to less than a tenth of its start",
    "stuck": "nothing was learnt, at a step size that did not fall so far",
    "not finite": "the loss became NaN or infinite in at least one seed",
}
NEAR = 1.1
"""Rates within 10 % of the best mean loss, as the laboratory counts them."""

EARLIER: dict[float, tuple[float, float] | None] = {
    1e-8: None,
    1e-7: None,
    1e-4: (0.080, 1.54),
    1e-2: (0.058, 1.53),
    1e-1: (0.088, 1.43),
    1.0: None,
}
"""An earlier replication with the authors' own class, 800 batches of this network on JPEG copies of CIFAR-10, one seed:
geometric mean of the step size over batches 400 to 800, and the training loss at the end; ``None``: nothing learnt."""


def settings(rule: str) -> dict[str, Any]:
    """All that decides a rule, for a run to be known by: the released code's factor, or every default of LossGrad."""
    if rule == PUBLISHED:
        return {"c": 1.05}
    options = inspect.signature(surefoot.LossGrad).parameters.values()
    return {o.name: o.default for o in options if o.kind is o.KEYWORD_ONLY and o.name != "initial_rate"}


def run(
    task: str,
    rule: str,
    settings: Mapping[str, Any],
    initial_rate: float,
    seed: int,
    count: int,
    data: str | None,
) -> Record:
    """One run: the step size that each batch used, its loss before the step, and the validation at the end."""
    began = time.process_time()
    made = task_of(task, data)
    model = fresh_model(made, seed)
    stepped = (Published if rule == PUBLISHED else Surefoot)(model, initial_rate, **settings)
    sizes, losses = [], []
    for inputs, targets in batches(made.train, TASKS[task], seed, count):
        sizes.append(stepped.step_size())
        losses.append(stepped.step(lambda x=inputs, y=targets: made.loss(model(x), y)))
        if not math.isfinite(losses[-1]):  # what follows is decided: no weight is a number any more
            break
    lost = not math.isfinite(losses[-1])
    loss, accuracy = (math.nan, math.nan) if lost else evaluated(made, model, made.validation)
    return {
        "lost": lost,
        "step_size": [float(f"{size:.4g}") for size in sizes],
        "loss": [float(f"{value:.6g}") for value in losses],
        "validation_loss": loss,
        "validation_accuracy": accuracy,
        "cpu_seconds": time.process_time() - began,
    }


class Published:
    """LOSSGRAD as its authors released it: no bounds, and a rel that is no number raises h."""

    def __init__(self, model: nn.Module, initial_rate: float, c: float) -> None:
        self.weights, self.h, self.c = list(model.parameters()), initial_rate, c

    def step_size(self) -> float:
        """h of the next step."""
        return self.h

    def step(self, loss: Any) -> float:
        """One step on the batch whose loss ``loss()`` computes; that loss before it."""
        for x in self.weights:
            x.grad = None
        value = loss()
        value.backward()
        f0 = value.item()
        with torch.no_grad():
            predicted = self.h * sum(x.grad.square().sum().item() for x in self.weights if x.grad is not None)
            for x in self.weights:
                if x.grad is not None:
                    x.sub_(self.h * x.grad)
            f1 = loss().item()
        rel = (f1 - (f0 - predicted)) / (predicted + 1e-25)
        self.h = self.h / self.c if rel > 0.5 else self.h * self.c
        return f0


class Surefoot:
    """``surefoot.LossGrad``."""

    def __init__(self, model: nn.Module, initial_rate: float, **options: Any) -> None:
        self.optimizer = surefoot.LossGrad(model.parameters(), initial_rate=initial_rate, **options)

    def step_size(self) -> float:
        """h of the next step."""
        return self.optimizer.rates(bins=1).max

    def step(self, loss: Any) -> float:
        """One step on the batch whose loss ``loss()`` computes; that loss before it."""
        self.optimizer.zero_grad()
        value = loss()
        value.backward()
        self.optimizer.step(loss=value, evaluate=loss)
        return value.item()


@dataclass(frozen=True)
class Point:
    """All seeds of a task, a rule and an initial rate."""

    rate: float
    runs: tuple[Record, ...]

    @property
    def losses(self) -> list[float]:
        """Training loss after each run; infinite for one that was lost."""
        return [math.inf if r["lost"] else statistics.fmean(r["loss"][-LAST:]) for r in self.runs]

    @property
    def validation(self) -> list[float]:
        """Validation loss after each run."""
        return [math.inf if r["lost"] else r["validation_loss"] for r in self.runs]

    @property
    def settled(self) -> list[float]:
        """Geometric mean of the step size over the second half of each run that came to its end."""
        halves = [r["step_size"][len(r["step_size"]) // 2 :] for r in self.runs if not r["lost"]]
        return [statistics.geometric_mean(half) for half in halves]

    @property
    def outcome(self) -> str:
        """In a word; a key of ``OUTCOMES``."""
        if any(r["lost"] for r in self.runs):
            return "not finite"
        learnt = [loss < LEARNT * r["loss"][0] for loss, r in zip(self.losses, self.runs, strict=True)]
        if any(learnt):
            return "learnt" if all(learnt) else "mixed"
        return "collapsed" if max(self.settled) < COLLAPSED * self.rate else "stuck"


def points(ledger: Ledger, jobs: Sequence[dict[str, Any]], task: str, rule: str) -> list[Point]:
    """The points of one line of a plot, by rate."""
    found: dict[float, list[Record]] = {}
    for job in jobs:
        record = ledger.get(job)
        if (job["task"], job["rule"]) == (task, rule) and record is not None:
            found.setdefault(job["initial_rate"], []).append(record)
    return [Point(initial, tuple(runs)) for initial, runs in sorted(found.items())]


LOSS_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 1.5, 2, 3, 5, 10)
Results = dict[tuple[str, str], list[Point]]


def steps_figure(results: Results, tasks: Sequence[str]) -> go.Figure:
    """Step size over the batches, a panel for each task and rule."""
    titles = [f"{task}: {rule}" for task in tasks for rule in RULES]
    figure = make_subplots(
        len(tasks),
        len(RULES),
        subplot_titles=titles,
        shared_xaxes=True,
        shared_yaxes=True,
        horizontal_spacing=0.03,
        vertical_spacing=0.06,
    )
    colours = sample_colorscale("Turbo", [0.05 + 0.9 * i / (len(RATES) - 1) for i in range(len(RATES))])
    for row, task in enumerate(tasks, 1):
        for column, rule in enumerate(RULES, 1):
            for point in results[task, rule]:
                sizes, look = point.runs[0]["step_size"], colours[RATES.index(point.rate)]
                shown = range(0, len(sizes), 4)
                figure.add_scatter(
                    x=list(shown),
                    y=[sizes[i] for i in shown],
                    mode="lines",
                    row=row,
                    col=column,
                    line={"color": look, "width": 1.4},
                    name=rate(point.rate),
                    legendgroup=rate(point.rate),
                    showlegend=row == column == 1,
                )
                if point.runs[0]["lost"]:
                    figure.add_scatter(
                        x=[len(sizes) - 1],
                        y=[sizes[-1]],
                        mode="markers",
                        row=row,
                        col=column,
                        showlegend=False,
                        marker={"color": look, "symbol": "x", "size": 9},
                        legendgroup=rate(point.rate),
                    )
        figure.update_yaxes(title_text="step size", row=row, col=1)
    figure.update_yaxes(**log_axis([10.0**exponent for exponent in range(-12, 4, 3)]), range=[-12.5, 3.5])
    longest = max(len(r["step_size"]) for line in results.values() for p in line for r in p.runs)
    figure.update_xaxes(range=[-0.01 * longest, longest])
    figure.update_xaxes(title_text="batch", row=len(tasks))
    figure.update_layout(
        legend={"title": {"text": "initial rate"}, "traceorder": "reversed"},
        margin={"l": 60, "r": 10, "t": 30, "b": 45},
    )
    return figure


def loss_figure(results: Results, tasks: Sequence[str]) -> go.Figure:
    """Training and validation loss after the runs over the initial rate; what is not finite is a cross at the top."""
    kinds = {"training loss, last 50 batches": "losses", "validation loss": "validation"}
    titles = [f"{task}: {kind}" for task in tasks for kind in kinds]
    figure = make_subplots(
        len(tasks),
        2,
        subplot_titles=titles,
        shared_xaxes=True,
        horizontal_spacing=0.08,
        vertical_spacing=0.07,
    )
    looks = {
        PUBLISHED: ("#d55e00", "circle", 0.96),
        DEFAULT: ("#0072b2", "square-open", 1.04),
    }
    for row, task in enumerate(tasks, 1):
        for column, values in enumerate(kinds.values(), 1):
            finite = [
                v for rule in RULES for p in results[task, rule] for v in getattr(p, values) if v < math.inf
            ]
            low, top = (
                math.log10(min(finite)) - 0.1,
                math.log10(min(max(finite), 10 * min(finite) + 10)) + 0.12,
            )
            for rule, (colour, symbol, shift) in looks.items():
                kept = [(p.rate, getattr(p, values)) for p in results[task, rule]]
                whole = [(x * shift, v) for x, v in kept if max(v) < math.inf]
                lost = [x * shift for x, v in kept if max(v) == math.inf]
                figure.add_scatter(
                    x=[x for x, _ in whole],
                    y=[statistics.fmean(v) for _, v in whole],
                    row=row,
                    col=column,
                    error_y={
                        "type": "data",
                        "array": [statistics.stdev(v) if len(v) > 1 else 0 for _, v in whole],
                        "thickness": 1.2,
                        "width": 3,
                    },
                    mode="lines+markers",
                    line={"color": colour, "width": 2},
                    marker={"symbol": symbol, "size": 7},
                    name=rule,
                    legendgroup=rule,
                    showlegend=row == column == 1,
                )
                figure.add_scatter(
                    x=lost,
                    y=[10 ** (top - 0.08 * (top - low))] * len(lost),
                    mode="markers",
                    row=row,
                    col=column,
                    marker={"symbol": "x", "size": 9, "color": colour},
                    showlegend=False,
                    legendgroup=rule,
                )
            figure.update_yaxes(**log_axis(LOSS_TICKS), range=[low, top], row=row, col=column)
    figure.update_xaxes(**log_axis(RATES))
    figure.update_xaxes(title_text="initial rate", row=len(tasks))
    figure.update_layout(legend={"orientation": "h", "y": 1.08}, margin={"l": 50, "r": 10, "t": 70, "b": 45})
    return figure


def decades(line: Sequence[Point]) -> tuple[list[float], float]:
    """The rates whose mean loss is within 10 % of the line's best, and that best."""
    means = {p.rate: statistics.fmean(p.losses) for p in line}
    best = min(means.values())
    return [r for r, mean in means.items() if mean <= NEAR * best], best


def told(line: Sequence[Point], label: str) -> str:
    """What one rule did on one task, in words."""
    by_outcome: dict[str, list[Point]] = {}
    for point in line:
        by_outcome.setdefault(point.outcome, []).append(point)
    learnt = by_outcome.pop("learnt", [])
    near, best = decades(line)
    settled = [size for p in learnt for size in p.settled]
    seeds = min(len(point.runs) for point in line)
    text = f"- **{label}** ({seeds} seed{'s' * (seeds != 1)}) learnt from {len(learnt)} of {len(line)} initial rates"
    if learnt:
        text += (
            f" ({listing([rate(p.rate) for p in learnt])}); there the step size of the second half is {spanned(settled)} "
            f"(geometric mean of each run; starts apart by a factor of {short(learnt[-1].rate / learnt[0].rate)}, "
            f"results by {short(max(settled) / min(settled))}), and the training loss {spanned(x for p in learnt for x in p.losses)}. "
            f"Within 10 % of its best mean training loss ({short(best)}): {listing([rate(r) for r in near])}."
        )
    else:
        text += "."
    for outcome, those in by_outcome.items():
        text += f" {outcome.capitalize()} ({OUTCOMES[outcome]}): {listing([rate(p.rate) for p in those])}."
    return text


def compared(line: Sequence[Point]) -> str:
    """The published rule on CIFAR-10 beside the earlier replication, in words."""
    here = {p.rate: p for p in line}
    shared = [r for r in EARLIER if r in here]
    apart = [r for r in shared if (EARLIER[r] is not None) != (here[r].outcome == "learnt")]
    text = (
        "An earlier replication ran the authors' own class on this network (JPEG copies of CIFAR-10, one seed). Of the "
        f"{len(shared)} initial rates in both, {len(shared) - len(apart)} end alike (learnt in every seed, or not)"
    )
    text += f"; apart: {listing([rate(r) for r in apart])}." if apart else "."
    both = [(r, found) for r in shared if (found := EARLIER[r]) is not None and r not in apart]
    if both:
        sizes = [statistics.geometric_mean(here[r].settled) / size for r, (size, _) in both]
        losses = [statistics.fmean(here[r].losses) / loss for r, (_, loss) in both]
        text += (
            f" Where both learnt, the step size of batches 400 to 800 is here {spanned(sizes)} times what it was there, "
            f"the training loss at the end {spanned(losses)} times."
        )
    return text


def cell(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    if max(values) == math.inf:
        return "not finite"
    spread = f" ± {short(statistics.stdev(values))}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


def table(results: Results, task: str) -> list[str]:
    """One task, an initial rate a row, the rules that were run side by side."""
    kept = [rule for rule in RULES if results[task, rule]]
    heads = [f"{rule}: step size | training loss | validation loss" for rule in kept]
    lines = [f"| initial rate | {' | '.join(heads)} |", "|---" * (1 + 3 * len(kept)) + "|"]
    for group in zip(*(results[task, rule] for rule in kept), strict=True):
        cells = [
            f"{short(statistics.geometric_mean(p.settled)) if p.settled else '–'} | "
            f"{cell(p.losses)}{'' if p.outcome in ('learnt', 'not finite') else f' ({p.outcome})'} | {cell(p.validation)}"
            for p in group
        ]
        lines.append(f"| {rate(group[0].rate)} | {' | '.join(cells)} |")
    return lines


def default(option: str) -> str:
    """What ``surefoot.LossGrad`` takes for an option that is not given."""
    return f"{inspect.signature(surefoot.LossGrad).parameters[option].default:g}"


def page(results: Results, tasks: Sequence[str], seeds: int, count: int, stem: str) -> str:
    """The results as Markdown."""
    lines = [
        "# Does LOSSGRAD forget its initial rate?",
        "",
        "Written by `benchmarks/insensitivity.py` from its kept runs; run again by",
        "",
        "    make insensitivity DATA=folder",
        "",
        "The paper's figure shows the step size of the first 800 batches from several initial rates, and claims that it "
        "comes to one value whatever the start. Here every decade from 1e-8 to 10, "
        f"{count} batches, up to {seeds} seeds (weights and order of the data; how many is said with each rule), on the paper's CIFAR-10 network (batch 100), the "
        "MNIST network of the L-algorithms' paper (batch 100) and a small network for scikit-learn's digits (batch 24). "
        "*Published rule* is the released code's, to the letter: factors of 1.05, division by h |g|² + 1e-25, no bounds, "
        f"no regard for rounding, and a loss that is NaN raises h. *{DEFAULT}* is surefoot's class as it comes. A change too "
        "small for the loss's precision to show raises h there, and a loss that is not finite lowers it; the factor is "
        f"{default('ramp')} to begin with, and its root takes its place whenever h turns upwards, down to {default('up')}; a "
        "step that was too long is taken back meanwhile, and later what was too much of a step after which the loss is higher.",
        "",
        f"![Step size over the batches]({stem}_steps.svg)",
        "",
        "Seed 0. A cross: the loss was NaN or infinite there.",
        "",
        f"![Loss after the run over the initial rate]({stem}_loss.svg)",
        "",
        "Mean and standard deviation over the seeds; a cross at the top: the loss of at least one seed was not finite.",
        "",
    ]
    for task in tasks:
        lines += [
            f"## {task}",
            "",
            *(told(results[task, rule], rule) for rule in RULES if results[task, rule]),
            "",
        ]
        if task == "cifar10" and count == BATCHES:
            lines += [compared(results[task, PUBLISHED]), ""]
        lines += [*table(results, task), ""]
    lines += [
        "*Step size*: geometric mean over the second half of the batches. "
        f"*Training loss*: mean over the last {LAST} batches, each before its step. *Learnt*: that is below "
        f"{LEARNT:.0%} of the first batch's loss, in every seed.",
        "",
        made_with(),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run what is missing, then write the page."""
    arguments = parser(__doc__)
    run_options(arguments, "lossgrad_insensitivity", seeds=2)
    arguments.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    arguments.add_argument("--batches", type=int, default=BATCHES)
    given = arguments.parse_args()
    jobs = [  # the short ones first
        {
            "task": task, "rule": rule, "settings": settings(rule), "initial_rate": initial, "seed": seed,
            "count": given.batches,
        }
        for task in reversed(given.tasks) for seed in range(given.seeds) for initial in RATES for rule in RULES
    ]  # fmt: skip
    ledger = Ledger(given.out / "runs.jsonl")
    run_missing(jobs, partial(run, data=given.data), ledger, given.workers)
    results = {(task, rule): points(ledger, jobs, task, rule) for task in given.tasks for rule in RULES}
    stem = given.page.stem
    picture(steps_figure(results, given.tasks), given.page.with_name(f"{stem}_steps.svg"), 1000, 900)
    picture(loss_figure(results, given.tasks), given.page.with_name(f"{stem}_loss.svg"), 1000, 900)
    given.page.write_text(page(results, given.tasks, given.seeds, given.batches, stem), encoding="utf8")
    print(f"Page: {given.page}")


if __name__ == "__main__":
    main()
