"""The random streams of a run: torch's, NumPy's and Python's global ones, seeded for the run and given back after it.

The runs of a stack take turns: torch's streams are each run's own while its numbers are drawn.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import numpy as np
import torch

from surefoot.optim.probe import RandomState

_T = TypeVar("_T")


def stream_seed(seed: int, purpose: str) -> int:
    """The seed of one of a run's random streams: a hash, so that neighbouring seeds and purposes share nothing."""
    return int.from_bytes(hashlib.sha256(f"{purpose} {seed}".encode()).digest()[:8], "big")


@contextmanager
def own_random_state(device: torch.device) -> Iterator[None]:
    """Gives back the global random states, Python's, NumPy's, torch's and its device's, as they were."""
    every = [] if device.type == "cpu" else range(torch.get_device_module(device).device_count())
    kind = "cuda" if device.type == "cpu" else device.type  # a kind must be named even for no device
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=every, device_type=kind):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def seed_everything(seed: int, device: torch.device) -> None:
    """Seeds the global random states that :func:`own_random_state` gives back, and no other."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # it takes no more
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)  # not torch.manual_seed, which would seed other devices too
    else:
        torch.manual_seed(seed)


class Streams:
    """torch's random streams of several runs, each going on where it stopped; what others left in them is overwritten."""

    def __init__(self, states: Sequence[RandomState]) -> None:
        self._states = list(states)

    @property
    def runs(self) -> int:
        """How many there are."""
        return len(self._states)

    @contextmanager
    def of(self, run: int) -> Iterator[None]:
        """Inside, torch's random streams are this run's."""
        self._states[run].restore()
        yield
        self._states[run] = self._states[run].now()

    def draw(self, function: Callable[[], _T]) -> list[_T]:
        """What the function returns for each run."""
        drawn = []
        for run in range(self.runs):
            with self.of(run):
                drawn.append(function())
        return drawn

    def only(self, runs: Sequence[int]) -> Streams:
        """A copy with these of the runs."""
        return Streams([self._states[run] for run in runs])

    def copy(self) -> Streams:
        """As they are now, whatever is drawn from these later."""
        return Streams(self._states)
