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

_SWEEP_EXAMPLES = """\b
Examples:
  surefoot sweep digits --optimizer adam --trials 30
  surefoot sweep digits --optimizer "adam-upd[undo=none]" --range window=50:1000:log --range rate=1e-4:1e-1:log
  surefoot sweep digits --optimizer srprop --sampler grid --rates 1e-4:1e-1 --range "window=50|600" --range etas.0=0.5
  surefoot sweep digits --optimizer momentum --seeds 9 --halving 3
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


_Task = Annotated[
    str,
    typer.Argument(
        help="What is trained: digits, digits-mlp, mnist, fashion-mnist, mnist-sigmoid, cifar10, regression, or a "
        "function in a file of your own that returns a task, as my_task.py:task.",
        show_default=False,
    ),
]
_Seeds = Annotated[
    int,
    typer.Option(
        metavar="N", help="How many seeds to train at each setting; each has its weights and data order."
    ),
]
_Epochs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Passes over the training data; the task's own number if not given."),
]
_Batch = Annotated[
    int | None,
    typer.Option(metavar="N", help="Batch size in patterns; the task's own number if not given."),
]
_Data = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder with the data files of a task that needs some; without it, where SUREFOOT_DATA says.",
        show_default=False,
    ),
]
_Out = Annotated[
    Path,
    typer.Option(metavar="DIR", help="Folder for the report, and for the store if --store names no other."),
]
_Device = Annotated[str, typer.Option(metavar="cpu|cuda", help="Where to train.")]
_Store = Annotated[
    str | None,
    typer.Option(
        metavar="URL",
        help="Database of finished runs, as a file or a SQLAlchemy URL; a run that it holds is never run again.",
        show_default="runs.sqlite in --out",
    ),
]
_Workers = Annotated[
    int | None, typer.Option(metavar="N", help="Processes that train at once; one per core if not given.")
]
_On = Annotated[
    str | None,
    typer.Option(
        metavar="ray|ray://HOST:PORT",
        help="Train on a Ray cluster: a local one, or that of a head node.",
        show_default="this machine",
    ),
]
_Log = Annotated[
    str | None,
    typer.Option(
        metavar="tensorboard|wandb",
        help="Log each finished run there too; both with a comma.",
        show_default=False,
    ),
]
_Engine = Annotated[
    str,
    typer.Option(
        metavar="auto|separate|stacked",
        help="How many runs a worker trains together: what a moment's timing finds the fastest, one, or stacks.",
    ),
]
_DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Say what would run and about how long, and write nothing.")
]
_OUT = Path("surefoot-out")


@app.command(epilog=_EXAMPLES, short_help="Train optimizers on one task and report which is best.")
def compare(
    task: _Task,
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
    seeds: _Seeds = 5,
    epochs: _Epochs = None,
    batch: _Batch = None,
    data: _Data = None,
    out: _Out = _OUT,
    device: _Device = "cpu",
    store: _Store = None,
    workers: _Workers = None,
    on: _On = None,
    log: _Log = None,
    engine: _Engine = "auto",
    dry_run: _DryRun = False,
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
        on=on,
        log=log,
        engine=engine,
    )
    if code := run(comparison, Console(), Console(stderr=True), dry_run=dry_run):
        raise typer.Exit(code)


@app.command(epilog=_SWEEP_EXAMPLES, short_help="Search for an optimizer's best setting on one task.")
def sweep(
    task: _Task,
    optimizer: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Whose settings are searched; those in name[setting=value,...] stay as they are.",
            show_default=False,
        ),
    ],
    sampler: Annotated[
        str,
        typer.Option(
            metavar="tpe|gp|random|grid",
            help="Who chooses the settings: Optuna's samplers, or every point of a grid.",
        ),
    ] = "tpe",
    trials: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="How many settings to try in all.", show_default="50, or the whole grid"
        ),
    ] = None,
    seeds: _Seeds = 5,
    ranges: Annotated[
        list[str] | None,
        typer.Option(
            "--range",
            metavar="NAME=RANGE",
            help="What to search in place of the optimizer's own: name=low:high, name=low:high:log (then :points, for a "
            "grid) or name=value|value; again for each name. Settings, their entries (betas.0), rate and batch.",
            show_default=False,
        ),
    ] = None,
    rates: Annotated[
        str | None,
        typer.Option(
            metavar="RATES",
            help="Initial rates to choose from: every decade of first:last, or numbers separated by commas.",
            show_default=False,
        ),
    ] = None,
    space: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Ranges in a TOML file.", show_default=False)
    ] = None,
    halving: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Start each setting with few seeds, and let the best 1 of N go on to more.",
            show_default="every setting has all seeds",
        ),
    ] = None,
    at_once: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Settings that are tried at once; a sampler learns from those before.",
            show_default="5 where it learns, else 20; more if that keeps all workers busy",
        ),
    ] = None,
    epochs: _Epochs = None,
    batch: _Batch = None,
    data: _Data = None,
    out: _Out = _OUT,
    device: _Device = "cpu",
    store: _Store = None,
    workers: _Workers = None,
    on: _On = None,
    log: _Log = None,
    engine: _Engine = "auto",
    dry_run: _DryRun = False,
) -> None:
    """Search for the setting of one optimizer with the lowest mean final validation loss over the seeds.

    Every finished run is kept: interrupt it with Ctrl-C when you like, and the same command goes on from there.
    """
    from rich.console import Console

    from surefoot.lab.sweep import Sweep
    from surefoot.lab.sweep import sweep as run

    asked = Sweep(
        task=task,
        optimizer=optimizer,
        sampler=sampler,
        trials=trials,
        at_once=at_once,
        halving=halving,
        rates=rates,
        ranges=tuple(ranges or ()),
        space=space,
        seeds=seeds,
        epochs=epochs,
        batch=batch,
        data=data,
        out=out,
        device=device,
        store=store,
        workers=workers,
        on=on,
        log=log,
        engine=engine,
    )
    if code := run(asked, Console(), Console(stderr=True), dry_run=dry_run):
        raise typer.Exit(code)


@app.command(short_help="Bring the runs of several stores together.")
def merge(
    stores: Annotated[
        list[str],
        typer.Argument(metavar="STORE...", help="Files or SQLAlchemy URLs to read.", show_default=False),
    ],
    into: Annotated[
        str,
        typer.Option(
            metavar="URL", help="Where their runs are added; made if it is not there.", show_default=False
        ),
    ],
) -> None:
    """Add the finished runs and the searches of several stores to one; what it has already stays as it is."""
    from surefoot.lab.merge import merge as run

    typer.echo(run(stores, into))
