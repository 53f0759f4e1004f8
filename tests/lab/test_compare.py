"""The main job without any training: what is run, kept and said when a comparison goes well, goes wrong or is stopped."""

import io
import os
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from surefoot.lab import compare as module
from surefoot.lab import session
from surefoot.lab.compare import Comparison, compare
from surefoot.lab.errors import UserError
from surefoot.lab.store import Store

ASKED = Comparison(
    task="digits",
    optimizers="sgd,adam[rate=1e-3]",
    rates="1e-2:1e-1",
    seeds=2,
    epochs=3,
    batch=None,
    data=None,
    out=Path("surefoot-out"),
    device="cpu",
    store=None,
    workers=None,
)
RUNS = 6  # sgd at two rates and adam at one, two seeds


def run(asked=ASKED, **options):
    """Exit code, what was printed and what was told on the way."""
    printed, told = io.StringIO(), io.StringIO()
    code = compare(asked, Console(file=printed, width=200), Console(file=told, width=200), **options)
    return code, printed.getvalue(), told.getvalue()


def kept():
    with Store("surefoot-out/runs.sqlite") as store:
        return store.keys()


class TestRunning:
    def test_all_runs_are_made_stored_and_reported(self, script):
        code, printed, _ = run()
        assert code == 0
        assert len(script.ran) == RUNS
        assert kept() == {spec.key for spec in script.ran}
        assert {spec.epochs for spec in script.ran} == {3}
        assert Path("surefoot-out/report.html").stat().st_size > 0
        assert printed.splitlines()[-1] == "Report: surefoot-out/report.html"
        assert script.closed == 1

    def test_within_a_seed_the_longest_run_comes_first(self, script):
        run()
        assert [(spec.seed, spec.optimizer) for spec in script.ran] == [
            (0, "adam"),
            (0, "sgd"),
            (0, "sgd"),
            (1, "adam"),
            (1, "sgd"),
            (1, "sgd"),
        ]

    def test_what_is_stored_is_never_run_again(self, script):
        run()
        code, printed, _ = run()
        assert code == 0
        assert len(script.ran) == RUNS
        assert len(script.estimated) == 1
        assert f"{RUNS} runs, {RUNS} of them in surefoot-out/runs.sqlite already." in printed

    def test_no_more_is_taken_at_a_time_than_keeps_the_workers_busy(self, script, monkeypatch):
        monkeypatch.setattr(session, "SHARE", 5.0)  # for each of two workers; adam takes 10 s and sgd 5 s
        leased = []

        def count():
            with sqlite3.connect("surefoot-out/runs.sqlite") as connection:
                leased.extend(connection.execute("select count(*) from surefoot_leases").fetchone())

        script.before = dict.fromkeys(range(RUNS), count)
        assert run()[0] == 0
        assert leased == [1, 2, 1, 1, 2, 1]
        assert len(kept()) == RUNS

    def test_only_what_is_new_is_run(self, script):
        run()
        run(replace(ASKED, seeds=3))
        assert [spec.seed for spec in script.ran[RUNS:]] == [2, 2, 2]

    def test_another_version_of_the_task_is_run_anew(self, script):
        run()
        script.version = "v2"
        run()
        assert len(script.ran) == 2 * RUNS

    def test_the_tasks_own_epochs_where_none_are_asked_for(self, script):
        run(replace(ASKED, epochs=None))
        assert {spec.epochs for spec in script.ran} == {4}
        assert "--epochs 4" in Path("surefoot-out/report.html").read_text()

    def test_a_batch_size_is_for_the_optimizers_that_set_none(self, script):
        run(replace(ASKED, optimizers="sgd,adam[batch=7,rate=1]", batch=50))
        assert {(spec.optimizer, spec.batch_size) for spec in script.ran} == {("sgd", 50), ("adam", 7)}

    def test_optimizers_with_the_same_settings_share_runs_and_it_is_said(self, script):
        _, printed, _ = run(replace(ASKED, optimizers="adam,adam[eps=1e-8]"))
        assert len(script.ran) == 4
        assert "the settings of adam: they share their runs" in printed

    def test_the_report_does_not_show_the_stores_password(self, script, monkeypatch):
        opened = Store("runs.sqlite")
        opened.name = "postgresql://me:***@host/runs"
        monkeypatch.setattr(session, "Store", lambda url: opened)
        run(replace(ASKED, store="postgresql://me:hunter2@host/runs"))
        assert "hunter2" not in Path("surefoot-out/report.html").read_text()


class TestDryRun:
    def test_it_says_what_and_how_long_and_writes_nothing(self, script, tmp_path):
        code, printed, _ = run(dry_run=True)
        assert code == 0
        assert script.ran == []
        assert list(tmp_path.iterdir()) == []
        assert f"{RUNS} runs, 0 of them" in printed
        assert "would take about 20 s" in printed  # 2 x 10 s + 4 x 5 s on two workers
        assert "adam[rate=1e-3]" in printed

    def test_it_counts_what_is_there(self, script):
        run()
        before = Path("surefoot-out/runs.sqlite").read_bytes()
        _, printed, _ = run(replace(ASKED, seeds=4), dry_run=True)
        assert f"{2 * RUNS} runs, {RUNS} of them" in printed
        assert f"The {RUNS} runs to do would take about 20 s." in printed
        assert Path("surefoot-out/runs.sqlite").read_bytes() == before


class TestStopping:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_an_interruption_keeps_what_is_finished_and_the_command_goes_on(self, script, number, code):
        script.before[2] = lambda: signal.raise_signal(number)
        returned, printed, told = run()
        assert returned == code
        assert len(kept()) == 2
        assert f"2 of {RUNS} runs are kept in surefoot-out/runs.sqlite" in told
        assert told.splitlines()[-1].strip() == ASKED.command()
        assert "Report" not in printed
        assert script.closed == 1
        assert run()[0] == 0
        assert len(script.ran) == RUNS

    def test_a_signal_while_a_run_is_stored_does_not_lose_it(self, script, monkeypatch):
        save = Store.save

        def interrupted(store, result):
            signal.raise_signal(signal.SIGINT)
            save(store, result)

        monkeypatch.setattr(Store, "save", interrupted)
        assert run()[0] == 130
        assert len(kept()) == 1

    def test_interrupted_before_anything_was_known(self, script, monkeypatch):
        monkeypatch.setattr(module, "specs", lambda *args: signal.raise_signal(signal.SIGINT))
        code, _, told = run()
        assert code == 130
        assert "nothing was trained" in told
        assert not Path("surefoot-out").exists()

    def test_a_failing_run_keeps_the_finished_ones_and_says_so(self, script):
        def fail():
            raise UserError("adam at rate 0.001, seed 1: out of memory.")

        script.before[3] = fail
        with pytest.raises(UserError) as caught:
            run()
        assert str(caught.value) == (
            "adam at rate 0.001, seed 1: out of memory (3 runs finished before that and kept in surefoot-out/runs.sqlite)."
        )
        assert len(kept()) == 3
        assert script.closed == 1

    def test_a_store_that_fails_on_the_way_keeps_what_it_has(self, script, monkeypatch):
        save = Store.save

        def full(store, result):
            if len(store.keys()) == 4:
                raise UserError("The store is full.")
            save(store, result)

        monkeypatch.setattr(Store, "save", full)
        with pytest.raises(UserError, match=r"The store is full \(4 runs finished before"):
            run()
        assert len(kept()) == 4

    def test_a_report_that_cannot_be_written_in_the_end(self, script):
        script.before[RUNS - 1] = lambda: Path("surefoot-out/report.html").mkdir()
        with pytest.raises(UserError) as caught:
            run()
        assert str(caught.value).startswith("The report cannot be written to 'surefoot-out/report.html': ")
        assert str(caught.value).endswith(" (every run is kept in surefoot-out/runs.sqlite).")
        assert len(kept()) == RUNS


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"seeds": 0}, "--seeds is 0"),
            ({"seeds": -1}, "--seeds is -1"),
            ({"epochs": 0}, "--epochs is 0"),
            ({"epochs": -3}, "--epochs is -3"),
            ({"batch": 0}, "--batch is 0"),
            ({"workers": 0}, "--workers is 0"),
            ({"workers": 13}, "--workers is 13; it may be at most 12 here, 4 per usable core."),
            ({"device": "gpu"}, "cpu or cuda"),
            ({"device": "cuda:x"}, "cpu or cuda"),
            ({"data": Path("nowhere")}, "nowhere"),
            ({"data": Path("file")}, "no folder"),
            ({"out": Path("file")}, "no folder"),
            ({"out": Path("file/deeper/still")}, "no folder"),
        ],
    )
    def test_options_out_of_range(self, tmp_path, monkeypatch, change, names):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(session, "usable_cores", lambda: 3)
        Path("file").touch()
        with pytest.raises(UserError) as caught:
            replace(ASKED, **change)
        assert names in str(caught.value)

    def test_many_workers_to_a_core_but_not_too_many(self, monkeypatch):
        monkeypatch.setattr(session, "usable_cores", lambda: 3)
        assert replace(ASKED, workers=12).workers == 12

    def test_a_folder_in_the_reports_place_is_told_before_anything_is_trained(self, tmp_path):
        (tmp_path / "report.html").mkdir()
        with pytest.raises(UserError, match=r"report\.html', which is a folder\.$"):
            replace(ASKED, out=tmp_path)

    def test_a_folder_that_may_not_be_written(self, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: False)  # whoever runs the tests, root included
        with pytest.raises(UserError, match="may not be written"):
            replace(ASKED, out=tmp_path / "out")

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"optimizers": "adam["}, "']'"),
            ({"rates": ""}, "--rates"),
            ({"rates": "1:0.1"}, "is empty"),
            ({"store": "file"}, "no SQLite database"),
            ({"store": "."}, "is a folder"),
            ({"store": ":memory:"}, "give --store a file"),
            ({"store": "sqlite://"}, "give --store a file"),
            ({"seeds": 99_999_999}, "has 299,999,997 runs and may have at most"),
        ],
    )
    def test_what_is_cheap_to_know_is_told_before_any_worker_starts(self, script, change, names):
        Path("file").write_text("no database at all")
        with pytest.raises(UserError, match=names.replace("[", r"\[")):
            run(replace(ASKED, **change))
        assert script.prepared == []
        assert not Path("surefoot-out").exists()
        assert Path("file").read_text() == "no database at all"

    def test_a_store_that_cannot_be_written_is_told_before_any_run(self, script):
        Path("file").touch()
        with pytest.raises(UserError, match="folder"):
            run(replace(ASKED, store="file/runs.sqlite"))
        assert script.estimated == []


class TestCommand:
    def test_the_shortest_one(self):
        words = "surefoot compare digits --optimizers 'sgd,adam[rate=1e-3]' --rates 1e-2:1e-1 --seeds 2 --epochs 3"
        assert ASKED.command() == f"{words} --out surefoot-out"

    def test_everything_that_was_typed_and_nothing_else(self, tmp_path):
        typed = replace(
            ASKED, batch=5, data=tmp_path, out=Path("o o"), device="cuda", store="s.sqlite", workers=3
        )
        added = f"--batch 5 --data {tmp_path} --out 'o o' --device cuda --store s.sqlite --workers 3"
        assert typed.command() == ASKED.command().replace("--out surefoot-out", added)
