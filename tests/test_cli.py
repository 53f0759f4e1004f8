"""The command line: quick to answer, exact in what it passes on, and, run for real, safe to stop at any moment."""

import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from surefoot import __version__, cli
from surefoot.lab import compare as module
from surefoot.lab import sweep as searches
from surefoot.lab.runs import RunResult
from surefoot.lab.store import Store

HEAVY = {
    "torch",
    "numpy",
    "scipy",
    "plotly",
    "sqlalchemy",
    "sklearn",
    "pandas",
    "jinja2",
    "optuna",
    "ray",
    "tensorboard",
    "wandb",
}
TINY = [
    "compare",
    "digits-mlp",
    "--optimizers",
    "sgd,srprop[window=5]",
    "--rates",
    "1e-2:1e-1",
    "--seeds",
    "2",
    "--epochs",
    "1",
]
RUNS = 8


def call(monkeypatch, *arguments):
    """The exit code of the entry point, called here."""
    monkeypatch.setattr(sys, "argv", ["surefoot", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return caught.value.code or 0


def refusal(capsys):
    """The one sentence on standard error."""
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    return line


class TestAnswers:
    @pytest.mark.parametrize(
        "arguments",
        [["--help"], ["compare", "--help"], ["sweep", "--help"], ["merge", "--help"], ["--version"], []],
    )
    def test_nothing_heavy_is_imported_for_an_answer(self, arguments):
        code = (
            "import json, sys\n"
            "import surefoot.cli\n"
            f"sys.argv = ['surefoot', *{arguments!r}]\n"
            "try:\n"
            "    surefoot.cli.main()\n"
            "except SystemExit as end:\n"
            "    assert not end.code, end.code\n"
            "print(json.dumps(sorted(sys.modules)))\n"
        )
        answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        loaded = {name.partition(".")[0] for name in json.loads(answer.stdout.splitlines()[-1])}
        assert loaded & HEAVY == set()
        assert "surefoot" in answer.stdout

    def test_the_help_shows_the_grammar_as_it_is(self, monkeypatch, capsys):
        assert call(monkeypatch, "compare", "--help") == 0
        text = " ".join(capsys.readouterr().out.split())
        assert "name[setting=value,...]" in text
        assert '"adam[rate=1e-3],srprop[etas=0.5:1.2|0.7375:1.2]"' in text
        assert "SUREFOOT_DATA" in text

    def test_version(self, monkeypatch, capsys):
        assert call(monkeypatch, "--version") == 0
        assert capsys.readouterr().out == f"surefoot {__version__}\n"

    def test_as_a_module(self):
        answer = subprocess.run(
            [sys.executable, "-m", "surefoot", "--version"], capture_output=True, text=True, check=True
        )
        assert answer.stdout == f"surefoot {__version__}\n"


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "names"),
        [
            (["compare"], "'task'"),
            (["compar", "digits"], "'compar'"),
            (["compare", "digits", "more"], "more"),
            (["compare", "digits", "--seed", "3"], "--seeds"),
            (["compare", "digits", "--seeds", "many"], "--seeds"),
            (["compare", "digits", "--seeds", "0"], "--seeds is 0"),
            (["compare", "digits", "--epochs", "-1"], "--epochs is -1"),
            (["compare", "digits", "--batch", "0"], "--batch is 0"),
            (["compare", "digits", "--rates", ""], "--rates"),
            (["compare", "digits", "--rates", "1:0.1"], "--rates"),
            (["compare", "digits", "--optimizers", "adam["], "--optimizers"),
            (["compare", "digits", "--device", "tpu"], "--device"),
            (["compare", "digits", "--on", "slurm"], "--on is 'slurm'"),
            (["compare", "digits", "--log", "mlflow"], "--log is 'mlflow'"),
            (["compare", "digits", "--engine", "gpu"], "--engine is 'gpu'"),
            (["compare", "digits", "--store", "nosuch://x"], "nosuch://x"),
            (["sweep"], "'task'"),
            (["sweep", "digits"], "--optimizer"),
            (["sweep", "digits", "--optimizer", "adam", "--sampler", "cma"], "--sampler"),
            (["sweep", "digits", "--optimizer", "adam", "--trials", "0"], "--trials"),
            (["sweep", "digits", "--optimizer", "adam,sgd"], "--optimizer"),
            (["sweep", "digits", "--optimizer", "adam", "--range", "rate"], "--range"),
            (["sweep", "digits", "--optimizer", "adam", "--space", "nowhere.toml"], "--space"),
            (["sweep", "digits", "--optimizer", "adam", "--seeds", "1", "--halving", "3"], "--halving"),
            (["merge"], "store"),
            (["merge", "a.sqlite"], "--into"),
            (["merge", "a.sqlite", "--into", "b.sqlite"], "no store a.sqlite"),
        ],
    )
    def test_a_bad_command_line_is_one_sentence_and_exit_code_2(
        self, monkeypatch, capsys, tmp_path, arguments, names
    ):
        monkeypatch.chdir(tmp_path)
        assert call(monkeypatch, *arguments) == 2
        assert names.lower() in refusal(capsys).lower()
        assert list(tmp_path.iterdir()) == []


class TestPassingOn:
    @pytest.fixture
    def asked(self, monkeypatch, tmp_path):
        """Calls the command line and gives what it asks the laboratory for."""
        monkeypatch.chdir(tmp_path)
        seen = []
        monkeypatch.setattr(
            module, "compare", lambda comparison, *consoles, dry_run: seen.append((comparison, dry_run))
        )

        def ask(*arguments):
            assert call(monkeypatch, *arguments) == 0
            return seen.pop()

        return ask

    def test_the_defaults(self, asked):
        comparison, dry_run = asked("compare", "digits")
        assert comparison.optimizers == "sgd,momentum,adam,srprop,sgd-upd,adam-upd"
        assert comparison.rates == "1e-5:1e1"
        assert (comparison.seeds, comparison.epochs, comparison.batch, comparison.workers) == (
            5,
            None,
            None,
            None,
        )
        assert comparison.store_url == "surefoot-out/runs.sqlite"
        assert comparison.device == "cpu"
        assert not dry_run
        assert asked("compare", "digits", "--dry-run")[1]

    def test_a_command_asks_for_the_same_again(self, asked, tmp_path):
        first, _ = asked(
            "compare", "my task.py:task", "--optimizers", "adam[eps=1e-8|1e-4]", "--rates", "0.1", "--seeds", "3",
            "--epochs", "2", "--batch", "7", "--data", str(tmp_path), "--out", "o", "--device", "cuda:1", "--store",
            "s.sqlite", "--workers", "2", "--on", "ray://head:10001", "--log", "tensorboard,wandb",
            "--engine", "separate",
        )  # fmt: skip
        again, _ = asked(*shlex.split(first.command())[1:])
        assert again == first

    @pytest.fixture
    def swept(self, monkeypatch, tmp_path):
        """The same for searches."""
        monkeypatch.chdir(tmp_path)
        seen = []
        monkeypatch.setattr(
            searches, "sweep", lambda asked, *consoles, dry_run: seen.append((asked, dry_run))
        )

        def ask(*arguments):
            assert call(monkeypatch, *arguments) == 0
            return seen.pop()

        return ask

    def test_the_defaults_of_a_search(self, swept):
        asked, dry_run = swept("sweep", "digits", "--optimizer", "adam")
        assert (asked.optimizer, asked.sampler, asked.trials, asked.seeds) == ("adam", "tpe", None, 5)
        assert (asked.rates, asked.ranges, asked.space, asked.halving, asked.at_once) == (
            None,
            (),
            None,
            None,
            None,
        )
        assert asked.store_url == "surefoot-out/runs.sqlite"
        assert not dry_run
        assert swept("sweep", "digits", "--optimizer", "adam", "--dry-run")[1]

    def test_the_command_of_a_search_asks_for_the_same_again(self, swept, tmp_path):
        first, _ = swept(
            "sweep", "my task.py:task", "--optimizer", "adam[eps=1e-8]", "--sampler", "grid", "--trials", "9", "--seeds",
            "3", "--range", "window=50|600", "--range", "betas.0=0.5:0.9:linear:3", "--rates", "1e-3:1", "--space",
            "my space.toml", "--halving", "3", "--at-once", "4", "--epochs", "2", "--batch", "7", "--data", str(tmp_path),
            "--out", "o", "--device", "cuda:1", "--store", "s.sqlite", "--workers", "2",
        )  # fmt: skip
        again, _ = swept(*shlex.split(first.command())[1:])
        assert again == first

    def test_the_exit_code_of_an_interruption_is_passed_on(self, monkeypatch, tmp_path):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(module, "compare", lambda *args, **options: 130)
        assert call(monkeypatch, "compare", "digits") == 130


def surefoot(*arguments, cwd, **options):
    """A real process, its standard output and error as text."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "surefoot", *arguments],
        cwd=cwd, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def stored(folder):
    path = Path(folder) / "surefoot-out" / "runs.sqlite"
    if not path.exists():
        return {}
    with Store(path) as store:
        return {result.spec.key: result for result in store.all()}


def living(session):
    """The commands of the processes in a session, as Linux tells; zombies are not alive."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            command, _, fields = path.read_text().rpartition(")")
        except OSError:  # it has just ended
            continue
        state, _, _, its_session = fields.split()[:4]
        if int(its_session) == session and state != "Z":
            found.append(command)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny comparison has been made once."""
    folder = tmp_path_factory.mktemp("compared")
    code, out, err = finish(surefoot(*TINY, cwd=folder))
    assert code == 0, err
    (folder / "out.txt").write_text(out)
    (folder / "err.txt").write_text(err)
    return folder


@pytest.mark.slow
class TestForReal:
    """With workers and torch, on scikit-learn's digits."""

    def test_runs_are_stored_a_table_is_printed_and_a_report_written(self, folder):
        out = (folder / "out.txt").read_text()
        results = list(stored(folder).values())
        assert len(results) == RUNS
        assert all(isinstance(result, RunResult) and result.status == "finished" for result in results)
        assert {result.spec.seed for result in results} == {0, 1}
        assert "srprop[window=5]" in out
        assert out.splitlines()[-1] == "Report: surefoot-out/report.html"
        report = (folder / "surefoot-out" / "report.html").read_text()
        assert "srprop[window=5]" in report
        assert str(folder) not in report

    def test_without_a_terminal_nothing_but_text_is_printed(self, folder):
        text = (folder / "out.txt").read_text() + (folder / "err.txt").read_text()
        assert [character for character in text if ord(character) < 32 and character != "\n"] == []

    def test_the_same_command_runs_nothing_again(self, folder):
        before = stored(folder)
        code, out, _ = finish(surefoot(*TINY, cwd=folder))
        assert code == 0
        assert f"{RUNS} runs, {RUNS} of them" in out
        assert stored(folder) == before

    def test_a_dry_run_says_how_much_is_there(self, folder):
        code, out, _ = finish(surefoot(*TINY, "--dry-run", "--out", "elsewhere", cwd=folder))
        assert code == 0
        assert f"{RUNS} runs, 0 of them" in out
        assert "would take about" in out
        assert not (folder / "elsewhere").exists()

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            (["compare", "digitz"], "digits"),
            (["compare", "digits", "--optimizers", "adma"], "adam"),
            (["compare", "digits", "--optimizers", "srprop[windows=5]"], "window"),
            (["compare", "nowhere.py:task"], "nowhere.py"),
            (["compare", "nan.py:task", "--optimizers", "sgd"], "nan"),
            (["compare", "mnist", "--data", "broken"], "train-images"),
        ],
    )
    def test_what_only_a_worker_can_tell_is_one_sentence_and_exit_code_2(self, tmp_path, change, names):
        (tmp_path / "nan.py").write_text(NAN_TASK)
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8b half a file")
        code, out, err = finish(surefoot(*change, "--workers", "1", cwd=tmp_path))
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert len(err.splitlines()) == 1
        assert names in err
        assert not (tmp_path / "surefoot-out").exists()


NAN_TASK = """
import torch
from surefoot.lab.tasks.base import Task

def task():
    data = (torch.zeros(20, 3), torch.zeros(20, 1))
    return Task("nan", lambda: torch.nn.Linear(3, 1), data, data, lambda output, target: output.mean() / 0 * 0)
"""

LONGER = [*TINY[:-1], "10"]
SEARCH = ["sweep", "digits-mlp", "--optimizer", "momentum", "--trials", "4", "--seeds", "2", "--epochs", "10"]


@pytest.mark.slow
class TestStopped:
    """Stopped while it trains: what is finished is kept, nothing of the rest is, and the same command goes on."""

    command = LONGER

    def there(self, out, finished):
        """Whether it said, before it went on, how much was there."""
        return f"{RUNS} runs, {finished} of them" in out

    def stop(self, folder, number, group):
        process = surefoot(*self.command, cwd=folder, start_new_session=True)
        deadline = time.monotonic() + 120
        while not 2 <= len(stored(folder)) < RUNS:
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (os.killpg if group else os.kill)(process.pid, number)
        return process.pid, *finish(process)

    def no_worker_is_left(self, session):
        deadline = time.monotonic() + 20
        while alive := living(session):
            assert time.monotonic() < deadline, alive
            time.sleep(0.1)

    def goes_on(self, folder, finished):
        assert 2 <= len(finished) < RUNS
        code, out, _ = finish(surefoot(*self.command, cwd=folder))
        assert code == 0
        assert self.there(out, len(finished))
        after = stored(folder)
        assert len(after) == RUNS
        assert {key: after[key] for key in finished} == finished

    @pytest.mark.parametrize(
        ("number", "group", "expected"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
    )
    def test_by_a_signal_that_can_be_answered(self, tmp_path, number, group, expected):
        session, code, out, err = self.stop(tmp_path, number, group)
        assert code == expected
        assert "Traceback" not in out + err
        assert "Interrupted" in err
        assert shlex.split(err.splitlines()[-1])[:3] == ["surefoot", *self.command[:2]]
        self.no_worker_is_left(session)
        self.goes_on(tmp_path, stored(tmp_path))

    def test_by_a_kill_that_cannot(self, tmp_path):
        session, code, _, _ = self.stop(tmp_path, signal.SIGKILL, group=False)
        assert code == -signal.SIGKILL
        self.no_worker_is_left(session)
        path = tmp_path / "surefoot-out" / "runs.sqlite"
        assert sqlite3.connect(path).execute("pragma integrity_check").fetchone() == ("ok",)
        self.goes_on(tmp_path, stored(tmp_path))


@pytest.mark.slow
class TestSearchStopped(TestStopped):
    """The same for a search."""

    command = SEARCH

    def there(self, out, finished):
        return f"({finished} runs) in surefoot-out/runs.sqlite already" in out


@pytest.mark.slow
def test_a_search_loads_torch_in_its_workers_only(tmp_path):
    code = (
        "import sys\n"
        "from surefoot import cli\n"
        "sys.argv = ['surefoot', *'sweep digits-mlp --optimizer sgd --sampler gp --trials 12 --seeds 1'.split(),\n"
        "            *'--epochs 1 --workers 1'.split()]\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    program = tmp_path / "program.py"
    program.write_text(f"if __name__ == '__main__':\n{textwrap.indent(code, '    ')}")
    subprocess.run([sys.executable, program], cwd=tmp_path, check=True, timeout=300)
    assert len(stored(tmp_path)) == 12
    assert (tmp_path / "surefoot-out" / "report.html").exists()
