"""Made-up studies for the tests of the statistics and the report, pretended workers for those of the jobs; no proxy."""

import math

import pytest

from surefoot.lab import session
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


class Script:
    """What the pretended workers do, and what they were asked."""

    def __init__(self):
        self.version = "v1"
        self.before = {}
        """By the number of a run (from 0): called once, before its result is given."""
        self.loss = lambda spec: 0.5 + spec.rate
        """Final validation loss of a run; infinity: it diverges."""
        self.prepared = []
        self.estimated = []
        self.ran = []
        self.closed = 0


@pytest.fixture
def script(monkeypatch, tmp_path):
    script = Script()

    class Pretended:
        def __init__(self, task_ref, data, device="cpu", workers=None, engine="auto"):
            self.task_ref, self.workers = task_ref, workers or 2

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            script.closed += 1

        def prepare(self, requests, rates):
            script.prepared.append((list(requests), rates))
            task = TaskInfo(self.task_ref, script.version, 100, 20, 1000, "accuracy", 10, 4)
            methods = [
                Method(
                    r.label,
                    r.optimizer,
                    {"eps": 1e-8, "betas": (0.9, 0.999), "window": 50, "undo": "exact", **r.settings},
                    r.batch_size or 10,
                    (r.rate,) if r.rate else rates,
                )
                for r in requests
            ]
            return task, methods

        def call(self, name, function, *arguments):
            return function(None, *arguments)

        def estimate(self, specs, alike=None, remember=True):
            script.estimated.append(list(specs))
            return self.seconds(specs)

        def seconds(self, specs):
            return [10.0 if spec.optimizer == "adam" else 5.0 for spec in specs]

        def refusals(self):
            return {}

        def arrange(self, specs):
            longest_first = sorted(
                zip(specs, self.seconds(specs), strict=True), key=lambda s: (s[0].seed, -s[1])
            )
            return [(spec,) for spec, _ in longest_first]

        def run(self, batches):
            for (spec,) in batches:
                script.before.pop(len(script.ran), lambda: None)()
                script.ran.append(spec)
                loss = script.loss(spec)
                status = "diverged" if math.isinf(loss) else "finished"
                curve = [1.0 + spec.seed, loss][: 1 if math.isinf(loss) else 2]
                points = len(curve)
                yield RunResult(
                    spec, status, [50, 100][:points], curve, curve, [0.1, 0.2][:points],
                    *[[0.1, 0.1][:points]] * 4, 10, 1.0, 0.1, {},
                )  # fmt: skip

    monkeypatch.setattr(session, "LocalProcesses", Pretended)
    monkeypatch.chdir(tmp_path)
    return script
