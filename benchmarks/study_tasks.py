"""Real tasks that are small enough to train hundreds of times, for studies over rates, batch sizes and rules.

For ``surefoot compare benchmarks/study_tasks.py:imdb --data FOLDER`` and the like.
"""

from __future__ import annotations

import lzma
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from surefoot.lab.errors import UserError
from surefoot.lab.tasks import images
from surefoot.lab.tasks.base import Task

_PATTERNS = 12_000
_VALIDATION = 5_000
_WORDS = 1_000


def fashion(data: Path | None) -> Task:
    """The first 12,000 images of Fashion-MNIST and the network of the L-algorithms' paper."""
    has_it = data is not None and (data / "fashion-mnist").is_dir()  # else a package of the system may
    return _first(images.fashion_mnist(data if has_it else None), "fashion-12k", epochs=2)


def mnist_norm(data: Path | None) -> Task:
    """The first 12,000 images of MNIST and two hidden layers with BatchNorm."""
    return replace(_first(images.mnist(data), "mnist-12k-norm", epochs=2), model=_normed)


def _normed() -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in ((784, 128), (128, 64)):
        layers += [nn.Linear(wide, narrow), nn.BatchNorm1d(narrow), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10), nn.LogSoftmax(dim=1))


def imdb(data: Path | None) -> Task:
    """12,000 film reviews as the presence of the 1,000 most frequent words, one hidden layer, dropout of one half."""
    path = (data or Path()) / "imdb" / "imdb.tsv.xz"
    if not path.is_file():
        raise UserError(f"--data has no imdb/imdb.tsv.xz: {path} is no file.")
    with lzma.open(path) as file:
        rows = [row.split("\t", 4) for row in file.read().decode("utf8").split("\n")[:-1]]
    order = np.random.RandomState(0).permutation(25_000)
    train = [row for row in rows if row[0] == "train"]
    test = [row for row in rows if row[0] == "test"]
    chosen = [train[i] for i in order[:_PATTERNS]], [test[i] for i in order[:_VALIDATION]]
    words = [[set(re.findall(r"[a-z']+", row[4].lower())) for row in part] for part in chosen]
    counts = Counter(word for review in words[0] for word in review)
    places = {word: i for i, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[:_WORDS])}

    def tensors(reviews: list[set[str]], part: list[list[str]]) -> tuple[Tensor, Tensor]:
        present = torch.zeros(len(reviews), _WORDS)
        for i, review in enumerate(reviews):
            present[i, [places[word] for word in review if word in places]] = 1.0
        return present, torch.tensor([int(row[1]) for row in part])

    return Task(
        name="imdb-12k",
        model=lambda: nn.Sequential(nn.Linear(_WORDS, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 2)),
        train=tensors(words[0], chosen[0]),
        validation=tensors(words[1], chosen[1]),
        loss=nn.functional.cross_entropy,
        metric=images.accuracy,
        epochs=2,
    )


def _first(task: Task, name: str, epochs: int) -> Task:
    """The same task on its first patterns."""
    return replace(
        task,
        name=name,
        train=(task.train[0][:_PATTERNS], task.train[1][:_PATTERNS]),
        validation=(task.validation[0][:_VALIDATION], task.validation[1][:_VALIDATION]),
        batch_size=100,
        epochs=epochs,
        block=None,
    )
