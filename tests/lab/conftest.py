"""Made-up studies for the tests of the statistics and the report; no proxy for those of downloads."""

import math

import pytest

from surefoot.lab.runs import Method, RunResult, RunSpec, Study, TaskInfo

TRAIN_PATTERNS = 1000


def _make_run(
    loss,
    *,
    optimizer="adam",
    rate=1e-3,
    seed=0,
    settings=None,
    train=(2.0, 1.0, 0.5, 0.6),
    metric=(0.5, 0.7, 0.9, 0.8),
    rates=(1.0, 1.0, 1.0, 1.0),
    spread=0.5,
    step_seconds=0.002,
    environment=None,
):
    """A run of 2 epochs, a point each half epoch, that ends at ``loss``; infinity: it diverges after one block."""
    diverged = math.isinf(loss)
    points = 1 if diverged else len(train)
    return RunResult(
        spec=RunSpec(
            task="made-up",
            task_version="v1",
            optimizer=optimizer,
            settings=settings or {"window": 50},
            rate=rate,
            batch_size=100,
            epochs=2,
            seed=seed,
        ),
        status="diverged" if diverged else "finished",
        patterns=[TRAIN_PATTERNS * (i + 1) // 2 for i in range(points)],
        train_loss=list(train[:points]),
        validation_loss=[3.0] if diverged else [3.0, *train[1:-1], loss],
        validation_metric=list(metric[:points]),
        rate_mean=[rate * factor for factor in rates[:points]],
        rate_std=[rate * factor * spread for factor in rates[:points]],
        rate_min=[rate * factor * 0.1 for factor in rates[:points]],
        rate_max=[rate * factor * 3 for factor in rates[:points]],
        steps=10 * points,
        seconds=1.5,
        step_seconds=step_seconds,
        environment=environment or {},
    )


def _make_study(
    losses, *, metric_name="accuracy", seeds=None, command="surefoot compare made-up", **run_options
):
    """A study of ``losses``: by label, by rate, by seed, a final validation loss (infinity: diverged)."""
    settings = {label: {"window": 50, "etas": (0.5, 1.2), "number": i} for i, label in enumerate(losses)}
    if metric_name is None:
        run_options["metric"] = ()
    seeds = seeds or sorted({seed for rates in losses.values() for runs in rates.values() for seed in runs})
    return Study(
        task=TaskInfo("made-up", "v1", TRAIN_PATTERNS, 200, 21840, metric_name, 100, 2),
        methods=[
            Method(label, label, settings[label], batch_size=100, rates=tuple(rates))
            for label, rates in losses.items()
        ],
        results={
            label: [
                _make_run(
                    loss, optimizer=label, rate=rate, seed=seed, settings=settings[label], **run_options
                )
                for rate, runs in rates.items()
                for seed, loss in runs.items()
            ]
            for label, rates in losses.items()
        },
        epochs=2,
        seeds=seeds,
        command=command,
    )


@pytest.fixture(scope="session")
def make_run():
    return _make_run


@pytest.fixture(scope="session")
def make_study():
    return _make_study


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
