"""The protocol of a task: a model, data, a loss, and optionally a metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class Task:
    """What is trained.

    Data are whole tensors in memory, first axis the patterns, every number finite and the same at every call: a batch is
    ``inputs[index]``, nothing is computed per sample. A function that returns a ``Task`` is all that ``surefoot compare my_task.py:function`` needs; if it has a
    parameter named ``data`` it is given the ``--data`` folder (a ``pathlib.Path`` or ``None``).
    """

    name: str
    model: Callable[[], nn.Module]
    """Makes a new model at each call, its weights drawn from the global random state of torch, NumPy or Python (each run
    seeds all three)."""
    train: tuple[Tensor, Tensor]
    """Inputs ``[N, ...]`` and targets ``[N, ...]``."""
    validation: tuple[Tensor, Tensor]
    loss: Callable[[Tensor, Tensor], Tensor]
    """``loss(model(inputs), targets)``: the mean over the batch, a scalar."""
    metric: Callable[[Tensor, Tensor], Tensor] | None = None
    """``metric(model(inputs), targets)``: a floating-point mean over the batch, higher is better; ``None``: the
    loss alone. Where it is not finite, a task is refused at the initial weights, and a run ends there as diverged."""
    metric_name: str = "accuracy"
    batch_size: int = 100
    """Default batch size, in patterns."""
    epochs: int = 5
    """Default number of passes over the training data."""
    block: int | None = None
    """Patterns between two points of the curves (training loss, validation, rates); ``None``: one epoch."""
    version: str = "1"
    """Raise it when the task changes in a way that neither its data nor its model's shapes show (of a user's file, the
    function's name and the source are looked at anyway, with the sources of the modules of one's own that it imports)."""
