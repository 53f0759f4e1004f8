"""The tasks that come with surefoot, and how a user's own is found, checked and identified."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from surefoot.lab.errors import UserError
from surefoot.lab.runs import TaskInfo
from surefoot.lab.tasks import images, tabular
from surefoot.lab.tasks.base import Task

__all__ = ["TASKS", "Task", "describe", "explain", "load"]

TASKS: dict[str, Callable[..., Task]] = {
    "digits": images.digits,
    "digits-mlp": images.digits_mlp,
    "mnist": images.mnist,
    "fashion-mnist": images.fashion_mnist,
    "regression": tabular.regression,
}
"""By name; they follow the same protocol as a user's function (:class:`surefoot.lab.tasks.base.Task`)."""

_LIBRARIES = tuple({sysconfig.get_path(place) for place in ("stdlib", "purelib", "platlib")})


def load(reference: str, data: Path | None = None) -> Task:
    """The task of that name, or of ``"path/to/file.py:function"``; ``data`` is the folder of ``--data``.

    Raises:
        UserError: there is no such task, file or function, it fails, or what it returns is no usable task.
    """
    path, _, function = reference.rpartition(":")
    if path.endswith(".py"):
        return _from_file(Path(path), function, data)
    if reference.endswith(".py"):
        raise UserError(
            f"{reference} is a file; name the function in it that returns the task: {reference}:task."
        )
    if reference not in TASKS:
        near = difflib.get_close_matches(reference, TASKS, n=1)
        meant = f"did you mean {near[0]}" if near else f"the tasks are {', '.join(TASKS)}"
        raise UserError(f"There is no task {reference!r}; {meant}, or name your own as file.py:function.")
    return _made(TASKS[reference], reference, data)


def describe(task: Task) -> TaskInfo:
    """What the driver needs to know of a task, measured by making its model and trying the first batches.

    ``version`` is a hash of the data, of the model's parameter names and shapes, of the distance between the points of
    the curves, and of ``Task.version``.

    Raises:
        UserError: model, loss or metric fail, are of the wrong kind, or the loss is not finite to begin with.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)  # not torch.manual_seed, which would seed other devices too
        model = _try(task)
    parameters = dict(model.named_parameters())
    digest = hashlib.sha256()
    for tensor in (*task.train, *task.validation):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    for name, parameter in parameters.items():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.requires_grad};".encode())
    digest.update(f"{task.block} {task.version}".encode())
    return TaskInfo(
        name=task.name,
        version=digest.hexdigest(),
        train_patterns=len(task.train[0]),
        validation_patterns=len(task.validation[0]),
        parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        metric_name=None if task.metric is None else task.metric_name,
        batch_size=task.batch_size,
        epochs=task.epochs,
    )


def explain(error: BaseException) -> str:
    """An exception that is not surefoot's, on one line: its type, its message, and where to look for its cause."""
    text = ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split())[:300])))
    frames = traceback.extract_tb(error.__traceback__)
    if not frames or isinstance(error, SyntaxError):  # whose message has the place
        return text
    own = [frame for frame in frames if not frame.filename.startswith(_LIBRARIES)]
    frame = (own or frames)[-1]
    return f"{text} ({Path(frame.filename).name}, line {frame.lineno})"


def _from_file(path: Path, function: str, data: Path | None) -> Task:
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(f"Task file {path} cannot be read: {error.strerror}.") from None
    with _importable(path.resolve().parent):
        module = _imported(path, source)
        make = getattr(module, function, None)
        if not callable(make):
            known = [name for name, value in vars(module).items() if callable(value)]
            near = difflib.get_close_matches(function, known, n=1)
            meant = f"; did you mean {near[0]}" if near else ""
            raise UserError(f"Task file {path} has no function {function!r}{meant}.")
        task = _made(make, f"{path}:{function}", data)
    # The file decides what is computed, in ways that neither data nor parameter shapes show.
    return replace(task, version=f"{task.version} {hashlib.sha256(source).hexdigest()}")


def _imported(path: Path, source: bytes) -> ModuleType:
    """The module that ``source`` is: compiled from these very bytes, which are hashed, and not from a cache."""
    specification = importlib.util.spec_from_file_location(f"surefoot_task_{path.stem}", path)
    assert specification is not None  # there is a loader for every .py
    module = importlib.util.module_from_spec(specification)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up there
    try:
        exec(compile(source, path, "exec", dont_inherit=True), vars(module))
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"Task file {path} cannot be imported: {explain(error)}.") from error
    return module


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """Modules in ``folder`` can be imported, as when a file in it is run."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _made(make: Callable[..., Any], reference: str, data: Path | None) -> Task:
    """Calls a task function, with ``data`` if it has such a parameter, and checks what it returns."""
    try:
        takes_data = "data" in inspect.signature(make).parameters
    except ValueError:  # some callables written in C have no signature
        takes_data = False
    if data is not None and not takes_data:
        raise UserError(f"Task {reference} reads no data folder; leave out --data.")
    try:
        task = make(data=data) if takes_data else make()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"Task {reference} failed: {explain(error)}.") from error
    if not isinstance(task, Task):
        raise UserError(
            f"Task {reference} returned {type(task).__name__}; it must return a surefoot.lab.tasks.Task."
        )
    _check(task, reference)
    return task


def _check(task: Task, reference: str) -> None:
    """What can be said without running anything."""

    def wrong(what: str) -> UserError:
        return UserError(f"Task {reference}: {what}.")

    if not isinstance(task.name, str) or not task.name:
        raise wrong("its name must be a word")
    for field in ("model", "loss", "metric"):
        if not (callable(getattr(task, field)) or (field == "metric" and task.metric is None)):
            raise wrong(f"its {field} must be a function")
    for field in ("train", "validation"):
        pair = getattr(task, field)
        if not (
            isinstance(pair, tuple | list)
            and len(pair) == 2
            and all(isinstance(t, Tensor) and t.ndim > 0 for t in pair)
        ):
            raise wrong(f"its {field} data must be two tensors, inputs [N, ...] and targets [N, ...]")
        inputs, targets = pair
        if len(inputs) != len(targets):
            raise wrong(f"its {field} data have {len(inputs)} inputs but {len(targets)} targets")
        if len(inputs) == 0:
            raise wrong(f"its {field} data are empty")
    for field in ("batch_size", "epochs", "block"):
        number = getattr(task, field)
        if field == "block" and number is None:
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise wrong(f"its {field} must be a whole number of at least 1, not {number!r}")
    if task.batch_size > len(task.train[0]):
        raise wrong(
            f"its batch_size {task.batch_size} is more than its {len(task.train[0])} training patterns"
        )


def _try(task: Task) -> nn.Module:
    """Makes the model and runs one batch of training and of validation data through it."""
    try:
        model = task.model()
    except Exception as error:
        raise UserError(f"Task {task.name}: its model cannot be made: {explain(error)}.") from error
    if not isinstance(model, nn.Module):
        raise UserError(
            f"Task {task.name}: its model function returned {type(model).__name__}, not a torch Module."
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"Task {task.name}: its model has no parameters to train.")
    for field, training in (("train", True), ("validation", False)):
        inputs, targets = (tensor[: task.batch_size] for tensor in getattr(task, field))
        model.train(training)
        try:
            outputs = model(inputs)
            loss = task.loss(outputs, targets)
            metric = None if task.metric is None else task.metric(outputs, targets)
        except Exception as error:
            shapes = f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)}"
            raise UserError(
                f"Task {task.name}: a batch of {field} data ({shapes}) fails: {explain(error)}."
            ) from error
        for what, value in (("loss", loss), ("metric", metric)):
            if value is None and what == "metric" and task.metric is None:
                continue
            if not isinstance(value, Tensor) or value.ndim > 0:
                got = (
                    f"a tensor of shape {tuple(value.shape)}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise UserError(
                    f"Task {task.name}: its {what} must be a scalar tensor, the mean over a batch, not {got}."
                )
            if not torch.isfinite(value):
                raise UserError(
                    f"Task {task.name}: its {what} on the first {field} data is {value.item()} before any training; "
                    "check the data for missing values and the model's initial weights."
                )
        if training and not loss.requires_grad:
            raise UserError(f"Task {task.name}: its loss does not depend on the model's parameters.")
    return model
