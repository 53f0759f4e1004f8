"""One self-contained HTML page: it opens from a disk, offline, and asks the network for nothing."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
from markupsafe import Markup, escape
from plotly.offline import get_plotlyjs

from surefoot._version import __version__
from surefoot.lab.errors import UserError
from surefoot.lab.plan import written
from surefoot.lab.report import words
from surefoot.lab.report.figures import Figure, figures, style
from surefoot.lab.runs import RunResult, Scalar, Study, Value
from surefoot.lab.spaces import in_words
from surefoot.lab.stats import Analysis, Estimate, Pair, Summary, analyse

if TYPE_CHECKING:
    from surefoot.lab.report.views import Searched
    from surefoot.lab.search import Outcome

_TRIAL_LOSS = "final validation loss"
FEW_VALUES = 4
"""So many different values of one fact of the environment are listed; of more, the first and the last are named."""


@dataclass(frozen=True)
class Cell:
    """One cell of a sortable table: what is read, and by what it is sorted (a number, or text)."""

    text: str
    detail: str = ""
    key: float | str = ""
    position: int | None = None
    """Position of the method whose look is shown beside the text."""

    @property
    def sort_key(self) -> str:
        """``key`` as the page's script reads it; empty, and so always last, if there is no number."""
        if isinstance(self.key, str):
            return self.key
        if math.isinf(self.key):
            return "Infinity" if self.key > 0 else "-Infinity"
        return "" if math.isnan(self.key) else repr(self.key)


def write_report(study: Study, path: str | Path, searched: Searched | None = None) -> Path:
    """Writes the page of ``study`` to ``path``, whole or not at all, making its folder if need be; returns the path.

    With the search that its methods are the best of, where they are.

    Raises:
        UserError: the page cannot be written there.
    """
    path = Path(path)
    page = render(study, searched)
    # A command line may hold bytes that are no text; they must not cost the report.
    content = page.encode("utf-8", errors="backslashreplace")
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The report cannot be written to {str(path)!r}: {error.strerror or error}."
        ) from error
    return path


def render(study: Study, searched: Searched | None = None) -> str:
    """The page of ``study``, and of the search that its methods are the best of."""
    analysis = analyse(study)
    plots = figures(study, analysis)
    search_plots = _views(searched)
    positions = {method.label: position for position, method in enumerate(study.methods)}
    runs = [run for results in study.results.values() for run in results]
    if searched is not None:
        runs = [run for outcome in searched.outcomes for run in outcome.runs]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("surefoot.lab.report", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["breakable"] = _breakable
    return environment.get_template("page.html.j2").render(
        study=study,
        version=__version__,
        headline=words.headline(analysis),
        notes=words.notes(study, analysis),
        methods=[(position, method, style(position)) for position, method in enumerate(study.methods)],
        best="The best trials" if searched else "Optimizers at their best initial rate",
        summary_columns=_summary_columns(study, analysis),
        summary_rows=[
            _summary_row(study, analysis, summary, positions[summary.label]) for summary in analysis.summaries
        ],
        p_values=analysis.tested,
        pair_rows=[_pair_row(pair, positions) for pair in analysis.pairs],
        pair_columns=_pair_columns(),
        figures=plots,
        search_figures=search_plots,
        trial_columns=_trial_columns(searched) if searched else [],
        trial_rows=[_trial_row(searched, outcome) for outcome in searched.outcomes] if searched else [],
        plots={plot.id: _json_values(plot.plot) for plot in [*plots, *search_plots] if plot.plot},
        facts=[*_facts(study, runs), *(_search_facts(searched) if searched else [])],
        environment=_environment_facts(runs),
        settings=_settings,
        rate=words.rate,
        plotly=get_plotlyjs(),
    )


def _summary_columns(study: Study, analysis: Analysis) -> list[tuple[str, str]]:
    """Title and explanation."""
    columns = [
        ("optimizer", "with the settings that were given"),
        ("best initial rate", "lowest mean final validation loss over the seeds"),
        ("min training loss", "smallest block of the training loss; mean ± s.d. over the seeds"),
        ("at epoch", "when that block ended, mean over the seeds"),
        ("final validation loss", "mean and 95 % interval over the seeds"),
    ]
    if study.task.metric_name:
        columns.append((f"final {study.task.metric_name}", "mean and 95 % interval over the seeds"))
    columns.append(("ms a step", "median over all runs; of a stack, its share"))
    if _has_decades(analysis):
        columns.append(
            (
                "decades within 10 %",
                "decades of initial rate that end within 10 % of the method's own best loss",
            )
        )
    return [*columns, ("diverged runs", "of all runs, at all rates")]


def _has_decades(analysis: Analysis) -> bool:
    return any(not math.isnan(summary.decades) for summary in analysis.summaries)


def _summary_row(study: Study, analysis: Analysis, summary: Summary, position: int) -> list[Cell]:
    cells = [
        Cell(summary.label, words.count(summary.final_loss.n, "seed"), summary.label, position),
        Cell(
            words.rate(summary.best_rate),
            "edge of grid" if summary.best_is_at_the_edge else "",
            summary.best_rate,
        ),
        _estimate_cell(summary.min_train_loss, words.with_sd(summary.min_train_loss)),
        Cell(words.number(summary.min_train_epoch, 3), key=summary.min_train_epoch),
        _estimate_cell(summary.final_loss, words.with_interval(summary.final_loss)),
    ]
    if study.task.metric_name:
        cells.append(_estimate_cell(summary.final_metric, words.with_interval(summary.final_metric)))
    cells.append(Cell(words.milliseconds(summary.step_seconds), key=summary.step_seconds))
    if _has_decades(analysis):
        cells.append(Cell(words.decades(summary.decades), key=summary.decades))
    return [*cells, Cell(str(summary.diverged), f"of {summary.runs}", summary.diverged)]


def _views(searched: Searched | None) -> list[Figure]:
    if searched is None:
        return []
    from surefoot.lab.report.views import views  # with Optuna

    return views(searched)


def _trial_columns(searched: Searched) -> list[tuple[str, str]]:
    return [
        ("trial", "in the order in which they were begun"),
        *((name, "searched setting") for name in searched.space),
        (_TRIAL_LOSS, "mean ± s.d. over the seeds that it has; a trial of which a run diverged has none"),
        ("seeds", "that it has"),
        ("end", "how it ended"),
    ]


def _trial_row(searched: Searched, outcome: Outcome) -> list[Cell]:
    setting, loss = outcome.trial.setting, outcome.loss
    ends = {
        "open": "under way",
        "complete": f"diverged in {words.count(outcome.diverged, 'run')}" if outcome.diverged else "complete",
        "pruned": "diverged" if outcome.diverged else "pruned",
    }
    return [
        Cell(str(outcome.trial.number), key=outcome.trial.number),
        *(Cell(written(setting[name]), key=_sort_key(setting[name])) for name in searched.space),
        Cell(*words.with_sd(loss), key=loss.mean),
        Cell(str(len(outcome.runs)), key=len(outcome.runs)),
        Cell(ends[outcome.state], key=ends[outcome.state]),
    ]


def _sort_key(value: Value) -> float | str:
    return value if isinstance(value, int | float) and not isinstance(value, bool) else written(value)


def _search_facts(searched: Searched) -> list[tuple[str, str]]:
    states = [outcome.state for outcome in searched.outcomes]
    pruned = f", of which {states.count('pruned')} pruned" if "pruned" in states else ""
    space = [(f"range of {name}", in_words(dimension)) for name, dimension in searched.space.items()]
    return [("trials", f"{len(states)}{pruned}"), *space]


def _estimate_cell(estimate: Estimate, text: tuple[str, str]) -> Cell:
    return Cell(*text, key=estimate.mean)


def _pair_columns() -> list[tuple[str, str]]:
    return [
        ("first", "the one with the lower mean final validation loss"),
        ("second", "the other"),
        ("lead of the first", "by how much its loss is lower, paired by seed; mean and 95 % interval"),
        ("p", "chance of such a difference if there is none: paired t test, Holm's correction"),
        ("verdict", "at 5 %"),
        (
            "seeds that would tell",
            "for a power of 80 %, if the observed difference and spread are the true ones",
        ),
    ]


def _pair_row(pair: Pair, positions: dict[str, int]) -> list[Cell]:
    lead = words.lead(pair)
    size, detail = words.with_interval(lead)
    if any(pair.diverged):
        size, detail = words.NOTHING, f"{pair.diverged[0]} and {pair.diverged[1]} of {lead.n} runs diverged"
    return [
        Cell(pair.first, key=pair.first, position=positions[pair.first]),
        Cell(pair.second, key=pair.second, position=positions[pair.second]),
        Cell(size, detail, math.nan if any(pair.diverged) else lead.mean),
        Cell(words.p_number(pair.p_holm), key=pair.p_holm),
        Cell(words.verdict(pair), key=words.verdict(pair)),
        Cell(words.seeds(pair.seeds_to_tell), key=pair.seeds_to_tell),
    ]


def _facts(study: Study, runs: list[RunResult]) -> list[tuple[str, str]]:
    task = study.task
    facts = [
        ("task", task.name),
        ("training patterns", str(task.train_patterns)),
        ("validation patterns", str(task.validation_patterns)),
        ("parameters of the model", str(task.parameters)),
        ("metric", task.metric_name or "none"),
        ("version of task and data", task.version),
        ("epochs", str(study.epochs)),
        ("seeds", ", ".join(map(str, study.seeds))),
        ("runs", f"{len(runs)}, of which {sum(run.status == 'diverged' for run in runs)} diverged"),
    ]
    if runs:
        seconds = [run.seconds for run in runs]
        total, median = words.duration(sum(seconds)), words.duration(statistics.median(seconds))
        facts.append(("time", f"{total} of running in all; {median} a run (median)"))
    return facts


def _environment_facts(runs: Iterable[RunResult]) -> list[tuple[str, str]]:
    """What the runs say of where they were made: each name with its value, or its values."""
    values: dict[str, set[Scalar]] = {}
    for run in runs:
        for name, value in run.environment.items():
            values.setdefault(name, set()).add(value)
    facts = []
    for name, found in values.items():
        texts = [str(value) for value in sorted(found, key=lambda value: (str(type(value)), value))]
        if name == "started" and len(texts) > 1:  # that they differ goes without saying
            text = f"{texts[0]} to {texts[-1]}"
        elif len(texts) > FEW_VALUES:
            text = f"{texts[0]} to {texts[-1]} ({len(texts)} different)"
        else:
            text = ", ".join(texts)
        facts.append((name.replace("_", " "), text))
    return facts


def _settings(settings: Mapping[str, Value]) -> list[tuple[str, str]]:
    return [(name, _value_text(value)) for name, value in settings.items()]


def _value_text(value: Value) -> str:
    return ":".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _breakable(label: str) -> Markup:
    """A label, or a sentence with labels in it, with the places where a line may end inside of a label."""
    return Markup(re.sub(r"([\[,|])(?!\s|$)", r"\1<wbr>", str(escape(label))))


def _json_values(plot: dict) -> dict:
    """``plot`` without what JSON has no word for."""
    return json.loads(json.dumps(plot), parse_constant=lambda _: None)
