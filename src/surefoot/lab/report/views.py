"""A search's plots: Optuna's views of how the settings and the loss hang together, as figures of the page."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plotly.colors import sample_colorscale

from surefoot.lab.report.figures import COLOURS, LOG_FROM, RATE_TICKS, Figure
from surefoot.lab.search import Outcome, optuna_trial, quietly, told
from surefoot.lab.spaces import Choices, Range, Space

if TYPE_CHECKING:
    import optuna

_LOSS = "final validation loss"
FEWEST = 3
"""Of fewer trials there is nothing to see."""


@dataclass(frozen=True)
class Searched:
    """A search with its trials."""

    space: Space
    outcomes: Sequence[Outcome]

    @property
    def ended(self) -> list[Outcome]:
        """The trials that came to their end, by number."""
        return [outcome for outcome in self.outcomes if outcome.state != "open"]

    @property
    def varied(self) -> list[str]:
        """The names of what has more than one value."""
        return [
            name
            for name, dimension in self.space.items()
            if isinstance(dimension, Range) or len(dimension.values) > 1
        ]


def views(searched: Searched) -> list[Figure]:
    """The plots of a search: its history, and, where something was varied, how the loss hangs together with it."""
    from optuna import visualization

    ended = searched.ended
    if len(ended) < FEWEST or all(math.isinf(outcome.loss.mean) for outcome in ended):
        return []
    means = [outcome.loss.mean for outcome in ended]
    values = told(means)
    raised = sum(value != mean for value, mean in zip(values, means, strict=True))
    ceiling = (
        f" {raised} of {len(ended)} trials, diverged or far off, are drawn at {max(values):.3g}."
        if raised
        else ""
    )
    with quietly():
        study = _study(searched, ended, values)
        found = [
            _figure(
                "history",
                "The search, trial by trial",
                "Mean over the seeds, in the order of the trials; the line is the best so far." + ceiling,
                visualization.plot_optimization_history(study, target_name=_LOSS),
                log=min(values) > 0 and max(values) / min(values) > LOG_FROM,
            )
        ]
        varied = searched.varied
        if len(varied) > 1:
            importances = _importances(study, varied)
            found.append(
                _figure(
                    "importances",
                    "What matters",
                    "Share of each setting in what separates the good trials from all of them (PED-ANOVA).",
                    visualization.plot_param_importances(study, params=varied, target_name=_LOSS),
                )
            )
            found.append(
                _figure(
                    "parallel",
                    "All settings at once",
                    "A line is a trial, the better ones in orange." + ceiling,
                    _recoloured(
                        visualization.plot_parallel_coordinate(study, params=varied, target_name=_LOSS)
                    ),
                )
            )
            found.append(
                _figure(
                    "contour",
                    f"The two that matter most: {importances[0]} and {importances[1]}",
                    "Loss between the trials, which are the points, whatever their other settings." + ceiling,
                    visualization.plot_contour(study, params=importances[:2], target_name=_LOSS),
                )
            )
        elif varied:
            found.append(
                _figure(
                    "slice",
                    f"Loss over {varied[0]}",
                    "A point is a trial; the darker, the later." + ceiling,
                    visualization.plot_slice(study, params=varied, target_name=_LOSS),
                )
            )
    return found


def _study(searched: Searched, ended: Sequence[Outcome], values: Sequence[float]) -> optuna.Study:
    import optuna

    study = optuna.create_study(direction="minimize")
    space = {name: _drawn(dimension) for name, dimension in searched.space.items()}
    study.add_trials(
        [
            optuna_trial(space, outcome.trial.setting, value)
            for outcome, value in zip(ended, values, strict=True)
        ]
    )
    return study


def _drawn(dimension: Range | Choices) -> Range | Choices:
    """Numbers to choose from that span decades as a logarithmic range, so that they are drawn as one."""
    if not isinstance(dimension, Choices):
        return dimension
    numbers = [
        value for value in dimension.values if isinstance(value, int | float) and not isinstance(value, bool)
    ]
    if len(numbers) < len(dimension.values) or min(numbers) <= 0 or max(numbers) / min(numbers) <= LOG_FROM:
        return dimension
    whole = all(isinstance(number, int) for number in numbers)
    return Range(min(numbers), max(numbers), log=True, whole=whole)


def _importances(study: optuna.Study, names: list[str]) -> list[str]:
    """The names, the one that matters most first."""
    from optuna.importance import get_param_importances

    return list(get_param_importances(study, params=names))


def _figure(id: str, title: str, caption: str, plot: Any, *, log: bool = False) -> Figure:
    """Optuna's plot in the page's manner: its title is elsewhere, and it is to be seen on white and on black."""
    plot.update_layout(template=None, title=None, margin={"l": 64, "r": 12, "t": 40, "b": 44})
    plot.update_layout(legend={"orientation": "h", "y": 1, "yanchor": "bottom"})
    plot.update_xaxes(zeroline=False)
    plot.update_yaxes(zeroline=False, tickformat=RATE_TICKS if id == "contour" else None)
    plot.for_each_trace(lambda trace: trace.update(name="best so far"), {"name": "Best Value"})
    if log:
        plot.update_yaxes(type="log")
    if id == "importances":
        plot.update_yaxes(title=None)
    return Figure(id, title, caption, json.loads(plot.to_json()))


def _recoloured(plot: Any) -> Any:
    """The lines of trials from orange (the best, above the others) to grey: Optuna's blues vanish on black or on white."""
    scale = [[0.0, COLOURS[1]], [1.0, COLOURS[-1]]]
    for trace in plot.data:
        if trace.mode == "lines":
            trace.line.color = sample_colorscale(scale, [trace.y[0]])[0]  # its height on the axis of the loss
        else:
            trace.marker.update(colorscale=scale, reversescale=False)
    plot.data = sorted(plot.data, key=lambda trace: trace.mode != "lines" or -trace.y[0])
    plot.update_annotations(font={"color": COLOURS[-1]})
    return plot
