"""What is run and what came out: the records that every other room of the laboratory passes on.

Standard library only, so that the command line can plan, store and report without importing torch.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

NUMERICS = 3
"""Raised when a release changes the numbers that a run gives, so that old runs are not taken for new ones."""

Scalar = bool | int | float | str | None
Value = Scalar | Sequence[Scalar]
"""A setting of an optimizer: a plain value, or a tuple of them (``betas``, ``etas``)."""


def digest_of(record: Mapping[str, Any]) -> str:
    """SHA-256 of a record's canonical JSON, in hexadecimal: the same for equal records."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


@dataclass(frozen=True)
class Method:
    """One line of a comparison: an optimizer with its settings, under the name the reader sees.

    ``settings`` holds every setting, defaults included, so that a changed default is a different method.
    """

    label: str
    optimizer: str
    settings: Mapping[str, Value]
    batch_size: int
    rates: tuple[float, ...]


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides a run's numbers. Its ``key`` is the run's identity in a store."""

    task: str
    task_version: str
    optimizer: str
    settings: Mapping[str, Value]
    rate: float
    batch_size: int
    epochs: int
    seed: int

    @property
    def key(self) -> str:
        """SHA-256 of the specification's canonical JSON, in hexadecimal."""
        return digest_of({**asdict(self), "numerics": NUMERICS})


@dataclass(frozen=True)
class RunResult:
    """A run that came to its end, well (``finished``) or with a loss that is no number any more (``diverged``).

    The curves have one entry per block of training patterns, ``patterns[i]`` being the number seen by then. A diverged
    run's curves stop before the first value that is not finite, so every number here is finite.
    """

    spec: RunSpec
    status: Literal["finished", "diverged"]
    patterns: Sequence[int]
    """Training patterns seen at the end of each block."""
    train_loss: Sequence[float]
    """Mean over each block of the batches' losses, each taken before that batch's update."""
    validation_loss: Sequence[float]
    validation_metric: Sequence[float]
    """The task's metric, higher is better; empty where the task has none."""
    rate_mean: Sequence[float]
    """Effective rate (lr included) over all weights at the end of each block: mean, and so on below."""
    rate_std: Sequence[float]
    rate_min: Sequence[float]
    rate_max: Sequence[float]
    steps: int
    seconds: float
    """Wall time of the whole run, validation included."""
    step_seconds: float
    """Mean wall time of one training step, validation excluded."""
    environment: Mapping[str, Scalar] = field(default_factory=dict)
    """Versions, device, threads, time of day: what may move the last bits, and what may explain the time."""

    @property
    def min_train_loss(self) -> float:
        """The smallest block of the training-loss curve; infinity for a diverged run."""
        return min(self.train_loss) if self.status == "finished" else math.inf

    @property
    def min_train_loss_patterns(self) -> float:
        """Training patterns seen when ``min_train_loss`` was reached; NaN for a diverged run."""
        if self.status != "finished":
            return math.nan
        return self.patterns[min(range(len(self.train_loss)), key=self.train_loss.__getitem__)]

    @property
    def final_validation_loss(self) -> float:
        """The last validation loss; infinity for a diverged run."""
        return self.validation_loss[-1] if self.status == "finished" else math.inf

    @property
    def final_validation_metric(self) -> float:
        """The last validation metric; NaN for a diverged run or where the task has none."""
        return (
            self.validation_metric[-1] if self.status == "finished" and self.validation_metric else math.nan
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> RunResult:
        """The inverse of :meth:`to_dict`."""
        return cls(**{**record, "spec": RunSpec(**record["spec"])})


@dataclass(frozen=True)
class SearchSpec:
    """Everything that decides which settings a search tries. Its ``key`` is the search's identity in a store.

    How many trials it has is not among this: a search can be gone on with.
    """

    task: str
    task_version: str
    optimizer: str
    settings: Mapping[str, Value]
    """What all trials have in common, batch size and rate included."""
    space: Mapping[str, Mapping[str, Any]]
    """What they differ in, as plain values."""
    sampler: str
    epochs: int
    seeds: int
    halving: int | None

    @property
    def key(self) -> str:
        """As a run's."""
        return digest_of({**asdict(self), "numerics": NUMERICS})


@dataclass(frozen=True)
class Trial:
    """One setting that a search tries, from seeds 0 to ``seeds - 1`` as far as it has come."""

    number: int
    setting: Mapping[str, Value]
    """By the names of the space: settings of the optimizer, parts of those that are tuples, ``rate`` and ``batch``."""
    seeds: int
    """How many it has been granted: all of the search's, or fewer while it has to prove itself."""
    pruned: bool = False
    """Given up with the seeds that it has."""

    @property
    def digest(self) -> str:
        """Of its setting."""
        return digest_of(self.setting)


@dataclass(frozen=True)
class TaskInfo:
    """What a reader needs to know of a task, measured where the task was loaded."""

    name: str
    version: str
    """Hash of the data, the model's parameter shapes and the task's source: part of every run's key."""
    train_patterns: int
    validation_patterns: int
    parameters: int
    metric_name: str | None
    batch_size: int
    epochs: int


@dataclass(frozen=True)
class Study:
    """A comparison with its results: what the statistics are computed from and the report is drawn from."""

    task: TaskInfo
    methods: Sequence[Method]
    results: Mapping[str, Sequence[RunResult]]
    """By method label: the runs at hand, over rates and seeds, in no particular order."""
    epochs: int
    seeds: Sequence[int]
    command: str
    """The command line that makes this study again."""
    chosen_from: int | None = None
    """Of how many settings the methods are the best, judged on these very seeds; ``None``: they are what was asked for."""
