"""The report's plots, as Plotly figures in plain JSON values; the page draws, colours and themes them."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from surefoot.lab.report import words
from surefoot.lab.runs import Study
from surefoot.lab.stats import Analysis, Curve, CurveName, Summary, mean_curve

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe and Ito's colours for every eye, without the yellow and the black, which vanish on white and on black."""
DASHES = {"solid": "", "dash": "6 3", "dot": "2 2", "dashdot": "7 2 2 2", "longdash": "11 3"}
"""Plotly's dashes and the same for SVG."""
SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "triangle-down",
    "pentagon",
    "hexagon",
    "cross",
    "hourglass",
)

FEW_POINTS = 12
"""Curves of up to so many points show each of them."""
LOG_FROM = 10
"""Losses that span more than this factor are drawn on a logarithmic axis."""
LOSS_SPAN = 1e4
"""A loss axis shows no more than this factor above the lowest mean; what has exploded runs off its top."""


LOSS_TICKS = "~g"
RATE_TICKS = "~e"
"""How d3 writes the numbers on an axis: 0.05, and 5e-2."""
MOST_TICKS = 10


@dataclass(frozen=True)
class Style:
    """How one method is drawn, in every plot and in the key."""

    colour: str
    dash: str
    symbol: str

    @property
    def svg_dash(self) -> str:
        """``stroke-dasharray``."""
        return DASHES[self.dash]

    @property
    def band(self) -> str:
        """The colour of its spread."""
        red, green, blue = (int(self.colour[i : i + 2], 16) for i in (1, 3, 5))
        return f"rgba({red},{green},{blue},0.14)"


@dataclass(frozen=True)
class Figure:
    """One plot of the page."""

    id: str
    title: str
    caption: str
    plot: dict[str, Any] | None
    """``data`` and ``layout`` for ``Plotly.newPlot``; ``None`` if there is no curve, as the caption says. A trace's ``meta`` is the position of its method in the study."""


def style(position: int) -> Style:
    """The look of the study's method at ``position``; 35 differ in colour or dash."""
    dashes, symbols = tuple(DASHES), SYMBOLS
    return Style(
        colour=COLOURS[position % len(COLOURS)],
        dash=dashes[position // len(COLOURS) % len(dashes)],
        symbol=symbols[position % len(symbols)],
    )


def figures(study: Study, analysis: Analysis) -> list[Figure]:
    """The plots that this study has something to show in."""
    spread = "Line: mean over the seeds at the best initial rate; band: ± one standard deviation."
    cut = "A cross marks where the first of a method's runs diverged." if _any_cut(analysis) else ""
    found = [
        _figure(
            "train-loss",
            "Training loss",
            f"{spread} Mean over each block of patterns, before each update. {cut}".strip(),
            _curves(study, analysis, "train_loss", "training loss"),
        ),
        _figure(
            "validation-loss",
            "Validation loss",
            f"{spread} {cut}".strip(),
            _curves(study, analysis, "validation_loss", "validation loss"),
        ),
    ]
    if study.task.metric_name:
        title = f"Validation {study.task.metric_name}"
        plot = _curves(study, analysis, "validation_metric", title.lower(), may_be_log=False)
        found.append(_figure("metric", title, f"{spread} Higher is better.", plot))
    if any(len(summary.rates) > 1 for summary in analysis.summaries):
        caption = (
            "Final validation loss at each initial rate, mean ± one standard deviation over the seeds; the star is the "
            "method's best. A rate of which any run diverged has no mean: it is a cross in the strip above."
        )
        title = "Sensitivity to the initial rate"
        if any(math.isfinite(point.loss.mean) for summary in analysis.summaries for point in summary.rates):
            found.append(Figure("sensitivity", title, caption, _sensitivity(study, analysis)))
        else:
            found.append(
                Figure("sensitivity", title, "Not drawn: at every rate of every method a run diverged.", None)
            )
    caption = (
        "Mean of the effective rate over all weights, at the best initial rate, averaged over the seeds; band: ± one "
        "standard deviation over the weights. Where it reaches zero it runs off the bottom."
    )
    found.append(_figure("rates", "Evolution of the rate", caption, _rates(study, analysis)))
    return found


def _figure(id: str, title: str, caption: str, plot: dict[str, Any]) -> Figure:
    """A plot of curves over the epochs, or a sentence where there is no curve."""
    if plot["data"]:
        return Figure(id, title, caption, plot)
    return Figure(
        id, title, "Not drawn: no method has a point that all its runs at its best rate reached.", None
    )


def _curves(
    study: Study, analysis: Analysis, name: CurveName, y_title: str, *, may_be_log: bool = True
) -> dict[str, Any]:
    curves = {summary.label: mean_curve(summary.best_runs, name) for summary in analysis.summaries}
    means = [value for curve in curves.values() for value in curve.mean]
    log = may_be_log and _wants_log(means)
    return _lines(study, analysis, curves, y_title, log=log, span=LOSS_SPAN)


def _rates(study: Study, analysis: Analysis) -> dict[str, Any]:
    curves = {}
    for summary in analysis.summaries:
        mean, over_weights = (mean_curve(summary.best_runs, name) for name in ("rate_mean", "rate_std"))
        curves[summary.label] = Curve(mean.n, mean.patterns, mean.mean, over_weights.mean)
    # A rate may be zero (lr = 0, frozen weights), of which there is no logarithm.
    means = [value for curve in curves.values() for value in curve.mean]
    log = bool(means) and min(means) > 0
    return _lines(study, analysis, curves, "effective rate", log=log, tick_format=RATE_TICKS)


def _lines(
    study: Study,
    analysis: Analysis,
    curves: dict[str, Curve],
    y_title: str,
    *,
    log: bool,
    **axis_options: Any,
) -> dict[str, Any]:
    """Each method's mean as a line, on its band, over the epochs."""
    highs = [m + s for curve in curves.values() for m, s in zip(curve.mean, _or_zero(curve.sd), strict=True)]
    axis = _y_axis(
        y_title, [m for curve in curves.values() for m in curve.mean], highs, log=log, **axis_options
    )
    floor = 10 ** (axis["range"][0] - 1) if "range" in axis else -math.inf
    bands, lines = [], []
    for position, summary in _by_position(study, analysis):
        curve, look = curves[summary.label], style(position)
        if not curve.mean:
            continue
        epochs = [patterns / study.task.train_patterns for patterns in curve.patterns]
        if any(curve.sd) and not math.isnan(curve.sd[0]):
            high = [m + s for m, s in zip(curve.mean, curve.sd, strict=True)]
            # On a logarithmic axis a band that reaches zero runs off the bottom.
            low = [max(m - s, floor) for m, s in zip(curve.mean, curve.sd, strict=True)]
            bands.append(_band(position, summary, epochs, low, high))
        cut = summary.best_runs and any(run.status == "diverged" for run in summary.best_runs)
        each = len(epochs) <= FEW_POINTS
        lines.append(
            go.Scatter(
                x=epochs,
                y=list(curve.mean),
                customdata=[_spread_text(s) for s in curve.sd],
                name=_plain(summary.label),
                meta=position,
                mode="lines+markers" if each or cut else "lines",
                line={"color": look.colour, "dash": look.dash, "width": 2},
                marker={
                    "color": look.colour,
                    "line": {"width": 0},
                    "symbol": [look.symbol] * (len(epochs) - 1) + ["x" if cut else look.symbol],
                    "size": [6 if each else 0] * (len(epochs) - 1) + [10 if cut else 6 if each else 0],
                },
                hovertemplate="<b>%{fullData.name}</b><br>epoch %{x:.3g}: %{y:.4g}%{customdata}<extra></extra>",
            )
        )
    x_axis = {"title": {"text": "epochs"}, "range": [0, study.epochs * 1.02]}
    return _plot([*bands, *lines], xaxis=x_axis, yaxis=axis)


def _sensitivity(study: Study, analysis: Analysis) -> dict[str, Any]:
    """Final validation loss over the initial rate; above it, a row of crosses for each method that diverged."""
    points = [(point.loss.mean, point.loss.sd) for summary in analysis.summaries for point in summary.rates]
    finite = [(mean, 0.0 if math.isnan(sd) else sd) for mean, sd in points if math.isfinite(mean)]
    means = [mean for mean, _ in finite]
    axis = _y_axis("final validation loss", means, map(sum, finite), log=_wants_log(means), span=LOSS_SPAN)
    lines, crosses = [], []
    for position, summary in _by_position(study, analysis):
        look = style(position)
        lost = [point for point in summary.rates if point.diverged]
        finite_rates = [p for p in summary.rates if not p.diverged]
        best = [point.rate == summary.best_rate for point in summary.rates]
        if finite_rates:
            lines.append(
                go.Scatter(
                    x=[point.rate for point in summary.rates],
                    y=[None if point.diverged else point.loss.mean for point in summary.rates],
                    error_y={
                        "type": "data",
                        "array": [_none_if_nan(point.loss.sd) for point in summary.rates],
                        "thickness": 1.2,
                        "width": 3,
                    },
                    customdata=[_spread_text(point.loss.sd) for point in summary.rates],
                    name=_plain(summary.label),
                    meta=position,
                    mode="lines+markers",
                    line={"color": look.colour, "dash": look.dash, "width": 2},
                    marker={
                        "color": look.colour,
                        "line": {"width": 0},
                        "symbol": ["star" if b else look.symbol for b in best],
                        "size": [14 if b else 7 for b in best],
                    },
                    hovertemplate="<b>%{fullData.name}</b><br>rate %{x}: %{y:.4g}%{customdata}<extra></extra>",
                )
            )
        if lost:
            crosses.append(
                go.Scatter(
                    x=[point.rate for point in lost],
                    y=[-len(crosses)] * len(lost),
                    yaxis="y2",
                    customdata=[f"{point.diverged} of {point.loss.n} runs diverged" for point in lost],
                    name=_plain(summary.label),
                    meta=position,
                    mode="markers",
                    marker={"color": look.colour, "symbol": "x", "size": 8, "line": {"width": 0}},
                    hovertemplate="<b>%{fullData.name}</b><br>rate %{x}: %{customdata}<extra></extra>",
                )
            )
    tried = sorted({point.rate for summary in analysis.summaries for point in summary.rates})
    x_axis: dict[str, Any] = {
        "title": {"text": "initial rate"},
        "type": "log",
        "dtick": 1,
        "tickformat": RATE_TICKS,
    }
    if len(tried) <= MOST_TICKS:
        x_axis |= {"tickvals": tried, "ticktext": [words.rate(rate) for rate in tried]}
    layout: dict[str, Any] = {"yaxis": axis, "xaxis": x_axis}
    if crosses:
        strip = min(0.06 + 0.035 * len(crosses), 0.4)
        axis["domain"] = [0, 1 - strip - 0.03]
        layout["yaxis2"] = {
            "domain": [1 - strip, 1],
            "range": [0.3 - len(crosses), 0.7],
            "title": {"text": "diverged", "font": {"size": 11}},
            "showticklabels": False,
            "ticks": "",
            "showgrid": False,
            "zeroline": False,
            "fixedrange": True,
        }
    return _plot([*lines, *crosses], **layout)


def _plot(traces: Sequence[go.Scatter], **axes: dict[str, Any]) -> dict[str, Any]:
    layout = go.Layout(
        template=go.layout.Template(),  # none: the page themes the plot
        showlegend=False,  # one key on the page serves all plots
        hovermode="closest",
        dragmode="zoom",
        margin={"l": 64, "r": 12, "t": 28, "b": 44},
        **{name: {"zeroline": False, **axis} for name, axis in axes.items()},
    )
    return go.Figure(traces, layout).to_plotly_json()


def _band(
    position: int, summary: Summary, x: list[float], low: Iterable[float], high: Iterable[float]
) -> go.Scatter:
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(list(low))],
        name=_plain(summary.label),
        meta=position,
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=style(position).band,
        hoverinfo="skip",
    )


def _y_axis(
    title: str,
    means: Sequence[float],
    highs: Iterable[float],
    *,
    log: bool,
    span: float = math.inf,
    tick_format: str = LOSS_TICKS,
) -> dict[str, Any]:
    """A linear axis, or a logarithmic one from a little below the lowest mean to the highest end of a band."""
    axis: dict[str, Any] = {"title": {"text": title}}
    if not log:
        return axis
    bottom = min(means)
    top = min(max(highs), bottom * span)
    margin = 0.06 * math.log10(top / bottom) + 0.08
    low, high = math.log10(bottom) - margin, math.log10(top) + margin
    dtick = "D2" if high - low < 3 else math.ceil((high - low) / MOST_TICKS)  # D2: 1, 2, 5, 10, ...
    return axis | {"type": "log", "range": [low, high], "dtick": dtick, "tickformat": tick_format}


def _wants_log(values: Sequence[float]) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > LOG_FROM


def _by_position(study: Study, analysis: Analysis) -> Iterable[tuple[int, Summary]]:
    """Summaries in the study's order, so that a method keeps its colour whatever its rank."""
    summaries = {summary.label: summary for summary in analysis.summaries}
    return ((position, summaries[method.label]) for position, method in enumerate(study.methods))


def _any_cut(analysis: Analysis) -> bool:
    """Whether a curve ends in a cross: some run diverged, but none of its method's before its first point."""
    return any(
        all(run.patterns for run in summary.best_runs)
        and any(run.status == "diverged" for run in summary.best_runs)
        for summary in analysis.summaries
    )


def _plain(label: str) -> str:
    """Plotly takes some HTML tags in a text for markup."""
    return html.escape(label, quote=False)


def _spread_text(sd: float) -> str:
    return "" if math.isnan(sd) else f" ± {sd:.2g}"


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def _or_zero(values: Iterable[float]) -> list[float]:
    return [0.0 if math.isnan(value) else value for value in values]
