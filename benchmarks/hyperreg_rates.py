"""Hyper-regularization's claim that large initial rates do no harm: 12 rules, gradient descent and surefoot's default.

    python benchmarks/hyperreg_rates.py --data DIR [--full] [--seeds 1] [--workers 2] [--page FILE.md]

40 epochs of the report's two-layer MNIST network, L2 1e-4, from every initial rate of 1e-4 to 1e4. To end in minutes on
two cores it trains on the first 10,000 images in batches of 500; ``--full`` takes all 60,000. Every finished run is kept
in ``--out``, so the same command goes on where it was stopped; the page is written from the kept runs alone.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import plotly.graph_objects as go
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
from plotly.subplots import make_subplots
from torch import Tensor

import surefoot
from surefoot.lab.report.words import listing, rate
from surefoot.optim import directions, rules

TASK = "mnist-sigmoid"
RATES = tuple(10.0**exponent for exponent in range(-4, 5))
EPOCHS = 40
BATCH = 500
FEWER = 10_000
DECAY = 1e-4
DIVERGENCES = {"kl": "KL", "rkl": "RKL", "hellinger": "H", "chi2": "X"}
"""As the report abbreviates them."""

Make = Callable[[Iterable[Tensor], float], surefoot.SelfTuning]


def _published(divergence: str, algorithm: int) -> Make:
    return lambda params, initial: surefoot.HyperReg(
        params,
        divergence=divergence,
        algorithm=algorithm,
        initial_rate=initial,
        growth=2.0,
        longest_step=None,
        weight_decay=DECAY,
    )


GD, DEFAULT = "GD", "surefoot.HyperReg"
RULES = {
    f"{short_name}{algorithm}": (divergence, algorithm)
    for divergence, short_name in DIVERGENCES.items()
    for algorithm in (1, 2, 3)
}
METHODS: Mapping[str, Make] = {
    GD: lambda params, initial: surefoot.SelfTuning(
        params, directions.SGD(weight_decay=DECAY), rules.Constant(initial)
    ),
    **{name: _published(*rule) for name, rule in RULES.items()},
    DEFAULT: lambda params, initial: surefoot.HyperReg(params, initial_rate=initial, weight_decay=DECAY),
}


def run(method: str, initial_rate: float, seed: int, patterns: int, epochs: int, data: str | None) -> Record:
    """One run: the loss over all that was trained on, before and after, and the largest of any batch on the way."""
    began = time.process_time()
    task = task_of(TASK, data)
    train = (task.train[0][:patterns], task.train[1][:patterns])
    model = fresh_model(task, seed)
    first, _ = evaluated(task, model, train)
    optimizer = METHODS[method](model.parameters(), initial_rate)
    largest = first
    for inputs, targets in batches(train, BATCH, seed, epochs * math.ceil(patterns / BATCH)):
        optimizer.zero_grad()
        loss = task.loss(model(inputs), targets)
        if not math.isfinite(loss.item()):
            largest = math.inf
            break
        largest = max(largest, loss.item())
        loss.backward()
        optimizer.step()
    final, _ = evaluated(task, model, train) if largest < math.inf else (math.inf, math.nan)
    lost = not math.isfinite(final)
    validation, accuracy = (math.inf, math.nan) if lost else evaluated(task, model, task.validation)
    return {
        "first": first,
        "final": math.inf if lost else final,
        "largest": math.inf if lost else max(largest, final),
        "validation_loss": validation,
        "validation_accuracy": accuracy,
        "cpu_seconds": time.process_time() - began,
    }


@dataclass(frozen=True)
class Point:
    """All seeds of a method at an initial rate."""

    rate: float
    runs: tuple[Record, ...]

    def values(self, kind: str) -> list[float]:
        """One number of each run."""
        return [r[kind] for r in self.runs]

    def mean(self, kind: str) -> float:
        """Over the seeds; infinite if one of them is."""
        return statistics.fmean(self.values(kind))


Results = dict[str, dict[float, Point]]


def collected(ledger: Ledger, jobs: Sequence[dict[str, Any]]) -> Results:
    """The points of every method, by rate."""
    found: dict[str, dict[float, list[Record]]] = {name: {} for name in METHODS}
    for job in jobs:
        record = ledger.get(job)
        if record is not None:
            found[job["method"]].setdefault(job["initial_rate"], []).append(record)
    return {
        name: {r: Point(r, tuple(runs)) for r, runs in sorted(by_rate.items())}
        for name, by_rate in found.items()
    }


def figure(results: Results) -> go.Figure:
    """Loss after the run, and the largest on the way, over the initial rate; a column for each algorithm."""
    kinds = {"final": "training loss after the run", "largest": "largest loss on the way"}
    panels = make_subplots(
        2, 3, subplot_titles=[f"algorithm {a}: {kind}" for kind in kinds.values() for a in (1, 2, 3)],
        shared_xaxes=True, shared_yaxes=True, horizontal_spacing=0.02, vertical_spacing=0.08,
    )  # fmt: skip
    looks = {
        "KL": ("#d55e00", "circle-open", 13, "solid"),
        "RKL": ("#009e73", "square-open", 10, "solid"),
        "H": ("#cc79a7", "diamond-open", 8, "solid"),
        "X": ("#e69f00", "triangle-up-open", 6, "solid"),
        GD: ("#666666", "cross", 6, "dash"),
        DEFAULT: ("#0072b2", "star", 8, "dot"),
    }
    for row, kind in enumerate(kinds, 1):
        finite = [p.mean(kind) for line in results.values() for p in line.values() if p.mean(kind) < math.inf]
        top = math.log10(max(finite)) + 0.5
        for column, algorithm in enumerate((1, 2, 3), 1):
            for label, (colour, symbol, size, dash) in looks.items():
                line = results.get(label) or results[f"{label}{algorithm}"]
                means = {r: p.mean(kind) for r, p in line.items()}
                panels.add_scatter(
                    x=[r for r, mean in means.items() if mean < math.inf],
                    y=[mean for mean in means.values() if mean < math.inf],
                    mode="lines+markers", line={"color": colour, "width": 1.8, "dash": dash},
                    marker={"symbol": symbol, "size": size}, name=label, legendgroup=label,
                    showlegend=row == column == 1, row=row, col=column,
                )  # fmt: skip
                lost = [r for r, mean in means.items() if mean == math.inf]
                panels.add_scatter(
                    x=lost, y=[10 ** (top - 0.2)] * len(lost), mode="markers", legendgroup=label, showlegend=False,
                    marker={"symbol": "x", "size": 9, "color": colour}, row=row, col=column,
                )  # fmt: skip
        panels.update_yaxes(range=[math.log10(min(finite)) - 0.2, top], row=row)
    panels.update_yaxes(**log_axis([10.0**exponent for exponent in range(-4, 39)]))
    panels.update_xaxes(**log_axis(RATES[::2]))
    panels.update_xaxes(title_text="initial rate", row=2)
    panels.update_layout(legend={"orientation": "h", "y": 1.1}, margin={"l": 50, "r": 10, "t": 80, "b": 45})
    return panels


def against_gd(results: Results, initial: float) -> tuple[float, str]:
    """The largest relative distance of a rule's final loss from GD's at that rate, and whose it is."""
    base = results[GD][initial].mean("final")
    distances = {name: abs(results[name][initial].mean("final") / base - 1) for name in RULES}
    worst = max(distances, key=distances.__getitem__)
    return distances[worst], worst


def told(results: Results) -> list[str]:
    """What the numbers say, beside what was claimed."""
    rates = list(results[GD])
    first = results[GD][rates[0]].mean("first")

    def bad(name: str, initial: float) -> bool:
        return not results[name][initial].mean("final") < first

    def where(name: str) -> str:
        """The rates at which a method ends above its first loss."""
        found = [r for r in rates if bad(name, r)]
        return "nowhere" if not found else f"at {listing([rate(r) for r in found])}"

    alike = [r for r in rates if against_gd(results, r)[0] < 0.01]
    text = [
        "- **Small rates.** Claim: every rule equals gradient descent there. Over the 12 rules the largest relative "
        "distance of the final loss from GD's is "
        + ", ".join(
            f"{short(100 * distance)} % at {rate(r)}" + f" ({name})" * (distance > 0)
            for r in rates
            if math.isfinite((found := against_gd(results, r))[0]) and results[GD][r].mean("final") < first
            for distance, name in [found]
        )
        + f". Within 1 %: {listing([rate(r) for r in alike]) if alike else 'at no rate'}. Since beta never falls, "
        "no rule can recover from a rate that is too small."
    ]
    best = {name: min(line.values(), key=lambda p: p.mean("final")) for name, line in results.items()}
    text.append(
        f"- **Best rate.** GD {short(best[GD].mean('final'))} at {rate(best[GD].rate)}; the 12 rules "
        f"{spanned(best[name].mean('final') for name in RULES)} at {spanned(best[name].rate for name in RULES)}; "
        f"{DEFAULT} {short(best[DEFAULT].mean('final'))} at {rate(best[DEFAULT].rate)}."
    )
    text.append(
        f"- **Large rates.** Claim: best in the middle, divergence at large rates. The loss begins at {short(first)}; after "
        f"the run it is above that with GD {where(GD)}; of the rules, with "
        + "; ".join(
            f"{listing(names)} {place}" for place, names in _grouped({n: where(n) for n in RULES}).items()
        )
        + "."
    )
    top = [r for r in rates if r >= 10]
    text.append(
        "- **The way there.** In theory, on a quadratic, the loss explodes while beta can only double, most in algorithm 3, "
        "whose step is a doubling behind. Here the largest loss (median over the four divergences) is "
        + "; ".join(
            f"at {rate(r)} "
            + ", ".join(
                short(statistics.median(results[f"{d}{a}"][r].mean("largest") for d in DIVERGENCES.values()))
                + f" (algorithm {a})"
                for a in (1, 2, 3)
            )
            + f", GD {short(results[GD][r].mean('largest'))}"
            for r in top
        )
        + "."
    )
    text.append(
        "- **RKL2 and RKL3 against RKL1.** The report has the first two diverge earlier. With the pole taken for what it is "
        "(beta doubles there), final losses of RKL1 / 2 / 3 are "
        + "; ".join(
            f"{' / '.join(short(results[f'RKL{a}'][r].mean('final')) for a in (1, 2, 3))} at {rate(r)}"
            for r in rates
            if r >= 1
        )
        + "."
    )
    default = results[DEFAULT]
    text.append(
        f"- **{DEFAULT} as it comes** (rkl, algorithm 1, no weight moves more than 0.1 in a step): final loss "
        f"{spanned(default[r].mean('final') for r in rates if r >= 1)} from rates of 1 and more, largest loss on the way "
        f"{spanned(default[r].mean('largest') for r in rates if r >= 1)}; above its first loss {where(DEFAULT)}."
    )
    return text


def _grouped(labels: Mapping[str, str]) -> dict[str, list[str]]:
    """Keys by their value."""
    groups: dict[str, list[str]] = {}
    for key, label in labels.items():
        groups.setdefault(label, []).append(key)
    return groups


def table(results: Results, kind: str) -> list[str]:
    """A method a row, an initial rate a column."""
    rates = list(results[GD])

    def cell(point: Point) -> str:
        if point.mean(kind) == math.inf:
            return "not finite"
        values = point.values(kind)
        spread = f" ± {short(statistics.stdev(values))}" if len(values) > 1 else ""
        return f"{short(point.mean(kind))}{spread}"

    lines = [f"| | {' | '.join(rate(r) for r in rates)} |", "|---" * (1 + len(rates)) + "|"]
    return lines + [
        f"| {name} | {' | '.join(cell(line[r]) for r in rates)} |" for name, line in results.items()
    ]


def page(results: Results, patterns: int, epochs: int, seeds: int, stem: str) -> str:
    """The results as Markdown."""
    fewer = (
        f"To end in minutes on two cores they are the first {patterns:,} of 60,000 images; `--full` takes all."
        if patterns == FEWER
        else "All training images."
    )
    lost = any(p.mean("final") == math.inf for line in results.values() for p in line.values())
    return "\n".join(
        [
            "# Hyper-regularization: which initial rates are safe?",
            "",
            "Written by `benchmarks/hyperreg_rates.py` from its kept runs; run again by",
            "",
            "    make hyperreg DATA=folder",
            "",
            f"The report's network (784-500-10, sigmoid, softmax), {epochs} epochs of {patterns:,} MNIST images in batches "
            f"of {BATCH}, L2 1e-4, {seeds} seed{'s' if seeds > 1 else ''}. {fewer} The report leaves the batch, the initial "
            "weights and the scale of the inputs open (see the task `mnist-sigmoid`), so shapes can be compared and numbers "
            "cannot. KL, RKL, H (Hellinger), X (chi^2); 1 exact, 2 and 3 approximate, a numbering that is a reconstruction; "
            "all with a growth of at most 2 a step and no longest step, as published. Losses are without the penalty.",
            "",
            f"![Loss over the initial rate]({stem}.svg)",
            "",
            *(["A cross at the top: the loss became NaN or infinite.", ""] if lost else []),
            *told(results),
            "",
            f"## Training loss after {epochs} epochs, by initial rate",
            "",
            *table(results, "final"),
            "",
            "## Largest loss of a batch on the way",
            "",
            *table(results, "largest"),
            "",
            made_with(),
            "",
        ]
    )


def main() -> None:
    """Run what is missing, then write the page."""
    arguments = parser(__doc__)
    run_options(arguments, "hyperreg_rates", seeds=1)
    arguments.add_argument("--full", action="store_true", help="all 60,000 training images")
    arguments.add_argument("--patterns", type=int, default=FEWER, help="the first so many of them (10,000)")
    arguments.add_argument("--epochs", type=int, default=EPOCHS)
    given = arguments.parse_args()
    patterns = 60_000 if given.full else given.patterns
    jobs = [
        {"method": name, "initial_rate": initial, "seed": seed, "patterns": patterns, "epochs": given.epochs}
        for seed in range(given.seeds)
        for initial in RATES
        for name in METHODS
    ]
    ledger = Ledger(given.out / "runs.jsonl")
    run_missing(jobs, partial(run, data=given.data), ledger, given.workers)
    results = collected(ledger, jobs)
    stem = given.page.stem
    picture(figure(results), given.page.with_suffix(".svg"), 1000, 750)
    given.page.write_text(page(results, patterns, given.epochs, given.seeds, stem), encoding="utf8")
    print(f"Page: {given.page}")


if __name__ == "__main__":
    main()
