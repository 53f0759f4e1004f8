"""The job of a search without any training: what is tried, kept and said when it goes well, goes wrong or is stopped."""

import io
import json
import math
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from surefoot.lab import session, spaces
from surefoot.lab.errors import UserError
from surefoot.lab.leases import Leases
from surefoot.lab.merge import merge
from surefoot.lab.mirror import Mirror
from surefoot.lab.report import html
from surefoot.lab.runs import RunResult
from surefoot.lab.store import Store
from surefoot.lab.sweep import Sweep, sweep

ASKED = Sweep(
    task="digits",
    optimizer="sgd",
    sampler="random",
    trials=8,
    at_once=None,
    halving=None,
    rates=None,
    ranges=(),
    space=None,
    seeds=3,
    epochs=2,
    batch=None,
    data=None,
    out=Path("surefoot-out"),
    device="cpu",
    store=None,
    workers=None,
)
GRID = replace(ASKED, sampler="grid", trials=None, rates="1e-3:1e-1", ranges=("window=50|600",))
STORE = "surefoot-out/runs.sqlite"


@pytest.fixture(autouse=True)
def _quick(request, monkeypatch):
    """Neither the page nor the copy for Optuna, but for the tests of them."""
    if not getattr(request.cls, "whole", False):
        monkeypatch.setattr(html, "write_report", lambda study, path, searched: path.touch())
        monkeypatch.setattr(Mirror, "_write", lambda mirror, outcomes: None)


def run(asked=ASKED, **options):
    """Exit code, what was printed and what was told on the way."""
    printed, told = io.StringIO(), io.StringIO()
    code = sweep(asked, Console(file=printed, width=200), Console(file=told, width=200), **options)
    return code, printed.getvalue(), told.getvalue()


def trials(path=STORE):
    """Number, seeds, pruned, by search."""
    query = "select search, number, seeds, pruned from surefoot_trials order by search, number"
    found = {}
    for search, *trial in sqlite3.connect(path).execute(query):
        found.setdefault(search, []).append(tuple(trial))
    return list(found.values())


def kept(path=STORE):
    with Store(path) as store:
        return Counter((run.spec.rate, run.spec.seed) for run in store.all())


class TestSearching:
    def test_every_trial_gets_its_seeds_and_no_run_is_made_twice(self, script):
        code, printed, _ = run()
        assert code == 0
        assert trials() == [[(number, 3, 0) for number in range(8)]]
        assert len(script.ran) == 24 == len(kept())
        assert Counter(Counter(spec.rate for spec in script.ran).values()) == {3: 8}
        assert {spec.epochs for spec in script.ran} == {2}
        assert printed.splitlines()[-1] == "Report: surefoot-out/report.html"
        assert script.closed == 1

    def test_settings_are_tried_a_few_at_a_time(self, script):
        run(replace(ASKED, at_once=2, seeds=1))
        batches = [script.ran[i : i + 2] for i in range(0, 8, 2)]
        assert len({spec.rate for batch in batches for spec in batch}) == 8
        script.ran.clear()
        run(replace(ASKED, at_once=4, seeds=1, optimizer="adam[betas=0.5:0.5]"))
        assert len(script.ran) == 8

    def test_as_many_at_a_time_as_there_are_workers(self, script, monkeypatch):
        monkeypatch.setattr(session, "usable_cores", lambda: 8)
        asked = []
        original = Store.begin_trials
        monkeypatch.setattr(
            Store,
            "begin_trials",
            lambda store, search, settings, seeds, most: (
                asked.append(len(settings)),
                original(store, search, settings, seeds, most),
            ),
        )
        run(replace(ASKED, sampler="tpe", workers=20, trials=30))
        assert asked[0] == 7  # 7 x 3 seeds keep 20 workers busy

    def test_what_is_stored_is_never_run_again(self, script):
        run()
        code, printed, _ = run()
        assert code == 0
        assert len(script.ran) == 24
        assert len(script.estimated) == 1
        assert "8 trials of 3 runs; 8 of them (24 runs) in surefoot-out/runs.sqlite already." in printed

    def test_more_trials_go_on_where_the_search_was(self, script):
        run()
        run(replace(ASKED, trials=11))
        assert len(script.ran) == 33
        assert trials() == [[(number, 3, 0) for number in range(11)]]

    def test_fewer_trials_than_there_are_lose_none(self, script):
        run()
        code, printed, _ = run(replace(ASKED, trials=2))
        assert code == 0
        assert len(script.ran) == 24
        assert "8 trials of 3 runs; 8 of them (24 runs)" in printed

    def test_a_search_by_chance_shares_its_settings_with_one_of_more_seeds(self, script):
        run()
        run(replace(ASKED, seeds=5))
        assert len(trials()) == 2
        assert len(script.ran) == 24 + 16  # two seeds more for each of the eight
        assert {spec.seed for spec in script.ran[24:]} == {3, 4}

    def test_another_version_of_the_task_is_another_search(self, script):
        run()
        script.version = "v2"
        run()
        assert len(trials()) == 2
        assert len(script.ran) == 48

    def test_a_search_goes_by_what_it_finds(self, script):
        script.loss = lambda spec: 1 + (math.log10(spec.rate) + 1) ** 2
        run(replace(ASKED, sampler="tpe", trials=40, seeds=1))
        late = sorted(spec.rate for spec in script.ran[20:])
        assert 0.03 < late[10] < 0.3  # the range is 1e-4 to 10

    def test_batch_sizes_can_be_searched(self, script):
        run(replace(ASKED, ranges=("batch=8:64:log",)))
        sizes = {spec.batch_size for spec in script.ran}
        assert len(sizes) > 3
        assert all(isinstance(size, int) and 8 <= size <= 64 for size in sizes)

    def test_one_batch_size_for_all(self, script):
        run(replace(ASKED, batch=7))
        assert {spec.batch_size for spec in script.ran} == {7}

    def test_what_is_fixed_stays(self, script):
        run(replace(ASKED, optimizer="adam[window=7,betas=0.1:0.2]", ranges=("eps=1e-9:1e-3:log",)))
        assert {spec.settings["betas"] for spec in script.ran} == {(0.1, 0.2)}
        assert {spec.settings["window"] for spec in script.ran} == {7}
        assert len({spec.settings["eps"] for spec in script.ran}) == 8

    def test_a_range_takes_the_place_of_the_optimizers_own(self, script):
        run(replace(ASKED, optimizer="adam", ranges=("rate=2:3", "betas.0=0.1:0.2")))
        assert all(2 <= spec.rate <= 3 and 0.1 <= spec.settings["betas"][0] <= 0.2 for spec in script.ran)
        assert {spec.settings["betas"][1] for spec in script.ran} <= {0.9, 0.99, 0.999}  # its own still

    def test_the_command_line_has_the_last_word(self, script):
        Path("space.toml").write_text("rate = {low = 1, high = 2}\nwindow = [1, 2]")
        run(replace(ASKED, space=Path("space.toml"), ranges=("window=600",)))
        assert {spec.settings["window"] for spec in script.ran} == {600}
        assert all(1 <= spec.rate <= 2 for spec in script.ran)


class TestGrid:
    def test_every_point_once(self, script):
        run(GRID)
        points = Counter((spec.rate, spec.settings["window"]) for spec in script.ran)
        assert points == {(rate, window): 3 for rate in (1e-3, 1e-2, 1e-1) for window in (50, 600)}

    def test_it_can_be_made_in_portions(self, script):
        run(replace(GRID, trials=4))
        assert len(script.ran) == 12
        run(GRID)
        assert len(script.ran) == 18

    def test_no_more_trials_than_points(self, script):
        code, printed, _ = run(replace(GRID, trials=100))
        assert code == 0
        assert "6 trials of 3 runs" in printed
        assert len(script.ran) == 18

    def test_its_runs_are_those_of_a_comparison(self, script):
        run(GRID)
        keys = {spec.key for spec in script.ran}
        run(replace(GRID, sampler="random", trials=6))
        assert {spec.key for spec in script.ran} == keys  # another search, no new run


class TestHalving:
    asked = replace(ASKED, seeds=9, halving=3, trials=9, at_once=9)

    def test_the_best_go_all_the_way_and_the_rest_is_given_up(self, script):
        run(self.asked)
        (found,) = trials()
        assert Counter((seeds, pruned) for _, seeds, pruned in found) == {(1, 1): 6, (3, 1): 2, (9, 0): 1}
        assert len(script.ran) == 9 + 3 * 2 + 6  # instead of 81
        by_rate = sorted({spec.rate for spec in script.ran})
        assert {spec.rate for spec in script.ran if spec.seed == 8} == {by_rate[0]}  # the loss grows with it

    def test_what_was_given_up_stays_so(self, script):
        run(self.asked)
        made = len(script.ran)
        run(self.asked)
        assert len(script.ran) == made

    def test_the_page_shows_only_trials_that_went_as_far(self, script):
        _, printed, _ = run(self.asked)
        assert "alone was run" in printed

    def test_where_all_diverge_there_is_still_a_report(self, script):
        script.loss = lambda spec: math.inf
        code, printed, _ = run(self.asked)
        assert code == 0
        assert "No winner" in printed


class TestDiverged:
    whole = True

    def test_a_trial_with_a_diverged_run_is_a_trial_but_never_the_best(self, script):
        script.loss = lambda spec: math.inf if spec.rate < 1e-1 and spec.seed == 1 else 0.5 + spec.rate
        code, printed, told = run()
        assert code == 0
        assert trials() == [[(number, 3, 0) for number in range(8)]]
        best = min(spec.rate for spec in script.ran if spec.rate >= 1e-1)
        assert f"sgd[rate={best}]" in told.splitlines()[-1]
        assert f"sgd[rate={best}]" in printed
        page = Path("surefoot-out/report.html").read_text()
        assert "diverged in 1 run" in page


class TestDryRun:
    def test_it_says_what_and_how_long_and_writes_nothing(self, script, tmp_path):
        code, printed, _ = run(dry_run=True)
        assert code == 0
        assert script.ran == []
        assert list(tmp_path.iterdir()) == []
        assert "sgd: 1 setting to search by random" in printed
        assert "rate  0.0001 to 10.0, logarithmic" in printed
        assert "8 trials of 3 runs; 0 of them (0 runs)" in printed
        assert "The 24 runs to do would take about 60 s." in printed  # 24 x 5 s on two workers

    def test_it_counts_what_is_there(self, script):
        run()
        before = Path(STORE).read_bytes()
        _, printed, _ = run(replace(ASKED, trials=10), dry_run=True)
        assert "10 trials of 3 runs; 8 of them (24 runs)" in printed
        assert "The 6 runs to do would take about 15 s." in printed
        assert Path(STORE).read_bytes() == before


class TestStopping:
    @pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
    def test_an_interruption_keeps_what_is_finished_and_the_command_goes_on(self, script, number, code):
        script.before[7] = lambda: signal.raise_signal(number)
        returned, printed, told = run()
        assert returned == code
        assert sum(kept().values()) == 7
        assert "7 of 24 runs are kept in surefoot-out/runs.sqlite" in told
        assert told.splitlines()[-1].strip() == ASKED.command()
        assert "Report" not in printed
        assert run()[0] == 0
        assert len(script.ran) == 24
        assert set(kept().values()) == {1}

    @pytest.mark.parametrize("at", [34, 40, 45])
    def test_an_interrupted_search_tries_what_an_uninterrupted_one_does(self, script, at):
        script.loss = lambda spec: 1 + (math.log10(spec.rate) + 1) ** 2
        asked = replace(ASKED, sampler="tpe", trials=20)
        script.before[at] = lambda: signal.raise_signal(signal.SIGINT)
        run(asked)
        run(asked)
        run(replace(asked, store="other.sqlite"))
        assert kept() == kept("other.sqlite")

    def test_a_failing_run_keeps_the_finished_ones_and_says_so(self, script):
        def fail():
            raise UserError("out of memory.")

        script.before[17] = fail
        with pytest.raises(UserError) as caught:
            run()
        assert str(caught.value) == (
            "out of memory (17 runs finished before that and kept in surefoot-out/runs.sqlite)."
        )
        assert sum(kept().values()) == 17

    def test_leases_end_with_the_job_however_it_ends(self, script):
        script.before[3] = lambda: signal.raise_signal(signal.SIGINT)
        run()
        assert sqlite3.connect(STORE).execute("select count(*) from surefoot_leases").fetchone() == (0,)


class TestTogether:
    @pytest.fixture
    def begun(self, script, monkeypatch, tmp_path):
        """A search that was stopped after 5 of its first 15 runs: those that are missing, some of which others are at."""
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        script.before[5] = lambda: signal.raise_signal(signal.SIGINT)
        run(replace(ASKED, at_once=5))
        settings = sqlite3.connect(STORE).execute("select setting from surefoot_trials").fetchall()
        specs = [
            replace(script.ran[0], rate=json.loads(setting)["rate"], seed=seed)
            for (setting,) in settings
            for seed in range(3)
        ]
        with Store(STORE) as store:
            missing = [spec for spec in specs if spec.key not in store]
            assert len(missing) == 10
            yield store, missing

    def test_what_another_process_is_at_is_left_to_it_and_waited_for(self, script, begun, monkeypatch):
        store, missing = begun
        theirs = missing[:4]
        curve = [1.0, 0.5]
        waited = []

        def wait(leases):
            """They finish one after the other."""
            waited.append(len(script.ran))
            spec = theirs[len(waited) - 1]
            rates = [[0.1, 0.1]] * 4
            store.save(RunResult(spec, "finished", [50, 100], curve, curve, [0.1, 0.2], *rates, 10, 1.0, 0.1))

        monkeypatch.setattr(Leases, "wait", wait)
        store.take((spec.key for spec in theirs), "another", 1e6)
        code, _, _ = run()
        assert code == 0
        assert waited == [20, 20, 20, 20]  # not before all the others are done
        assert not {spec.key for spec in script.ran} & {spec.key for spec in theirs}
        assert set(kept().values()) == {1}
        assert len(kept()) == 24

    def test_a_run_of_a_process_that_died_is_taken_over(self, script, begun, tmp_path):
        store, missing = begun
        store.take((spec.key for spec in missing), "deceased", 1e6)
        (tmp_path / "surefoot-deceased").touch()  # nobody has it locked
        assert run()[0] == 0
        assert len(kept()) == 24
        assert not (tmp_path / "surefoot-deceased").exists()

    def test_a_setting_that_another_driver_began_meanwhile_is_not_tried_twice(self, script, monkeypatch):
        begin = Store.begin_trials

        def both(store, search, settings, seeds, most):
            settings = list(settings)
            begin(store, search, settings[:3], seeds, most)
            begin(store, search, settings, seeds, most)

        monkeypatch.setattr(Store, "begin_trials", both)
        run()
        assert trials() == [[(number, 3, 0) for number in range(8)]]
        assert len(script.ran) == 24


class TestReport:
    whole = True

    def test_the_page_has_the_best_trials_and_the_search(self, script):
        run(replace(ASKED, optimizer="adam", trials=12))
        page = Path("surefoot-out/report.html").read_text()
        for text in (
            "The best trials",
            "The search",
            "Every trial",
            "betas.0",
            'id="parallel"',
            'id="contour"',
        ):
            assert text in page
        assert ASKED.command().replace("sgd", "adam").replace("--trials 8", "--trials 12") in page
        assert page.count('<tr>\n<th scope=row data-key="') >= 12

    def test_the_terminal_names_the_best_and_what_flatters_it(self, script):
        _, printed, _ = run()
        best = min(spec.rate for spec in script.ran)
        assert printed[printed.index("No sure") if "No sure" in printed else printed.index("sgd[rate=") :]
        assert f"sgd[rate={best}] " in printed
        assert "The best 5 of 8 trials, chosen on the same seeds" in printed

    def test_the_store_of_the_report_has_no_password(self, script, monkeypatch):
        opened = Store("runs.sqlite")
        opened.name = "postgresql://me:***@host/runs"
        monkeypatch.setattr(session, "Store", lambda url: opened)
        run(replace(ASKED, store="postgresql://me:hunter2@host/runs"))
        assert "hunter2" not in Path("surefoot-out/report.html").read_text()

    def test_nothing_of_optunas_is_said(self, script, capfd):
        run(replace(ASKED, sampler="tpe", trials=15))
        captured = capfd.readouterr()
        assert (captured.out, captured.err) == ("", "")


class TestMirror:
    whole = True

    def study(self):
        import optuna

        storage = optuna.storages.RDBStorage(f"sqlite:///{STORE}")
        (name,) = optuna.get_all_study_names(storage)
        return optuna.load_study(study_name=name, storage=storage)

    def test_optuna_reads_the_trials_from_the_same_database(self, script):
        script.loss = lambda spec: math.inf if spec.rate > 1 else 0.5 + spec.rate + 0.1 * spec.seed
        run(replace(ASKED, optimizer="adam", ranges=("rate=1e-3:10:log", "betas=0.9:0.99|0.8:0.9")))
        study = self.study()
        assert "digits, adam by random, 2 epochs, 3 seeds" in study.study_name
        by_rate = {trial.params["rate"]: trial for trial in study.trials}
        assert by_rate.keys() == {spec.rate for spec in script.ran}
        for rate, trial in by_rate.items():
            assert trial.params["betas"] in ("0.9:0.99", "0.8:0.9")
            if rate > 1:
                assert (trial.state.name, trial.value) == ("FAIL", None)
                assert trial.user_attrs["diverged"] == 3
            else:
                assert trial.state.name == "COMPLETE"
                assert trial.value == pytest.approx(0.6 + rate)
                assert trial.user_attrs["s.d. over seeds"] == pytest.approx(0.1)

    def test_pruned_trials_are_pruned_there(self, script):
        run(TestHalving.asked)
        states = Counter(trial.state.name for trial in self.study().trials)
        assert states == {"PRUNED": 8, "COMPLETE": 1}
        assert {step for t in self.study().trials for step in t.intermediate_values} == {1, 3}

    def test_going_on_adds_to_it(self, script):
        run()
        run(replace(ASKED, trials=11))
        assert [trial.user_attrs["trial"] for trial in self.study().trials] == list(range(11))

    def test_where_it_says_something_else_it_is_written_anew(self, script):
        run()
        study = self.study()
        study.add_trial(study.trials[0])  # as if two drivers had written it
        study.tell(study.ask(), 1.0)  # as a user of the dashboard may
        run()
        assert sorted(trial.user_attrs["trial"] for trial in self.study().trials) == list(range(8))

    def test_that_it_cannot_be_written_is_told_once_and_costs_nothing(self, script, monkeypatch):
        def fail(mirror, outcomes):
            raise RuntimeError("another release's tables.\nmore")

        monkeypatch.setattr(Mirror, "_write", fail)
        code, _printed, told = run()
        assert code == 0
        assert (
            told.count(
                "The copy of the search for optuna-dashboard cannot be written: another release's tables."
            )
            == 1
        )
        assert len(kept()) == 24


class TestMerging:
    def test_two_machines_searches_become_one(self, script):
        run()
        run(replace(ASKED, store="b.sqlite", trials=10))
        said = merge([STORE, "b.sqlite"], "all.sqlite")
        assert said.splitlines() == [
            f"{STORE}: 24 runs, 24 of them new.",
            "b.sqlite: 30 runs, 6 of them new.",
            "all.sqlite: 30 runs.",
        ]
        made = len(script.ran)
        code, printed, _ = run(replace(ASKED, store="all.sqlite", trials=10))
        assert code == 0
        assert len(script.ran) == made
        assert "10 of them (30 runs) in all.sqlite already" in printed

    def test_into_one_of_them(self, script):
        run()
        run(replace(ASKED, store="b.sqlite", trials=10))
        merge(["b.sqlite", STORE], STORE)
        assert len(kept()) == 30

    @pytest.mark.parametrize(
        ("sources", "target", "names"),
        [
            (["nowhere.sqlite"], "all.sqlite", "There is no store nowhere.sqlite to merge."),
            (["text"], "all.sqlite", "no SQLite database"),
            ([STORE], ":memory:", "in memory"),
            ([STORE], ".", "is a folder"),
        ],
    )
    def test_refusals(self, script, sources, target, names):
        run()
        Path("text").write_text("no database at all")
        with pytest.raises(UserError) as caught:
            merge(sources, target)
        assert names in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not Path("all.sqlite").exists()
        assert not Path("nowhere.sqlite").exists()


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"seeds": 0}, "--seeds is 0"),
            ({"trials": 0}, "--trials is 0"),
            ({"at_once": 0}, "--at-once is 0"),
            ({"halving": 1}, "--halving is 1; it must be at least 2"),
            ({"halving": 3, "seeds": 1}, "--halving needs at least 2 seeds"),
            ({"sampler": "cma"}, "tpe, gp, random, grid"),
            ({"device": "tpu"}, "cpu or cuda"),
            ({"data": Path("nowhere")}, "no folder"),
        ],
    )
    def test_options_out_of_range(self, tmp_path, monkeypatch, change, names):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError) as caught:
            replace(ASKED, **change)
        assert names in str(caught.value)

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"optimizer": "sgd,adam"}, "it must be one"),
            ({"optimizer": "adam[window=50|600]"}, "--range window=50|600"),
            ({"optimizer": "adam["}, "--optimizers has a '['"),
            ({"ranges": ("rate",)}, "--range is 'rate'"),
            ({"ranges": ("rate=1:2", "rate=3:4")}, "rate is given two ranges"),
            ({"ranges": ("rate=1:2",), "rates": "0.1"}, "rate is given two ranges"),
            ({"optimizer": "adam[rate=1]", "rates": "0.1"}, "rate is given a value and rate a range"),
            ({"optimizer": "adam[betas=0.9:0.9]", "ranges": ("betas.0=0:1",)}, "betas is given a value"),
            ({"batch": 5, "ranges": ("batch=1|2",)}, "batch is given a value"),
            ({"rates": "1:0.1"}, "is empty"),
            ({"space": Path("nowhere.toml")}, "cannot be read"),
            ({"store": ":memory:"}, "give --store a file"),
        ],
    )
    def test_what_is_cheap_to_know_is_told_before_any_worker_starts(self, script, change, names):
        with pytest.raises(UserError) as caught:
            run(replace(ASKED, **change))
        assert names in str(caught.value)
        assert script.prepared == []
        assert not Path("surefoot-out").exists()

    @pytest.mark.parametrize(
        ("change", "names"),
        [
            ({"trials": 40_000}, "has 120,000 runs and may have at most 100,000"),
            ({"ranges": ("window=1.5:3",)}, "takes whole numbers"),
            ({"ranges": ("undo=0:1",)}, "is no number"),
            ({"ranges": ("betas.5=0:1",)}, "there is betas.0, betas.1"),
            ({"ranges": ("rate=-1:1",)}, "must be a number above 0"),
            ({"ranges": ("batch=0|1",)}, "a whole number of at least 1"),
        ],
    )
    def test_what_the_optimizer_must_be_known_for_is_told_before_anything_is_trained(
        self, script, change, names
    ):
        with pytest.raises(UserError) as caught:
            run(replace(ASKED, **change))
        assert names in str(caught.value)
        assert script.ran == []
        assert not Path("surefoot-out").exists()

    def test_a_grid_of_too_many_points(self, script):
        with pytest.raises(UserError, match="3,000,000 runs"):
            run(replace(GRID, ranges=("eps=1e-9:1:log:1000", "betas.0=0:0.9:1000"), rates="1"))


class TestCommand:
    def test_the_shortest_one(self):
        words = "surefoot sweep digits --optimizer sgd --sampler random --trials 8 --seeds 3 --epochs 2"
        assert ASKED.command() == f"{words} --out surefoot-out"


def test_the_names_of_a_search_are_not_torchs():
    """The driver's side of a search, Optuna's included, without torch."""
    code = (
        "import sys\n"
        "import surefoot.lab.sweep, surefoot.lab.merge, surefoot.lab.report.views\n"
        "from optuna import visualization, importance, storages\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_space_of_an_unknown_optimizer_is_none():
    assert "adm" not in spaces.SPACES
