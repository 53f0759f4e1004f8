"""Small tables of numbers."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from surefoot.lab.tasks.base import Task

_TRAINED = 340  # of 442


def regression() -> Task:
    """scikit-learn's diabetes study: ten measurements, the progression a year later; a network of 193 parameters.

    Inputs and target are standardised by the training split, so a loss of 1 is that of predicting the mean.
    """
    from sklearn.datasets import load_diabetes

    inputs, targets = load_diabetes(return_X_y=True)
    order = np.random.RandomState(0).permutation(len(targets))  # a stream that NumPy's policy freezes
    table = np.column_stack([inputs, targets])[order]
    table = (table - table[:_TRAINED].mean(axis=0)) / table[:_TRAINED].std(axis=0)
    values = torch.tensor(table, dtype=torch.float32)
    x, y = values[:, :-1].contiguous(), values[:, -1:].contiguous()
    return Task(
        name="regression",
        model=_network,
        train=(x[:_TRAINED], y[:_TRAINED]),
        validation=(x[_TRAINED:], y[_TRAINED:]),
        loss=nn.functional.mse_loss,
        batch_size=20,
        epochs=30,
    )


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Linear(16, 1))
