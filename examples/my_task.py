"""A task of your own, in one small file.

Compare optimizers on it with

    surefoot compare examples/my_task.py:task

What a task is: a function without arguments that returns a `Task`, which holds

- `model`: a function that makes a new model at each call; surefoot calls it for each run, after seeding torch, NumPy
  and Python's `random` with the run's seed,
- `train` and `validation`: inputs and targets as whole tensors, the first axis being the patterns,
- `loss` (the mean over a batch, a scalar) and, if you like, a `metric` of which more is better,
- `batch_size` and `epochs`: what is used unless the command line says otherwise.

Keep the split and the preparation of the data the same at every call: every run is to see the same data, and a stored
run counts again only for a task with the same data. Editing this file, or one of yours that it imports, makes it another task. If your data are in
files, give the function a parameter named `data`: it gets the folder that was named with --data (or None).
"""

import torch
from sklearn.datasets import load_wine
from torch import Tensor, nn

from surefoot.lab.tasks import Task


def model() -> nn.Module:
    """Thirteen measurements of a wine in, one score for each of three growers out."""
    return nn.Sequential(nn.Linear(13, 16), nn.ReLU(), nn.Linear(16, 3))


def accuracy(scores: Tensor, growers: Tensor) -> Tensor:
    """Share of the wines whose highest score is their grower's."""
    return (scores.argmax(dim=1) == growers).float().mean()


def task() -> Task:
    """Whose wine is it? 178 wines; every fourth one is kept for validation."""
    measurements, growers = load_wine(return_X_y=True)
    inputs = torch.tensor(measurements, dtype=torch.float32)
    targets = torch.tensor(growers)

    held_out = torch.arange(len(inputs)) % 4 == 0
    mean, std = inputs[~held_out].mean(dim=0), inputs[~held_out].std(dim=0)
    inputs = (inputs - mean) / std

    return Task(
        name="wine",
        model=model,
        train=(inputs[~held_out], targets[~held_out]),
        validation=(inputs[held_out], targets[held_out]),
        loss=nn.functional.cross_entropy,
        metric=accuracy,
        batch_size=19,
        epochs=20,
    )
