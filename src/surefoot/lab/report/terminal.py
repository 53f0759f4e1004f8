"""The summary that a comparison prints: a table of 80 columns and what it says of each pair."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surefoot.lab.report import words
from surefoot.lab.runs import Study
from surefoot.lab.stats import Analysis, Summary, analyse

MOST_PAIRS = 15
"""Of more pairs than these only those with the best method are printed; the page has them all."""
WIDE = 96
"""From so many columns on, the table's are further apart."""
NAME_WIDTH = 12
"""The names of the optimizers have at least this room, folded if they are longer."""
METRIC_WIDTH = 10


def print_summary(study: Study, console: Console | None = None) -> None:
    """Prints the headline, a line for each method (best first), the verdict on each pair, and what to beware of."""
    console = console or Console()
    analysis = analyse(study)
    _say(console, words.headline(analysis), "bold")
    console.print()
    _print_table(study, analysis, console)
    console.print()
    shown = analysis.pairs
    if len(shown) > MOST_PAIRS or study.chosen_from is not None:
        shown = [pair for pair in shown if pair.first == analysis.summaries[0].label]
    for pair in shown:
        _item(console, words.sentence(pair), "" if pair.verdict in ("first", "second") else "dim")
    if len(shown) < len(analysis.pairs):
        _item(console, f"{len(analysis.pairs) - len(shown)} more pairs are in the report.", "dim")
    if analysis.tested > 1:
        _say(console, "(p with Holm's correction over all pairs, intervals without.)", "dim")
    for note in words.notes(study, analysis):
        _say(console, f"Note: {note}", "yellow")


@dataclass(frozen=True)
class _Column:
    """A column of the table beside the optimizers' names."""

    importance: int
    """Where the columns are too wide together, the least important one goes first."""
    heading: str
    cell: Callable[[Summary], str]
    right: bool = False

    def width(self, summaries: Sequence[Summary]) -> int:
        return max(map(len, "\n".join([self.heading, *map(self.cell, summaries)]).splitlines()))


def _columns(study: Study, summaries: Sequence[Summary]) -> list[_Column]:
    """All that have something to show; each with its mean above its spread, so that they fit 80 columns."""
    metric = study.task.metric_name
    columns = [
        _Column(7, "best\ninitial\nrate", lambda s: words.rate(s.best_rate)),
        _Column(4, "min train\nloss\n± s.d.", lambda s: "\n".join(words.with_sd(s.min_train_loss))),
        _Column(3, "at\nepoch", lambda s: words.number(s.min_train_epoch, 3)),
        _Column(8, "final val.\nloss\n± 95 %", lambda s: "\n".join(words.with_half_interval(s.final_loss))),
    ]
    if metric:
        heading = "\n".join(["final", *_folded(metric, METRIC_WIDTH), "± 95 %"])
        columns.append(_Column(2, heading, lambda s: "\n".join(words.with_half_interval(s.final_metric))))
    columns.append(_Column(1, "ms a\nstep", lambda s: words.milliseconds(s.step_seconds), right=True))
    if any(not math.isnan(summary.decades) for summary in summaries):
        columns.append(_Column(6, "decades\nwithin\n10 %", lambda s: words.decades(s.decades), right=True))
    if any(summary.diverged for summary in summaries):
        columns.append(_Column(5, "runs\ndiver-\nged", lambda s: f"{s.diverged}/{s.runs}", right=True))
    return columns


def _print_table(study: Study, analysis: Analysis, console: Console) -> None:
    """Names first, which every width has room for, then as many columns as fit beside them."""
    summaries = analysis.summaries
    gap = 2 if console.width >= WIDE else 1
    columns = _columns(study, summaries)
    count = len(columns)
    longest = max((len(summary.label) for summary in summaries), default=0)
    least = max(len("optimizer"), min(longest, NAME_WIDTH))

    def room() -> int:
        return console.width - sum(gap + column.width(summaries) for column in columns)

    while columns and room() < least:
        columns.remove(min(columns, key=lambda column: column.importance))
    name_width = max(least, min(longest, room()))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap - 1, 0, 0))
    table.add_column("optimizer", overflow="fold", width=name_width)
    for column in columns:
        table.add_column(
            column.heading,
            no_wrap=True,
            justify="right" if column.right else "left",
            width=column.width(summaries),
        )
    for summary in summaries:
        cells = ["\n".join(_folded(summary.label, name_width)), *(column.cell(summary) for column in columns)]
        table.add_row(*map(Text, cells))  # Text: the brackets of a label are not rich's markup
    console.print(table)
    if len(columns) < count:
        _say(console, "(The report has the columns that there is no room for here.)", "dim")


def _folded(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width``: broken at spaces, and in a word longer than a line after ``[`` and ``,``.

    What cannot be broken there either stays too long, for the console to fold.
    """
    lines = [""]
    for word in text.split(" "):
        gap = " " if lines[-1] else ""
        for piece in [word] if len(word) <= width else re.split(r"(?<=[\[,])", word):
            if len(lines[-1]) + len(gap) + len(piece) <= width or not lines[-1]:
                lines[-1] += gap + piece
            else:
                lines.append(piece)
            gap = ""
    return lines


def _say(console: Console, text: str, style: str) -> None:
    console.print(Text("\n".join(_folded(text, console.width)), style=style, overflow="fold"))


def _item(console: Console, text: str, style: str) -> None:
    """A paragraph with a hanging indent."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(
        Text("-", style=style),
        Text("\n".join(_folded(text, console.width - 3)), style=style, overflow="fold"),
    )
    console.print(grid)
