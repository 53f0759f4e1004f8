"""The command line.

It reads what the user asks, has workers train, and shows what came out. It never imports torch, and what is heavy is
imported by the command that needs it, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from surefoot._version import __version__
from surefoot.lab.errors import UserError

try:
    import typer
except ModuleNotFoundError as missing:
    raise SystemExit(
        "error: the command line needs the laboratory; install it by: pip install 'surefoot[lab]'"
    ) from missing

OPTIMIZERS = "sgd,momentum,adam,srprop,sgd-upd,adam-upd"
RATES = "1e-5:1e1"

_EXAMPLES = """\b
Examples:
  surefoot compare digits
  surefoot compare mnist --data mnist/ --seeds 3 --dry-run
  surefoot compare my_task.py:task --optimizers "adam,adam-upd[window=600]"
  surefoot compare digits --optimizers "adam[rate=1e-3],srprop[etas=0.5:1.2|0.7375:1.2]"
"""

# click's, or that of typer's own copy of click in later releases
_UsageError: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # it would read the brackets of name[setting=value] as markup
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point: runs the command and turns what the user can mend into one sentence and exit code 2."""
    try:
        sys.exit(app(prog_name="surefoot", standalone_mode=False))
    except UserError as error:
        sentence = str(error)
    except _UsageError as error:
        sentence = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
    except (KeyboardInterrupt, typer.Abort):  # before or after the command's own handling
        sys.exit(130)
    typer.echo(f"error: {sentence}", err=True)
    sys.exit(2)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"surefoot {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _surefoot(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Optimizers that find their own step size, and a laboratory that shows which of them to trust."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(epilog=_EXAMPLES, short_help="Train optimizers on one task and report which is best.")
def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="What is trained: digits, digits-mlp, mnist, fashion-mnist, mnist-sigmoid, cifar10, regression, or a "
            "function in a file of your own that returns a task, as my_task.py:task.",
            show_default=False,
        ),
    ],
    optimizers: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Optimizers to compare, each with settings if you like: name[setting=value,...], where | separates "
            "alternatives, : the entries of a tuple, and batch and rate are settings too.",
        ),
    ] = OPTIMIZERS,
    rates: Annotated[
        str,
        typer.Option(
            metavar="RATES",
            help="Initial rates to train each optimizer at: every decade of first:last, or numbers separated by commas.",
        ),
    ] = RATES,
    seeds: Annotated[
        int,
        typer.Option(
            metavar="N", help="How many seeds to train at each rate; each has its weights and data order."
        ),
    ] = 5,
    epochs: Annotated[
        int | None,
        typer.Option(metavar="N", help="Passes over the training data; the task's own number if not given."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", help="Batch size in patterns; the task's own number if not given."),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the data files of a task that needs some; without it, where SUREFOOT_DATA says.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder for the report, and for the store if --store names no other."
        ),
    ] = Path("surefoot-out"),
    device: Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to train.")] = "cpu",
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Database of finished runs, as a file or a SQLAlchemy URL; a run that it holds is never run again.",
            show_default="runs.sqlite in --out",
        ),
    ] = None,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes that train at once; one per core if not given.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would run and about how long, and write nothing.")
    ] = False,
) -> None:
    """Train optimizers over initial rates and seeds on one task, and report which is best and how sure that is.

    Every finished run is kept: interrupt it with Ctrl-C when you like, and the same command goes on from there.
    """
    from rich.console import Console

    from surefoot.lab.compare import Comparison
    from surefoot.lab.compare import compare as run

    comparison = Comparison(
        task=task,
        optimizers=optimizers,
        rates=rates,
        seeds=seeds,
        epochs=epochs,
        batch=batch,
        data=data,
        out=out,
        device=device,
        store=store,
        workers=workers,
    )
    if code := run(comparison, Console(), Console(stderr=True), dry_run=dry_run):
        raise typer.Exit(code)
