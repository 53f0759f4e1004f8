"""The random streams of a run: torch's, NumPy's and Python's global ones, seeded for the run and given back after it."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


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
