"""Which LOSSGRAD for momentum and Adam: candidates against tuned rates, over tasks, batch sizes and initial rates.

    python benchmarks/lossgrad_defaults.py --data DIR [--seeds 2] [--workers 2] [--page FILE.md]

Four real tasks, batches of 20, 100 and 500, everything with a linear decay. Every finished run is kept in ``--out``, so
the same command goes on where it was stopped.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from _shared import made_with, parser, run_options

from surefoot.lab.executor import LocalProcesses
from surefoot.lab.plan import parse_optimizers, specs
from surefoot.lab.store import Store

HERE = Path(__file__).parent
TASKS = {
    "digits": "digits",
    "fashion-12k": f"{HERE / 'study_tasks.py'}:fashion",
    "imdb-12k": f"{HERE / 'study_tasks.py'}:imdb",
    "mnist-12k-norm": f"{HERE / 'study_tasks.py'}:mnist_norm",
}
BATCHES = (20, 100, 500)
STARTS = (1e-8, 1e-4, 1.0, 1e2)
TUNED = {"adam": (1e-3, 3e-3, 1e-2, 3e-2), "momentum": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)}
BASELINE = "adam, tuned"
FAILED = 2.0
"""Times the tuned baseline's validation loss: a run beyond is counted as failed."""

PUBLISHED = "threshold=0.5,down=1.05,ramp=1,retract=false"
LOSSGRAD = {
    "adam": (
        PUBLISHED,
        "threshold=0.5,down=1.05",
        "threshold=0.4,down=1.1",
        "threshold=0.3,down=1.15",
        "probe=raw,threshold=0.95,down=1.15",
    ),
    "momentum": (
        PUBLISHED,
        "threshold=0.4,down=1.1",
        "probe=raw,threshold=0.5,down=1.05",
    ),
}


def families() -> dict[str, str]:
    """What is compared: a name, and the optimizer with its settings and rates."""

    def rates(values: Sequence[float]) -> str:
        return "rate=" + "|".join(f"{value:g}" for value in values)

    found = {
        f"{name}, tuned": f"{name}[schedule=linear,{rates(values)}" for name, values in TUNED.items()
    } | {
        "Prodigy": "prodigy[schedule=linear,rate=1",
        "Schedule-Free AdamW": f"schedulefree-adamw[{rates((2.5e-3, 1e-2))}",
    }
    for direction, variants in LOSSGRAD.items():
        for settings in variants:
            shown = settings.replace(PUBLISHED, "the published rule").replace(",", ", ")
            found[f"lossgrad-{direction}: {shown}"] = (
                f"lossgrad-{direction}[schedule=linear,{settings},{rates(STARTS)}"
            )
    return found


Losses = dict[tuple[str, int, str], dict[float, list[float]]]
"""Validation losses of the seeds by (task, batch, family) and rate."""


def run(store: Store, data: Path | None, seeds: int, workers: int) -> Losses:
    """Every run, made or taken from the store."""
    losses: Losses = defaultdict(lambda: defaultdict(list))
    for task, reference in TASKS.items():
        with LocalProcesses(reference, data if ":" in reference else None, workers=workers) as here:
            owners = {}
            for family, text in families().items():
                requests = parse_optimizers(f"{text},batch={'|'.join(map(str, BATCHES))}]")
                info, methods = here.prepare(requests, ())
                for spec in specs(info, methods, info.epochs, range(seeds)):
                    owners[spec.key] = (family, spec)
            known = store.load(owners)
            todo = [spec for key, (_, spec) in owners.items() if key not in known]
            print(f"{task}: {len(known)} of {len(owners)} runs are there", flush=True)
            for result in here.run([spec] for spec in todo):
                store.save(result)
                known[result.spec.key] = result
        for key, (family, spec) in owners.items():
            losses[task, spec.batch_size, family][spec.rate].append(known[key].final_validation_loss)
    return losses


def page(losses: Losses, seeds: int) -> str:
    """The page, every number and verdict from the runs."""
    lines = [
        "# LOSSGRAD with momentum and Adam: which probe, which threshold",
        "",
        f"Validation loss after 2 epochs (digits: 10) with a linear decay of every rate, mean of {seeds} seeds, divided by that of "
        f"Adam at the best of {len(TUNED['adam'])} rates for the same task and batch size. Geometric means over "
        f"{len(TASKS)} tasks ({', '.join(TASKS)}); LOSSGRAD from initial rates {', '.join(f'{s:g}' for s in STARTS)}. "
        f"*Failed*: runs beyond {FAILED:g} times tuned Adam, in percent, with those that diverged.",
        "",
        "**Not held out.** The defaults (0.4 / 1.1) and the ramp were chosen while looking at digits, "
        "fashion-12k and imdb-12k, seed 0, over some ten settings of threshold and down and three "
        "designs of the ramp, and this table was made anew for each; only mnist-12k-norm had no part in "
        "the choice of threshold and down. So these numbers flatter them. Tuned Adam is flattered "
        "likewise: the best of its rates on the validation data.",
        "",
        "| | " + " | ".join(f"batch {b}: start 1e-4 | all starts | failed %" for b in BATCHES) + " |",
        "| --- | " + " | ".join(["---"] * 3 * len(BATCHES)) + " |",
    ]
    for family in families():
        cells = []
        for batch in BATCHES:
            ratios: dict[float, list[float]] = defaultdict(list)
            for task in TASKS:
                base = min(map(statistics.fmean, losses[task, batch, BASELINE].values()))
                found = losses[task, batch, family]
                if family in (f"{name}, tuned" for name in TUNED) or len(found) < len(STARTS):
                    found = {0.0: min(found.values(), key=statistics.fmean)}
                for start, values in found.items():
                    ratios[start] += [value / base for value in values]
            every = [value for values in ratios.values() for value in values]
            failed = sum(value > FAILED for value in every) / len(every)
            cells += [
                geometric(ratios.get(1e-4, ratios.get(0.0, []))),
                geometric(every) if len(ratios) > 1 else "",
                f"{100 * failed:.0f}",
            ]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    lines += ["", "## Each task", ""]
    for task in TASKS:
        lines += [
            f"### {task}",
            "",
            "Validation loss; for LOSSGRAD from each start.",
            "",
            "| | " + " | ".join(f"batch {b}" for b in BATCHES) + " |",
            "| --- | " + " | ".join(["---"] * len(BATCHES)) + " |",
        ]
        for family in families():
            cells = []
            for batch in BATCHES:
                means = {r: statistics.fmean(v) for r, v in losses[task, batch, family].items()}
                if len(means) < len(STARTS) or "tuned" in family:
                    best = min(means, key=means.__getitem__)
                    cells.append(f"{number(means[best])} ({best:g})")
                else:
                    cells.append(" / ".join(number(means[r]) for r in sorted(means)))
            lines.append(f"| {family} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join([*lines, made_with(), ""])


def geometric(values: Iterable[float]) -> str:
    """Geometric mean to two decimals."""
    found = list(values)
    return (
        f"{math.exp(statistics.fmean(map(math.log, found))):.2f}"
        if all(map(math.isfinite, found))
        else "diverged"
    )


def number(value: float) -> str:
    """A loss as it is written in the tables."""
    return f"{value:.3g}" if math.isfinite(value) else "diverged"


def main() -> None:
    """Run what is missing and write the page."""
    made = parser(__doc__)
    run_options(made, "lossgrad_defaults", seeds=2)
    options = made.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with Store(str(options.out / "runs.sqlite")) as store:
        losses = run(store, Path(options.data) if options.data else None, options.seeds, options.workers)
    options.page.parent.mkdir(parents=True, exist_ok=True)
    options.page.write_text(page(losses, options.seeds), encoding="utf8")
    print(f"written: {options.page}")


if __name__ == "__main__":
    main()
