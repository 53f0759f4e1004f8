"""Small images with ten classes: scikit-learn's digits, MNIST, Fashion-MNIST and CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.lab.data import CIFAR10, FASHION_MNIST, MNIST, DataSet, Images, Split, load_images
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


def mnist_sigmoid(data: Path | None = None) -> Task:
    """MNIST as in the report on hyper-regularization: 784-500-10 with a sigmoid, 40 epochs (397,510 parameters).

    The report leaves open: the initial weights, here torch's own, uniform within 1 / sqrt(n) for n inputs of a layer;
    the scale of the inputs, here 0 to 1; the batch, here 100.
    """
    train, validation = _tensors(load_images(MNIST, data))
    return Task(
        name="mnist-sigmoid",
        model=sigmoid_network,
        train=train,
        validation=validation,
        loss=nn.functional.nll_loss,
        metric=accuracy,
        batch_size=100,
        epochs=40,
    )


def cifar10(data: Path | None = None) -> Task:
    """CIFAR-10 as in LOSSGRAD's paper: its network, inputs -0.5 to 0.5, batches of 100, 60 epochs (189,230 parameters)."""
    train, validation = _tensors(load_images(CIFAR10, data), mean=0.5)
    return Task(
        name="cifar10",
        model=lossgrad_cnn,
        train=train,
        validation=validation,
        loss=nn.functional.cross_entropy,
        metric=accuracy,
        batch_size=100,
        epochs=60,
    )


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


def sigmoid_network() -> nn.Sequential:
    """The network of the report on hyper-regularization: 397,510 parameters, log-probabilities."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 500), nn.Sigmoid(), nn.Linear(500, CLASSES), nn.LogSoftmax(dim=1)
    )


def lossgrad_cnn() -> nn.Sequential:
    """LOSSGRAD's network for CIFAR-10: 189,230 parameters; weights from N(0, 0.05^2) and biases 0.2, as in its code."""
    model = nn.Sequential(
        nn.Conv2d(3, 30, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(30, 40, kernel_size=5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(40, 50, kernel_size=3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(450, 250),
        nn.ReLU(),
        nn.Linear(250, 100),
        nn.ReLU(),
        nn.Linear(100, CLASSES),
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.05)
        else:
            nn.init.constant_(parameter, 0.2)
    return model


def _tensors(
    images: Images, mean: float = 0.0, std: float = 1.0
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Both splits, channels first: (pixel / 255 - mean) / std, and the classes."""

    def tensors(split: Split) -> tuple[Tensor, Tensor]:
        pixels, labels = (torch.tensor(array) for array in split)
        channels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2).contiguous()
        return channels.float().div_(255).sub_(mean).div_(std), labels.long()

    return tensors(images.train), tensors(images.test)


def _paper_task(source: DataSet, mean: float, std: float, folder: Path | None) -> Task:
    train, validation = _tensors(load_images(source, folder), mean, std)
    return Task(
        name=source.name,
        model=paper_cnn,
        train=train,
        validation=validation,
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
