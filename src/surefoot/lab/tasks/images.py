"""Small images with ten classes: scikit-learn's digits, MNIST and Fashion-MNIST."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from surefoot.lab.data import FASHION_MNIST, MNIST, DataSet, load_images
from surefoot.lab.tasks.base import Task

CLASSES = 10
_DIGITS_TRAINED = 1440  # of 1,797: a number that many batch sizes divide
_PAPER_BATCH = 25  # the batch size M of most of the paper's best rows
_PAPER_BLOCK = 3000


def accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Share of the patterns whose largest output is the target's class."""
    return (outputs.argmax(dim=1) == targets).float().mean()


def digits() -> Task:
    """scikit-learn's 1,797 real 8x8 digits and a small convolutional network (1,898 parameters)."""
    return _digits("digits", _digits_cnn)


def digits_mlp() -> Task:
    """The same digits and a network with one hidden layer (2,410 parameters)."""
    return _digits("digits-mlp", _digits_mlp)


def mnist(data: Path | None = None) -> Task:
    """MNIST as in the L-algorithms' paper: its network, 5 epochs, a point of every curve each 3,000 patterns."""
    return _paper_task(MNIST, mean=0.1307, std=0.3081, folder=data)


def fashion_mnist(data: Path | None = None) -> Task:
    """Fashion-MNIST, trained like MNIST."""
    return _paper_task(FASHION_MNIST, mean=0.2860, std=0.3530, folder=data)


def paper_cnn() -> nn.Sequential:
    """The network of the L-algorithms' paper: 21,840 parameters, torch's default initialisation, log-probabilities."""
    return nn.Sequential(
        nn.Conv2d(1, 10, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(10, 20, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(320, 50),
        nn.ReLU(),
        nn.Linear(50, CLASSES),
        nn.LogSoftmax(dim=1),
    )


def _paper_task(source: DataSet, mean: float, std: float, folder: Path | None) -> Task:
    images = load_images(source, folder)

    def tensors(split: tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]) -> tuple[Tensor, Tensor]:
        pixels, labels = (torch.tensor(array) for array in split)
        return pixels.float().div_(255).sub_(mean).div_(std).unsqueeze(1), labels.long()

    return Task(
        name=source.name,
        model=paper_cnn,
        train=tensors(images.train),
        validation=tensors(images.test),
        loss=nn.functional.nll_loss,
        metric=accuracy,
        batch_size=_PAPER_BATCH,
        epochs=5,
        block=_PAPER_BLOCK,
    )


def _digits_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 8, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(8, 16, kernel_size=3, padding=1),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def _digits_mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, CLASSES))


def _digits(name: str, model: Callable[[], nn.Module]) -> Task:
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    # RandomState's stream is frozen by NumPy's policy, so the split is the same everywhere and for ever.
    order = np.random.RandomState(0).permutation(len(labels))
    inputs = torch.tensor(pixels[order], dtype=torch.float32).div_(16).view(-1, 1, 8, 8)
    targets = torch.tensor(labels[order], dtype=torch.long)
    return Task(
        name=name,
        model=model,
        train=(inputs[:_DIGITS_TRAINED], targets[:_DIGITS_TRAINED]),
        validation=(inputs[_DIGITS_TRAINED:], targets[_DIGITS_TRAINED:]),
        loss=nn.functional.cross_entropy,
        metric=accuracy,
        batch_size=24,
        epochs=10,
    )
