"""The tasks that come with surefoot, and how a user's own is found, checked and identified."""

from __future__ import annotations

import difflib
import hashlib
import importlib.util
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from surefoot.lab.errors import UserError
from surefoot.lab.runs import TaskInfo
from surefoot.lab.streams import own_random_state, seed_everything
from surefoot.lab.tasks import images, tabular
from surefoot.lab.tasks.base import Task

__all__ = ["TASKS", "Task", "describe", "explain", "load"]

TASKS: dict[str, Callable[..., Task]] = {
    "digits": images.digits,
    "digits-mlp": images.digits_mlp,
    "mnist": images.mnist,
    "fashion-mnist": images.fashion_mnist,
    "mnist-sigmoid": images.mnist_sigmoid,
    "cifar10": images.cifar10,
    "regression": tabular.regression,
}
"""By name; they follow the same protocol as a user's function (:class:`surefoot.lab.tasks.base.Task`)."""

_LIBRARIES = tuple({sysconfig.get_path(place) for place in ("stdlib", "platstdlib", "purelib", "platlib")})

_STANDARD_LIBRARY = tuple(
    str(Path(sysconfig.get_path(place)).resolve()) + os.sep for place in ("stdlib", "platstdlib")
)
_OWN_MODULE = "surefoot_task_"
_brought: set[str] = set()
"""The modules that user's files brought along: loading a file again is to read them again too."""


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

    ``version`` is a hash of the data, of the names, shapes and types of the model's parameters and buffers, of the
    metric's name, of the distance between the points of the curves, and of ``Task.version``.

    Raises:
        UserError: model, loss or metric fail, are of the wrong kind, or are not finite to begin with; the data hold a
            number that is not finite; the model is not made anew, and the same, from the same random state.
    """
    _check_numbers(task)
    with own_random_state(torch.device("cpu")):
        model = _fresh_model(task)
        _try(task, model)
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    metric_name = None if task.metric is None else task.metric_name
    digest = hashlib.sha256()
    for tensor in (*task.train, *task.validation):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(_bytes(tensor).numpy().data)
    for kind in (parameters, buffers):
        for name, tensor in kind.items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad};".encode())
        digest.update(b".")
    digest.update(f"{metric_name!r} {task.block} {task.version}".encode())
    return TaskInfo(
        name=task.name,
        version=digest.hexdigest(),
        train_patterns=len(task.train[0]),
        validation_patterns=len(task.validation[0]),
        parameters=sum(p.numel() for p in parameters.values() if p.requires_grad),
        metric_name=metric_name,
        batch_size=task.batch_size,
        epochs=task.epochs,
    )


def explain(error: BaseException) -> str:
    """An exception that is not surefoot's, on one line: its type, its message, and where to look for its cause."""
    message = " ".join(str(error).split())[:300].rstrip(".")  # it becomes a part of a sentence
    text = ": ".join(filter(None, (type(error).__name__, message)))
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
    folder = path.resolve().parent
    with _importable(folder), _local_modules(folder) as neighbours:
        module = _imported(path, source)
        make = getattr(module, function, None)
        if not callable(make):
            known = [name for name, value in vars(module).items() if callable(value)]
            near = difflib.get_close_matches(function, known, n=1)
            meant = f"; did you mean {near[0]}" if near else ""
            raise UserError(f"Task file {path} has no function {function!r}{meant}.")
        task = _made(make, f"{path}:{function}", data)
    # The code decides what is computed, in ways that neither data nor parameter shapes show.
    code = hashlib.sha256(source)
    for name in sorted(neighbours):
        code.update(f" {name} {hashlib.sha256(neighbours[name]).hexdigest()}".encode())
    return replace(task, version=f"{task.version} {function} {code.hexdigest()}")


def _imported(path: Path, source: bytes) -> ModuleType:
    """The module that ``source`` is: compiled from these very bytes, which are hashed, and not from a cache."""
    specification = importlib.util.spec_from_file_location(f"{_OWN_MODULE}{path.stem}", path)
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
def _local_modules(folder: Path) -> Iterator[dict[str, bytes]]:
    """Names and sources, filled in at the end, of the modules that were loaded meanwhile, or earlier from ``folder``.

    The standard library, installed packages and surefoot are left out: those are versions, and a run's record has them.
    """
    for name in _brought:
        sys.modules.pop(name, None)
    _brought.clear()
    importlib.invalidate_caches()  # a file may have been written since
    before = set(sys.modules)
    sources: dict[str, bytes] = {}
    try:
        yield sources
    finally:
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file is None or not _is_local(name, Path(file).resolve()):
                continue
            if name not in before:
                _brought.add(name)
            elif not Path(file).resolve().is_relative_to(folder):
                continue
            if not name.startswith(_OWN_MODULE):  # the file itself, hashed as it was compiled
                with suppress(OSError):  # code without a file, in an archive for instance
                    sources[name] = Path(file).read_bytes()


def _is_local(name: str, file: Path) -> bool:
    """Whether a module is of the user's own making."""
    package = name.partition(".")[0]
    # torch writes some modules of its own into temporary files; the main modules are the program, not the task.
    if package in ("surefoot", "__main__", "__mp_main__") or package.startswith("_remote_module_"):
        return False
    installed = {"site-packages", "dist-packages"}.intersection(file.parts)
    return not installed and not str(file).startswith(_STANDARD_LIBRARY)


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


def _check_numbers(task: Task) -> None:
    """A missing value would look like a divergence of whichever run meets it."""
    for field in ("train", "validation"):
        for part, tensor in zip(("inputs", "targets"), getattr(task, field), strict=True):
            if not (tensor.is_floating_point() or tensor.is_complex()) or torch.isfinite(tensor).all():
                continue
            finite = (
                torch.isfinite(tensor).flatten(start_dim=1)
                if tensor.ndim > 1
                else torch.isfinite(tensor)[:, None]
            )
            first = int(finite.all(dim=1).logical_not().nonzero()[0])
            raise UserError(
                f"Task {task.name}: its {field} {part} hold NaN or infinity, first in pattern {first} (counted from 0) "
                f"of {len(tensor)}; every number must be finite."
            )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _fresh_model(task: Task) -> nn.Module:
    """A model from the random streams with seed 0, after another one that shows whether it is a new one, and the same."""
    device = torch.device("cpu")
    seed_everything(0, device)
    first = _model(task)
    seed_everything(0, device)
    model = _model(task)
    taken = {place for parameter in first.parameters() for place in _places(parameter)}
    if not taken.isdisjoint(place for parameter in model.parameters() for place in _places(parameter)):
        raise UserError(
            f"Task {task.name}: its model function returns the same model (or weights) each time; make a new one."
        )
    pairs = zip(first.parameters(), model.parameters(), strict=False)
    if any(not (is_lazy(a) or is_lazy(b)) and _differ(a, b) for a, b in pairs):
        raise UserError(
            f"Task {task.name}: its model function makes other weights from the same seed; draw them from the global "
            "random state of torch, NumPy or Python, which surefoot seeds."
        )
    return model


def _places(parameter: nn.Parameter) -> Iterable[int]:
    """What tells a parameter and its memory."""
    yield id(parameter)
    if not is_lazy(parameter) and parameter.numel():
        yield parameter.untyped_storage().data_ptr()


def _differ(a: Tensor, b: Tensor) -> bool:
    return a.shape != b.shape or a.dtype != b.dtype or not torch.equal(_bytes(a), _bytes(b))


def _model(task: Task) -> nn.Module:
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
    return model


def _try(task: Task, model: nn.Module) -> None:
    """Runs one batch of training and of validation data through the model."""
    for field, training in (("train", True), ("validation", False)):
        # Copies: a model may change its input in place.
        inputs, targets = (tensor[: task.batch_size].clone() for tensor in getattr(task, field))
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
            if not isinstance(value, Tensor) or value.ndim > 0 or not value.is_floating_point():
                got = (
                    f"a tensor of shape {tuple(value.shape)} and type {str(value.dtype).removeprefix('torch.')}"
                    if isinstance(value, Tensor)
                    else type(value).__name__
                )
                raise UserError(
                    f"Task {task.name}: its {what} must be a scalar tensor of a floating-point type, the mean over a "
                    f"batch, not {got}."
                )
            if not torch.isfinite(value):
                raise UserError(
                    f"Task {task.name}: its {what} on the first {field} data is {value.item()} before any training; "
                    "check the range of the data and the model's initial weights."
                )
        if training and not loss.requires_grad:
            raise UserError(f"Task {task.name}: its loss does not depend on the model's parameters.")
