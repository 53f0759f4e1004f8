"""The summary that a comparison prints: a table of 80 columns and what it says of each pair."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from surefoot.lab.report import words
from surefoot.lab.runs import Study
from surefoot.lab.stats import Summary, analyse

MOST_PAIRS = 15
"""Of more pairs than these only those with the best method are printed; the page has them all."""
WIDE = 96
"""From so many columns on, the table's are further apart."""


def print_summary(study: Study, console: Console | None = None) -> None:
    """Prints the headline, a line for each method (best first), the verdict on each pair, and what to beware of."""
    console = console or Console()
    analysis = analyse(study)
    console.print(Text(words.headline(analysis), style="bold"))
    console.print()
    console.print(_table(study, analysis.summaries, gap=1 if console.width >= WIDE else 0))
    console.print()
    shown = analysis.pairs
    if len(shown) > MOST_PAIRS:
        shown = [pair for pair in shown if pair.first == analysis.summaries[0].label]
    for pair in shown:
        _item(console, words.sentence(pair), "" if pair.verdict in ("first", "second") else "dim")
    if len(shown) < len(analysis.pairs):
        _item(console, f"{len(analysis.pairs) - len(shown)} more pairs are in the report.", "dim")
    if len(shown) > 1:
        console.print(Text("(p with Holm's correction over all pairs, intervals without.)", style="dim"))
    for note in words.notes(study, analysis):
        console.print(Text(f"Note: {note}", style="yellow"))


def _table(study: Study, summaries: tuple[Summary, ...], gap: int) -> Table:
    """Two lines a method, the mean above its spread, so that it fits 80 columns."""
    metric = study.task.metric_name
    any_diverged = any(summary.diverged for summary in summaries)
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0))
    table.add_column("optimizer", overflow="fold", min_width=12)
    table.add_column("best\ninitial\nrate", no_wrap=True)
    table.add_column("min train\nloss\n± s.d.", no_wrap=True)
    table.add_column("at\nepoch", no_wrap=True)
    table.add_column("final val.\nloss\n± 95 %", no_wrap=True)
    if metric:
        table.add_column(Text(f"final\n{metric}\n± 95 %"), overflow="fold")
    table.add_column("ms a\nstep", no_wrap=True, justify="right")
    table.add_column("decades\nwithin\n10 %", no_wrap=True, justify="right")
    if any_diverged:
        table.add_column("runs\ndiver-\nged", no_wrap=True, justify="right")
    for summary in summaries:
        cells = [
            summary.label,
            words.rate(summary.best_rate),
            "\n".join(words.with_sd(summary.min_train_loss)),
            words.number(summary.min_train_epoch, 3),
            "\n".join(words.with_half_interval(summary.final_loss)),
            *(["\n".join(words.with_half_interval(summary.final_metric))] if metric else []),
            words.milliseconds(summary.step_seconds),
            words.decades(summary.decades),
            *([f"{summary.diverged}/{summary.runs}"] if any_diverged else []),
        ]
        table.add_row(*map(Text, cells))  # Text: the brackets of a label are not rich's markup
    return table


def _item(console: Console, text: str, style: str) -> None:
    """A paragraph with a hanging indent."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_row(Text("-", style=style), Text(text, style=style))
    console.print(grid)
