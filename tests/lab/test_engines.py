"""Runs are trained together where that is faster, and it is never another run that is trained."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_executor import TASK, numbers, planned

from surefoot.lab import timing as timings
from surefoot.lab import worker
from surefoot.lab.course import Timed
from surefoot.lab.engines import AUTO, SEPARATE, STACKED, Timing, Way, batches
from surefoot.lab.errors import UserError
from surefoot.lab.executor import LocalProcesses
from surefoot.lab.runs import RunSpec
from surefoot.lab.timing import timing

SPEC = RunSpec("t", "v", "sgd", {"weight_decay": 0.0}, 0.1, 10, 2, 0)
ALONE = Way(None, 1, 1e-3)
FOUR, SIXTEEN = Way("grouped", 4, 0.4e-3), Way("grouped", 16, 0.2e-3)
TIMING = Timing(rest=0.5, steps=1000, ways=(ALONE, FOUR, SIXTEEN), up_to=16)


class TestChoice:
    @pytest.mark.parametrize(
        ("engine", "runs", "chosen"),
        [
            (AUTO, 100, SIXTEEN),
            (AUTO, 15, FOUR),
            (AUTO, 3, ALONE),
            (STACKED, 100, SIXTEEN),
            (STACKED, 1, ALONE),
            (SEPARATE, 100, ALONE),
        ],
    )
    def test_the_fastest_of_what_is_allowed_and_there_is_enough_for(self, engine, runs, chosen):
        assert TIMING.best(engine, runs) == chosen
        assert TIMING.seconds(chosen) == 0.5 + 1000 * chosen.step

    def test_stacks_that_are_slower(self):
        slower = replace(TIMING, ways=(ALONE, Way("vmap", 8, 2e-3)))
        assert slower.best(AUTO, 100) == ALONE
        assert slower.best(STACKED, 100).lowering == "vmap"


class TestBatches:
    @given(
        counts=st.lists(st.integers(1, 60), min_size=1, max_size=4),
        sizes=st.lists(st.sampled_from([1, 2, 8, 64]), min_size=4, max_size=4),
        seconds=st.lists(st.floats(1e-3, 1e3), min_size=4, max_size=4),
        workers=st.integers(1, 9),
        least=st.sampled_from([0.0, 1.0]),
    )
    def test_every_run_once_and_kinds_apart(self, counts, sizes, seconds, workers, least):
        runs = [
            replace(SPEC, optimizer=str(k), seed=s % 5, rate=s / 10)
            for k, n in enumerate(counts)
            for s in range(n)
        ]
        found = batches(
            runs,
            lambda run: run.optimizer,
            lambda kind: Way(None if sizes[int(kind)] == 1 else "grouped", sizes[int(kind)], 0.0),
            lambda kind: seconds[int(kind)],
            workers,
            least,
        )
        assert sorted(run.key for batch in found for run in batch) == sorted(run.key for run in runs)
        share = sum(seconds[int(run.optimizer)] for run in runs) / workers
        for batch in found:
            (kind,) = {int(run.optimizer) for run in batch}
            whole = max(sizes[kind], -(-least // seconds[kind]))
            assert len(batch) <= max(1, 1.25 * whole)
            assert len(batch) == 1 or len(batch) * seconds[kind] <= share + 2 * seconds[kind]
            assert [run.seed for run in batch] == sorted(run.seed for run in batch)
        assert [b[0].seed for b in found] == sorted(b[0].seed for b in found)

    def test_alone_the_longest_of_a_seed_first(self):
        runs = [replace(SPEC, seed=s, optimizer=o) for o in ("short", "long") for s in range(2)]
        found = batches(
            runs,
            lambda run: run.optimizer,
            lambda _: ALONE,
            {"short": 1.0, "long": 2.0}.__getitem__,
            2,
            0.0,
        )
        assert [(run.seed, run.optimizer) for (run,) in found] == [
            (0, "long"),
            (0, "short"),
            (1, "long"),
            (1, "short"),
        ]

    @pytest.mark.parametrize(
        ("runs", "fastest", "sizes"), [(5, 4, [5]), (23, 16, [11, 12]), (383, 256, [191, 192])]
    )
    def test_a_batch_is_hardly_larger_than_what_was_timed(self, runs, fastest, sizes):
        runs = [replace(SPEC, seed=s) for s in range(runs)]
        found = batches(runs, lambda _: "", lambda _: Way("grouped", fastest, 0.0), lambda _: 1.0, 1, 0.0)
        assert list(map(len, found)) == sizes

    def test_one_kind_is_shared_out_among_the_workers(self):
        runs = [replace(SPEC, seed=s) for s in range(20)]
        found = batches(runs, lambda _: "", lambda _: Way("grouped", 16, 0.0), lambda _: 1.0, 2, 0.0)
        assert list(map(len, found)) == [10, 10]


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine on which a step takes what is said, by lowering and number of runs; notes what it was asked to time."""
    made = SimpleNamespace(
        steps={},
        refusals={"grouped": None, "vmap": None},
        asked=[],
        alone=Timed(step=1e-3, steps=10_000, rest=0.5),
    )

    def timed(task, spec, device):
        made.asked.append("alone")
        return made.alone

    def stack(task, specs, device, lowering, moment):
        assert len({spec.key for spec in specs}) == len(specs)
        made.asked.append((lowering, len(specs)))
        step = made.steps[lowering, len(specs)]
        if isinstance(step, Exception):
            raise step
        return step * len(specs)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(timings, "timed", timed)
    monkeypatch.setattr(timings, "stack_step_seconds", stack)
    monkeypatch.setattr(timings, "refusal", lambda task, spec, device, name: made.refusals[name])
    return made


def ask(engine=AUTO, runs=100, **options):
    return timing(None, SPEC, "cpu", engine, runs, **options)


class TestTiming:
    def test_climbs_with_the_faster_lowering_until_larger_is_no_faster(self, machine):
        falling = dict(zip((2, 4, 8, 16, 32, 64), (6e-4, 4e-4, 3e-4, 3.5e-4, 4e-4, 1e-4), strict=True))
        machine.steps = {("vmap", 2): 7e-4} | {("grouped", k): step for k, step in falling.items()}
        found = ask()
        assert machine.asked == [
            "alone",
            ("grouped", 2),
            ("vmap", 2),
            *[("grouped", k) for k in (4, 8, 16, 32)],
        ]
        assert found.best(AUTO, 100).runs == 8
        assert ask(runs=10_000) == found  # more are no better
        assert len(machine.asked) == 7

    def test_of_long_steps_fewer_are_tried(self, machine):
        machine.alone = Timed(step=0.2, steps=10_000, rest=0.5)
        machine.steps = {("grouped", 2): 0.3, ("vmap", 2): 0.25}
        assert ask().best(AUTO, 100) == Way(None, 1, 0.2)
        assert machine.asked == ["alone", ("grouped", 2), ("vmap", 2)]

    def test_of_few_steps_trying_would_be_much(self, machine):
        machine.alone = Timed(step=1.0, steps=50, rest=0.5)
        assert ask(runs=10).ways == (Way(None, 1, 1.0),)
        assert machine.asked == ["alone"]

    def test_where_trying_failed_it_is_not_tried_again(self, machine):
        found = ask(without_stacks=True)
        assert found.ways == (ALONE,)
        assert found.refusal == "trying it failed"
        assert ask(runs=10_000) == found
        assert machine.asked == ["alone"]

    def test_no_more_runs_than_there_are_and_more_when_there_are_more(self, machine):
        machine.refusals = {"grouped": "no", "vmap": None}
        machine.steps = {("vmap", k): 1e-3 / k for k in (2, 4, 8, 16)}
        assert ask(runs=5).best(AUTO, 5).runs == 4
        assert machine.asked == ["alone", ("vmap", 2), ("vmap", 4)]
        assert ask(runs=20).best(AUTO, 20).runs == 16
        assert machine.asked[3:] == [("vmap", 8), ("vmap", 16)]  # what was known is not timed again

    def test_what_is_remembered_is_of_this_kind_of_run(self, machine):
        machine.steps = {(n, k): 1e-3 for n in ("grouped", "vmap") for k in (2, 4, 8)}
        ask()
        timing(None, replace(SPEC, seed=3, rate=0.2), "cpu", AUTO, 100)
        assert machine.asked.count("alone") == 1
        timing(None, replace(SPEC, batch_size=11), "cpu", AUTO, 100)
        assert machine.asked.count("alone") == 2

    def test_little_work_is_not_worth_it(self, machine, tmp_path):
        machine.alone = Timed(step=1e-3, steps=100, rest=0.1)
        assert ask(runs=20).ways == (ALONE,)
        assert machine.asked == ["alone"]
        assert not list(tmp_path.rglob("*.json"))
        machine.steps = {(n, k): 1e-3 for n in ("grouped", "vmap") for k in (2, 4, 8)}
        assert len(ask(STACKED, runs=8).ways) > 1

    def test_separate_asks_for_no_stack(self, machine):
        assert ask(SEPARATE).ways == (ALONE,)
        assert machine.asked == ["alone"]

    def test_the_reason_where_there_are_no_stacks(self, machine):
        machine.refusals = {"grouped": "it has hooks", "vmap": "it draws numbers"}
        assert ask().refusal == "it draws numbers"
        assert ask(runs=1000).refusal == "it draws numbers"
        assert machine.asked == ["alone"]

    def test_a_failure_is_made_good_without_stacks_or_told(self, monkeypatch):
        def fail(*arguments):
            raise KeyError("x")

        monkeypatch.setattr(timings, "timing", fail)
        room = worker.Room("digits-mlp", None, "cpu")
        monkeypatch.setitem(vars(room), "task", None)
        for engine in (AUTO, STACKED):
            with pytest.raises(worker.UndoneError):
                worker.estimate(room, SPEC, engine, 10, True)
            with pytest.raises(KeyError):
                worker.estimate(room, SPEC, engine, 10, True, True)
        with pytest.raises(KeyError):
            worker.estimate(room, SPEC, SEPARATE, 10, True)

    @pytest.mark.parametrize(
        "error",
        [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")],
    )
    def test_no_memory_for_a_larger_stack(self, machine, error):
        machine.refusals = {"grouped": None, "vmap": "no"}
        machine.steps = {("grouped", 2): 6e-4, ("grouped", 4): 4e-4, ("grouped", 8): error}
        assert ask().best(AUTO, 100).runs == 4

    def test_no_larger_stack_than_memory_allows(self, machine, monkeypatch):
        machine.refusals = {"grouped": None, "vmap": "no"}
        machine.steps = {("grouped", k): 1e-3 / k for k in (2, 4, 8, 16)}
        monkeypatch.setattr(timings, "_free_memory", lambda: 1000.0 * os.cpu_count())
        # A run of a stack takes 100 bytes: 8 would take 800, and 16 more than there are.
        monkeypatch.setattr(
            timings, "_peak_memory", lambda: 100 * max((k for _, k in machine.asked[1:]), default=0)
        )
        assert ask().best(AUTO, 100).runs == 8

    def test_a_damaged_memory_is_made_again(self, machine, tmp_path):
        machine.steps = {(n, k): 1e-3 for n in ("grouped", "vmap") for k in (2, 4, 8)}
        found = ask()
        (file,) = tmp_path.rglob("*.json")
        whole = json.loads(file.read_text())
        damaged = [{"rest": 1}, {**whole, "ways": []}, {**whole, "ways": {}}, {**whole, "rest": None}]
        damaged.append({**whole, "ways": [{**whole["ways"][0], "step": None}]})
        for text in ("{", "[]", *map(json.dumps, damaged)):
            file.write_text(text)
            assert ask() == found

    def test_without_a_folder_it_is_timed_each_time(self, machine, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        machine.steps = {(n, k): 1e-3 for n in ("grouped", "vmap") for k in (2, 4, 8)}
        assert ask() == ask()
        assert machine.asked.count("alone") == 2

    def test_a_dry_run_keeps_nothing(self, machine, tmp_path):
        machine.steps = {(n, k): 1e-3 for n in ("grouped", "vmap") for k in (2, 4, 8)}
        ask(remember=False)
        assert not list(tmp_path.rglob("*.json"))


@pytest.fixture
def task_file(tmp_path, monkeypatch):
    """A task of a linear layer, which can be a stack, or of a model that does what is asked."""

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def write(asked=None):
        path = tmp_path / "own.py"
        text = TASK.replace("Model(3, 1)", "nn.Sequential(nn.Linear(3, 1))") if asked is None else TASK
        path.write_text(text if asked is None else text.replace("    pass\n", asked))
        return f"{path}:task"

    return write


@pytest.mark.slow
class TestWorkers:
    def test_stacks_are_the_runs_by_themselves_to_rounding(self, task_file):
        reference = task_file()
        with LocalProcesses(reference, workers=2, engine=STACKED) as pool:
            wanted = planned(pool, "sgd,adam", rates=(0.01, 0.1), seeds=range(3))
            arranged = pool.arrange(wanted)
            stacked = {r.spec.key: r for r in pool.run(arranged)}
        assert max(map(len, arranged)) > 1
        sizes = {str(r.environment["engine"]).partition(",")[0] for r in stacked.values()}
        assert sizes == {f"stack of {len(batch)}" for batch in arranged}
        with LocalProcesses(reference, workers=2) as pool:
            assert planned(pool, "sgd,adam", rates=(0.01, 0.1), seeds=range(3)) == wanted
            for alone in pool.run(pool.arrange(wanted)):
                assert alone.environment["engine"] == "separate"
                own = numbers(stacked[alone.spec.key])
                for name, value in numbers(alone).items():
                    if isinstance(value, list) and value and isinstance(value[0], float):
                        assert own[name] == pytest.approx(value, rel=3e-5, abs=1e-7), name
                    elif name != "steps":
                        assert own[name] == value

    def test_what_cannot_be_a_stack_is_trained_run_by_run_and_the_reason_is_there(self, task_file):
        reference = task_file("    if float(torch.ones(())) and training:\n        np.random.random()\n")
        path = Path(reference.removesuffix(":task"))
        path.write_text("import numpy as np\n" + path.read_text())
        with LocalProcesses(reference, workers=1, engine=STACKED) as pool:
            wanted = planned(pool, "sgd,dog", rates=(0.1,))
            results = list(pool.run(pool.arrange(wanted)))
            reasons = pool.refusals()
        assert {r.environment["engine"] for r in results} == {"separate"}
        assert len(results) == len(wanted)
        assert "another package" in reasons["dog"]

    STACKED_LOSS = """
def loss(y, t):
    if (HERE / "now").exists() and torch._C._functorch.maybe_current_level() is not None:
        {}
    return nn.functional.mse_loss(y, t)

"""

    def reference(self, task_file, asked):
        """A task whose loss, once it is told "now", does what is asked inside a stack."""
        reference = task_file("    pass\n")
        path = Path(reference.removesuffix(":task"))
        text = path.read_text().replace("nn.functional.mse_loss,", "loss,")
        path.write_text(text.replace("def task()", self.STACKED_LOSS.format(asked) + "def task()"))
        return reference

    @pytest.mark.parametrize("asked", ["os.kill(os.getpid(), signal.SIGKILL)", "raise RuntimeError"])
    def test_a_stack_that_fails_or_kills_its_worker_is_gone_through_run_by_run(
        self, task_file, tmp_path, asked
    ):
        reference = self.reference(task_file, asked)
        with LocalProcesses(reference, workers=1, engine=STACKED) as pool:
            wanted = planned(pool, "sgd", rates=(0.01, 0.1))
            arranged = pool.arrange(wanted)
            assert max(map(len, arranged)) > 1
            (tmp_path / "now").touch()
            results = list(pool.run(arranged))
        assert [r.spec for r in results] == [run for batch in arranged for run in batch]
        assert {r.environment["engine"] for r in results} == {"separate"}

    def test_the_runs_of_a_stack_that_fails_are_shared_out(self, task_file, tmp_path):
        reference = self.reference(task_file, "raise RuntimeError")
        path = Path(reference.removesuffix(":task"))
        meeting = """
    if (HERE / "now").exists():  # waits until two processes have come so far
        (HERE / f"{os.getpid()}.pid").touch()
        end = time.monotonic() + 60
        while len(list(HERE.glob("*.pid"))) < 2 and time.monotonic() < end:
            time.sleep(0.01)
    return nn."""
        path.write_text(path.read_text().replace("\n    return nn.", meeting))
        with LocalProcesses(reference, workers=2, engine=STACKED) as pool:
            wanted = planned(pool, "sgd", rates=(0.01, 0.1))
            pool.estimate(wanted)
            (tmp_path / "now").touch()
            assert len(list(pool.run([wanted]))) == len(wanted)
        assert len(list(tmp_path.glob("*.pid"))) == 2

    def test_a_death_at_each_of_many_runs_ends_nothing(self, task_file, tmp_path):
        """Each run may be the death of a worker once; none is laid to another's charge."""
        reference = task_file("    pass\n")
        path = Path(reference.removesuffix(":task"))
        dying = """
    if (HERE / "now").exists() and (HERE / "next").exists():
        (HERE / "next").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
    return nn.functional.mse_loss(y, t)

"""
        text = path.read_text().replace("nn.functional.mse_loss,", "loss,")
        path.write_text(text.replace("def task()", "def loss(y, t):" + dying + "def task()"))
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool, "sgd", rates=(0.01,), seeds=range(5))
            (tmp_path / "now").touch()
            (tmp_path / "next").touch()
            done = []
            for result in pool.run([run] for run in wanted):
                done.append(result.spec)
                (tmp_path / "next").touch()
        assert done == wanted

    def test_the_good_runs_of_a_stack_with_a_bad_one_are_given_out(self, task_file, tmp_path):
        reference = self.reference(task_file, "raise RuntimeError")
        path = Path(reference.removesuffix(":task"))
        bad = "    if (HERE / 'now').exists() and float(y.detach().abs().max()) > 1e6:\n        raise KeyError\n    return nn."
        path.write_text(path.read_text().replace("    return nn.", bad))
        with LocalProcesses(reference, workers=1, engine=STACKED) as pool:
            wanted = planned(pool, "sgd", rates=(0.01, 1e5), seeds=(0,))
            (together,) = arranged = pool.arrange(wanted)
            assert len(together) == 2
            (tmp_path / "now").touch()
            results = pool.run(arranged)
            assert next(results).spec.rate == 0.01
            with pytest.raises(UserError, match="of sgd at rate 100000 with seed 0: KeyError"):
                next(results)

    def test_a_worker_that_dies_of_the_timing_of_stacks(self, task_file, tmp_path):
        reference = self.reference(task_file, "os.kill(os.getpid(), signal.SIGKILL)")
        with LocalProcesses(reference, workers=1, engine=STACKED) as pool:
            wanted = planned(pool, "sgd", rates=(0.01,), seeds=range(3))
            (tmp_path / "now").touch()
            assert list(map(len, pool.arrange(wanted))) == [1, 1, 1]
            assert pool.refusals() == {"sgd": "trying it failed"}
