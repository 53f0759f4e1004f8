"""Finished runs as other tools show them: TensorBoard, and Weights & Biases; each is an extra of the installation.

The driver writes a run there after it has stored it. Steps are the training patterns seen, as in the report's curves.
"""

from __future__ import annotations

import os
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from importlib.util import find_spec
from pathlib import Path

from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult, RunSpec, TaskInfo, Value


class Tracking:
    """The tools that ``--log`` names.

    A tool that fails ends nothing: that is told, and the runs go on without it.

    Args:
        log: their names, separated by commas; ``None``: none.
        folder: where each makes a folder of its own for what it writes.
        tell: says something to the user.

    Raises:
        UserError: there is no such tool, or it is not installed.
    """

    def __init__(
        self, log: str | None, folder: Path, tell: Callable[[str], object] = lambda text: None
    ) -> None:
        self._tell = tell
        self._tools: list[_Tool] = []
        self._labels: Mapping[str, str] = {}
        self._metric = "metric"
        for name in dict.fromkeys(word.strip() for word in log.split(",")) if log is not None else ():
            if name not in _TOOLS:
                raise UserError(f"--log is {log!r}; it must be {' or '.join(_TOOLS)}, or both with a comma.")
            if find_spec(name) is None:
                raise UserError(
                    f"--log {name} needs the Python package {name}; install it by: pip install 'surefoot[{name}]'."
                )
            self._tools.append(_TOOLS[name](folder))

    def describe(self, task: TaskInfo, labels: Mapping[str, str]) -> None:
        """Says how the runs are to be called.

        Args:
            task: what they train.
            labels: what the reader knows their optimizers by, by the keys of the runs; otherwise it is their names.
        """
        self._metric = task.metric_name or self._metric
        self._labels = labels

    def open(self) -> None:
        """Makes sure, before any run is made, that runs can be logged.

        Raises:
            UserError: they cannot.
        """
        for tool in self._tools:
            tool.open()

    def log(self, result: RunResult) -> None:
        """Writes one run: its curves, its settings, and how it ended."""
        label = self._labels.get(result.spec.key, result.spec.optimizer)
        for tool in list(self._tools):
            try:
                tool.log(result, label, self._metric)
            except UserError as error:  # noqa: PERF203 - each fails for itself
                self._tools.remove(tool)
                self._tell(f"{error} The runs go on, and are kept, but no more of them is logged there.")


class _Tool(ABC):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @abstractmethod
    def open(self) -> None: ...

    @abstractmethod
    def log(self, result: RunResult, label: str, metric: str) -> None: ...


class _TensorBoard(_Tool):
    """Event files, a folder for each run: ``tensorboard --logdir OUT/tensorboard``.

    The points of a curve are spread evenly over the time in which the run took place. No torch is needed.
    """

    def open(self) -> None:
        from tensorboard.plugins.hparams import summary_v2  # noqa: F401  (rather now than after the first run)

    def log(self, result: RunResult, label: str, metric: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.plugins.hparams import summary_v2
        from tensorboard.summary.writer.record_writer import RecordWriter

        name, began = _name(result.spec), _began(result)
        settings = {key: _plain(value) for key, value in _settings(result).items()}
        hparams = summary_v2.hparams_pb(settings, trial_id=name, start_time_secs=began)
        events = [
            Event(wall_time=began, file_version="brain.Event:2"),
            Event(wall_time=began, summary=hparams),
        ]
        for number, (patterns, point) in enumerate(_points(result, metric), start=1):
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=y) for tag, y in point.items()])
            moment = began + result.seconds * number / len(result.patterns)
            events.append(Event(wall_time=moment, step=patterns, summary=summary))
        parts = (result.spec.task, label, name)
        folder = self.folder.joinpath("tensorboard", *map(_file_name, parts))
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with open(folder / f"events.out.tfevents.{began:010.0f}.surefoot", "wb") as file:
                writer = RecordWriter(file)
                for event in events:
                    writer.write(event.SerializeToString())
        except OSError as error:
            raise UserError(
                f"--log tensorboard cannot write to {str(folder)!r}: {error.strerror}."
            ) from error


class _WandB(_Tool):
    """Weights & Biases: a run there for each run here, by the run's key, so that none is there twice.

    To whom it logs, and whether at once or when ``wandb sync`` is called (``WANDB_MODE=offline``), its own settings say.
    """

    def open(self) -> None:
        import wandb

        with _wandb_sentences():
            if wandb.setup().settings.mode not in ("offline", "dryrun", "disabled"):
                wandb.login()

    def log(self, result: RunResult, label: str, metric: str) -> None:
        import wandb

        # The run took place elsewhere: nothing that is found around this process belongs to it.
        settings = wandb.Settings(
            silent=True,
            console="off",
            disable_code=True,
            disable_git=True,
            host="",
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        )
        with _wandb_sentences():
            run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "surefoot"),
                dir=str(self.folder),
                id=result.spec.key[:16],
                name=f"{label} {_name(result.spec)}",
                group=label,
                config={**_settings(result), "environment": dict(result.environment)},
                reinit="create_new",
                settings=settings,
            )
            for patterns, point in _points(result, metric):
                run.log(point, step=patterns)
            run.summary.update({"steps": result.steps, "seconds": result.seconds})
            run.finish()


_TOOLS: dict[str, type[_Tool]] = {"tensorboard": _TensorBoard, "wandb": _WandB}


def _points(result: RunResult, metric: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Patterns seen and, by name, what the curves have there."""
    curves = {
        "train/loss": result.train_loss,
        "validation/loss": result.validation_loss,
        f"validation/{metric}": result.validation_metric,
        "rate/mean": result.rate_mean,
        "rate/std": result.rate_std,
        "rate/min": result.rate_min,
        "rate/max": result.rate_max,
    }
    curves = {name: curve for name, curve in curves.items() if curve}
    for index, patterns in enumerate(result.patterns):
        yield patterns, {name: curve[index] for name, curve in curves.items()}


def _settings(result: RunResult) -> dict[str, Value]:
    """What tells a run from others, and how it ended."""
    spec = result.spec
    return {
        **spec.settings,
        "task": spec.task,
        "optimizer": spec.optimizer,
        "rate": spec.rate,
        "batch_size": spec.batch_size,
        "epochs": spec.epochs,
        "seed": spec.seed,
        "status": result.status,
    }


def _name(spec: RunSpec) -> str:
    """A run among those of its optimizer; the key tells apart what differs in anything else."""
    return f"rate={spec.rate:g} seed={spec.seed} {spec.key[:8]}"


def _plain(value: Value) -> bool | int | float | str:
    """A setting as TensorBoard takes it."""
    return value if isinstance(value, bool | int | float | str) else str(value)


def _began(result: RunResult) -> float:
    """When the run began, in seconds since 1970."""
    started = result.environment.get("started")
    return datetime.fromisoformat(started).timestamp() if isinstance(started, str) else time.time()


def _file_name(text: str) -> str:
    """The same, without what cannot be in a file's name somewhere."""
    return re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", text)


@contextmanager
def _wandb_sentences() -> Iterator[None]:
    """Turns what wandb complains of into one sentence for the user."""
    import wandb

    try:
        yield
    except (wandb.Error, OSError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"--log wandb fails: {reason}; WANDB_MODE=offline does without a server.") from error
