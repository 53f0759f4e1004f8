"""Runs in processes of their own: the same numbers as here, one thread each, and never a process left behind."""

import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import pytest

from surefoot.lab.errors import UserError
from surefoot.lab.executor import LocalProcesses, usable_cores
from surefoot.lab.plan import parse_optimizers, specs

TASK = """
import os, signal, time
from pathlib import Path
import torch
from torch import nn
from surefoot.lab.tasks import Task

HERE = Path(__file__).parent

def as_asked(training):
    pass

class Model(nn.Linear):
    def forward(self, x):
        as_asked(self.training)
        return super().forward(x)

def task():
    x = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    y = x.sum(dim=1, keepdim=True)
    return Task("own", lambda: Model(3, 1), (x, y), (x, y), nn.functional.mse_loss, batch_size=8, epochs=2)
"""


@pytest.fixture
def task_file(tmp_path):
    """Writes a task whose model first does what is asked for, with ``training``; returns its reference."""

    def write(asked="pass"):
        path = tmp_path / "own.py"
        path.write_text(TASK.replace("    pass\n", textwrap.indent(textwrap.dedent(asked), "    ") + "\n", 1))
        return f"{path}:task"

    return write


def planned(pool, optimizers="sgd,adam", rates=(0.01, 0.1), seeds=(0, 1)):
    info, methods = pool.prepare(parse_optimizers(optimizers), rates)
    return specs(info, methods, info.epochs, seeds)


def alone(runs):
    """Each run a batch of its own."""
    return [[run] for run in runs]


def numbers(result):
    record = result.to_dict()
    return {name: record[name] for name in record if name not in ("seconds", "step_seconds", "environment")}


def is_gone(pid):
    """Whether a process has ended; it may still wait for its parent to notice."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def wait_until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


class TestRuns:
    @pytest.mark.slow
    def test_numbers_are_those_of_a_run_here(self, task_file):
        from surefoot.lab.tasks import describe, load
        from surefoot.lab.train import train

        reference = task_file()
        task = load(reference)
        with LocalProcesses(reference, workers=2) as pool:
            assert pool.workers == 2
            info, methods = pool.prepare(
                parse_optimizers("sgd,srprop[window=3,rate=0.02,batch=5]"), (0.01, 0.1)
            )
            assert info == describe(task)
            assert [(m.label, m.batch_size, m.rates) for m in methods] == [
                ("sgd", 8, (0.01, 0.1)),
                ("srprop[window=3,rate=0.02,batch=5]", 5, (0.02,)),
            ]
            assert methods[1].settings["window"] == 3
            assert methods[1].settings["undo"] == "exact"  # defaults are written out
            wanted = specs(info, methods, 2, range(3))
            estimates = pool.estimate(wanted)
            results = {result.spec.key: result for result in pool.run(alone(wanted))}
            again = [numbers(result) for result in pool.run(alone(wanted[:2]))]  # the pool lives on
        assert len(results) == len(wanted) == 9
        for spec in wanted:
            assert numbers(results[spec.key]) == numbers(train(task, spec))
            assert results[spec.key].environment["threads"] == 1
        assert sorted(map(str, again)) == sorted(str(numbers(results[spec.key])) for spec in wanted[:2])
        assert len(estimates) == len(wanted)
        assert min(estimates) > 0
        by_kind = {(s.optimizer, e) for s, e in zip(wanted, estimates, strict=True)}
        assert len(by_kind) == 2  # rates and seeds share a timing

    def test_start_in_the_given_order_and_do_not_wait_for_the_caller(self, task_file, tmp_path):
        reference = task_file("""
            if training and not hasattr(Model, "begun"):
                Model.begun = 0
            if training:
                Model.begun += 1
                (HERE / f"step {Model.begun}").touch()
        """)
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool)
            steps_before = len(list(tmp_path.glob("step *")))  # of preparing
            order = []
            for result in pool.run(alone(wanted)):
                order.append(result.spec)
                # While this result is looked at, the next run comes to its end.
                steps = steps_before + 10 * min(len(order) + 1, len(wanted))
                wait_until(lambda steps=steps: (tmp_path / f"step {steps}").exists())
        assert order == wanted

    def test_of_nothing_give_nothing(self, task_file):
        with LocalProcesses(task_file(), workers=1) as pool:
            assert list(pool.run([])) == []
            assert pool.estimate([]) == []

    def test_need_a_with_statement(self, task_file):
        pool = LocalProcesses(task_file(), workers=1)
        with pytest.raises(RuntimeError, match="with statement"):
            list(pool.run([]))

    def test_start_no_more_processes_than_there_is_work(self, task_file):
        with LocalProcesses(task_file(), workers=200) as pool:
            assert pool.workers == 200
            wanted = planned(pool, "sgd", rates=(0.1,), seeds=(0,))
            pool.estimate(wanted)
            assert len(list(pool.run(alone(wanted)))) == 1
            assert len(multiprocessing.active_children()) == 1

    def test_there_may_be_a_process_for_each_core_of_ours(self):
        assert LocalProcesses("digits").workers == usable_cores() == len(os.sched_getaffinity(0))


class TestErrors:
    @pytest.mark.parametrize(
        ("asked", "optimizers", "said"),
        [
            ("pass", "sdg", r"^There is no optimizer 'sdg'; did you mean sgd\.$"),
            (
                "pass",
                "sgd[batch=41]",
                r"^sgd\[batch=41\] asks for batches of 41 patterns, but task own has only 40",
            ),
            (
                "raise KeyError('x')",
                "sgd",
                r"^Task own: a batch of train data .* KeyError: 'x' \(own.py, line 11\)\.$",
            ),
            ("raise SystemExit", "sgd", r"^An error ended the preparation of the task: SystemExit"),
        ],
    )
    def test_a_plan_that_cannot_be_is_refused_in_its_own_words(self, task_file, asked, optimizers, said):
        with LocalProcesses(task_file(asked), workers=1) as pool, pytest.raises(UserError, match=said):
            planned(pool, optimizers)

    def test_a_device_that_is_not_there(self, task_file):
        with (
            LocalProcesses(task_file(), device="warp", workers=1) as pool,
            pytest.raises(UserError, match="'warp'"),
        ):
            planned(pool)

    def test_an_error_in_a_run_names_the_run_and_the_place(self, task_file):
        reference = task_file("if (HERE / 'prepared').exists():\n    raise KeyError('x')")
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool)
            (Path(reference).parent / "prepared").touch()
            said = r"^An error ended the run of sgd at rate 0.01 with seed 0: KeyError: 'x' \(own.py, line 12\)\.$"
            with pytest.raises(UserError, match=said):
                list(pool.run(alone(wanted)))

    def test_a_task_that_changes_meanwhile_is_refused(self, task_file):
        with LocalProcesses(task_file(), workers=1) as pool:
            wanted = planned(pool)
        changed = task_file("pass  # changed")
        said = "Task own has changed since the comparison began"
        with LocalProcesses(changed, workers=1) as pool, pytest.raises(UserError, match=said):
            list(pool.run(alone(wanted)))

    def test_data_that_differ_at_each_call_are_said(self, task_file):
        reference = task_file()
        path = Path(reference.removesuffix(":task"))
        path.write_text(path.read_text().replace(", generator=torch.Generator().manual_seed(0)", ""))
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool)
        said = r"^Task own gives other data at every call; seed what it draws them from\.$"
        with LocalProcesses(reference, workers=1) as pool, pytest.raises(UserError, match=said):
            list(pool.run(alone(wanted)))

    def test_a_task_that_was_loaded_while_it_was_written_is_loaded_again(self, task_file):
        reference = task_file()
        path = Path(reference.removesuffix(":task"))
        whole = path.read_text()
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool)
        path.write_text(whole + "# half")
        with LocalProcesses(reference, workers=1) as pool:
            planned(pool)  # this process has loaded the half
            path.write_text(whole)
            assert len(list(pool.run(alone(wanted)))) == len(wanted)

    def test_an_interrupt_that_the_task_makes_is_an_error_of_the_task(self, task_file):
        reference = task_file("raise KeyboardInterrupt")
        said = r"^An error ended the preparation of the task: KeyboardInterrupt \(own.py, line 11\)\.$"
        with LocalProcesses(reference, workers=1) as pool, pytest.raises(UserError, match=said):
            planned(pool)


class TestDeath:
    @pytest.mark.slow
    def test_a_run_whose_process_is_killed_is_done_once_more(self, task_file, tmp_path):
        reference = task_file("""
            if (HERE / "die").exists():
                (HERE / "die").unlink()
                os.kill(os.getpid(), signal.SIGKILL)
        """)
        with LocalProcesses(reference, workers=2) as pool:
            wanted = planned(pool)
            (tmp_path / "die").touch()
            results = list(pool.run(alone(wanted)))
        assert not (tmp_path / "die").exists()
        assert {result.spec.key for result in results} == {spec.key for spec in wanted}
        assert {result.status for result in results} == {"finished"}

    def test_a_run_whose_process_dies_again_is_named(self, task_file, tmp_path):
        reference = task_file("""
            if (HERE / "die").exists():
                os.kill(os.getpid(), signal.SIGKILL)
        """)
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool, "adam", rates=(0.5,), seeds=(7,))
            (tmp_path / "die").touch()
            said = r"of adam at rate 0.5 with seed 7 \(ended by SIGKILL\); is there enough memory\?$"
            with pytest.raises(UserError, match=said):
                list(pool.run(alone(wanted)))

    def test_an_exit_of_its_own_has_nothing_to_do_with_memory(self, task_file):
        said = r"^Its process died twice during the preparation of the task \(exit code 3\)\.$"
        with (
            LocalProcesses(task_file("os._exit(3)"), workers=1) as pool,
            pytest.raises(UserError, match=said),
        ):
            planned(pool)

    @pytest.mark.slow
    def test_a_process_killed_while_idle_is_replaced(self, task_file, tmp_path):
        reference = task_file("(HERE / 'pid').write_text(str(os.getpid()))")
        with LocalProcesses(reference, workers=1) as pool:
            wanted = planned(pool)
            pid = int((tmp_path / "pid").read_text())
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: is_gone(pid))
            assert len(list(pool.run(alone(wanted)))) == len(wanted)
            assert int((tmp_path / "pid").read_text()) != pid


SLOW = """
if (HERE / "slow").exists():
    (HERE / f"{os.getpid()}.pid").touch()
    time.sleep(600)
"""


def pids(folder):
    return [int(path.stem) for path in folder.glob("*.pid")]


class TestEnding:
    @pytest.mark.parametrize("end", ["close", "break", "interrupt"])
    def test_ends_every_process_at_once(self, task_file, tmp_path, end):
        with LocalProcesses(task_file("(HERE / f'{os.getpid()}.pid').touch()\n" + SLOW), workers=2) as pool:
            wanted = planned(pool, seeds=range(40))
            results = pool.run(alone(wanted))
            next(results)
            (tmp_path / "slow").touch()
            wait_until(lambda: len(pids(tmp_path)) == 2)
            began = time.monotonic()
            if end == "close":
                results.close()
            elif end == "break":
                del results
            else:
                with pytest.raises(KeyboardInterrupt):
                    results.throw(KeyboardInterrupt)
            assert time.monotonic() - began < 10
            assert all(map(is_gone, pids(tmp_path)))

    DRIVER = """
        import sys
        from surefoot.lab.executor import LocalProcesses
        from surefoot.lab.plan import parse_optimizers, specs

        if __name__ == "__main__":
            with LocalProcesses(sys.argv[1], workers=2) as pool:
                info, methods = pool.prepare(parse_optimizers("sgd"), (0.1,))
                (__import__("pathlib").Path(sys.argv[1]).parent / "slow").touch()
                list(pool.run([spec] for spec in specs(info, methods, 1, range(4))))
    """

    @pytest.fixture
    def driver(self, task_file, tmp_path):
        """A driver in a process group of its own, once both its workers are busy for ten minutes."""
        script = tmp_path / "driver.py"
        script.write_text(textwrap.dedent(self.DRIVER))
        process = subprocess.Popen(
            [sys.executable, script, task_file(SLOW)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            wait_until(lambda: len(pids(tmp_path)) == 2 or process.poll() is not None, 60)
            assert process.poll() is None, process.stderr.read()
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            process.stderr.close()

    def test_a_driver_that_is_killed_leaves_no_process(self, driver, tmp_path):
        driver.kill()
        driver.wait()
        wait_until(lambda: all(map(is_gone, pids(tmp_path))))

    def test_ctrl_c_is_heard_by_the_driver_alone(self, driver, tmp_path):
        os.killpg(driver.pid, signal.SIGINT)  # as a terminal does
        _, errors = driver.communicate(timeout=30)
        assert errors.count("Traceback") == 1, errors
        assert errors.rstrip().endswith("KeyboardInterrupt")
        assert all(map(is_gone, pids(tmp_path)))

    def test_a_worker_does_not_hear_ctrl_c_even_while_it_starts(self, task_file, capfd):
        with LocalProcesses(task_file(), workers=2) as pool:
            wanted = planned(pool)
            results = pool.run(alone(wanted))
            done = [next(results)]
            started = {child.pid for child in multiprocessing.active_children()}
            assert len(started) == 2  # the second one has only just begun
            for _ in range(50):  # from its first moment on, through Python's start and the import of torch
                for pid in started:
                    os.kill(pid, signal.SIGINT)
                time.sleep(0.02)
            assert len([*done, *results]) == len(wanted) == 8
            assert {child.pid for child in multiprocessing.active_children()} == started
        assert capfd.readouterr().err == ""


def test_the_driver_never_imports_torch(task_file):
    program = """
        import sys
        import surefoot, surefoot.cli
        from surefoot.lab import plan, runs, store
        from surefoot.lab.executor import LocalProcesses

        with LocalProcesses(sys.argv[1], workers=1) as pool:
            info, methods = pool.prepare(plan.parse_optimizers("srprop"), (0.1,))
            wanted = plan.specs(info, methods, 1, [0])
            pool.estimate(wanted)
            (result,) = pool.run([wanted])
        assert result.status == "finished"
        assert "torch" not in sys.modules
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), task_file()], check=True, timeout=120)
