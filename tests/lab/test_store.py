"""The store keeps exactly what was saved, from several processes, and says in a sentence why it cannot."""

import json
import math
import multiprocessing
import sqlite3
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event

from surefoot.lab.errors import UserError
from surefoot.lab.runs import RunResult, RunSpec, SearchSpec, Trial
from surefoot.lab.store import SCHEMA, Store

SPEC = RunSpec(
    task="digits",
    task_version="abc",
    optimizer="srprop",
    settings={"window": 50, "etas": (0.5, 1.2), "undo": "exact", "amsgrad": False, "seed": None},
    rate=1e-2,
    batch_size=100,
    epochs=2,
    seed=0,
)
RESULT = RunResult(
    spec=SPEC,
    status="finished",
    patterns=[1437, 2874],
    train_loss=[2.1, 1 / 3],
    validation_loss=[1.9, 0.1 + 0.2],
    validation_metric=[0.25, 0.9],
    rate_mean=[1e-2, 5e-324],
    rate_std=[0.0, 1.5],
    rate_min=[1e-6, 1e-6],
    rate_max=[50.0, 1.7976931348623157e308],
    steps=30,
    seconds=1.25,
    step_seconds=0.003,
    environment={"torch": "2.6.0", "threads": 1, "cuda": None, "deterministic": True},
)


def run(seed=0, **changes):
    return replace(RESULT, spec=replace(SPEC, seed=seed), **changes)


def sentence(caught):
    text = str(caught.value)
    assert "\n" not in text
    assert text.endswith(".")
    return text


@pytest.fixture
def path(tmp_path):
    return tmp_path / "runs.sqlite"


class TestRoundTrip:
    def test_every_field_comes_back_equal(self, path):
        with Store(path) as store:
            store.save(RESULT)
        with Store(path) as store:
            assert store.load([SPEC.key]) == {SPEC.key: RESULT}

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///{path}", "{path}", "sqlite+pysqlite:///{path}"])
    def test_urls(self, path, url):
        with Store(url.format(path=path)) as store:
            store.save(RESULT)
            assert store.all() == [RESULT]

    @pytest.mark.parametrize("value", [math.inf, -math.inf, (1e-6, math.inf)])
    def test_an_infinite_setting_is_valid_json_and_comes_back(self, path, value):
        result = replace(RESULT, spec=replace(SPEC, settings={"step_sizes": value}))
        with Store(path) as store:
            store.save(result)
            assert store.load([result.spec.key])[result.spec.key] == result
        (record,) = sqlite3.connect(path).execute("select record from surefoot_runs").fetchone()
        json.loads(record, parse_constant=lambda text: pytest.fail(f"{text} is no JSON"))

    def test_a_diverged_run_has_short_curves_and_counts(self, path):
        diverged = run(
            status="diverged", patterns=[], train_loss=[], validation_loss=[], validation_metric=[]
        )
        with Store(path) as store:
            store.save(diverged)
            assert store.all() == [diverged]

    curve = st.lists(st.floats(allow_nan=False), max_size=4)
    scalar = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(2**62), 2**62),
        st.floats(allow_nan=False),
        st.text(max_size=5),
    )

    @given(
        settings=st.dictionaries(
            st.text(max_size=5), st.one_of(scalar, st.lists(scalar, max_size=3).map(tuple))
        ),
        curve=curve,
        rate=st.floats(allow_nan=False, allow_infinity=False),
        seed=st.integers(0, 2**62),
        environment=st.dictionaries(st.text(max_size=5), scalar, max_size=3),
    )
    def test_whatever_the_numbers_and_names(self, settings, curve, rate, seed, environment):
        spec = replace(SPEC, settings=settings, rate=rate, seed=seed)
        result = replace(RESULT, spec=spec, train_loss=curve, environment=environment)
        with Store("sqlite://") as store:
            store.save(result)
            assert store.load([spec.key]) == {spec.key: result}
            assert next(iter(store.load([spec.key]).values())).spec.key == spec.key


class TestQueries:
    def test_keys_contains_and_load_know_only_what_is_there(self, path):
        with Store(path) as store:
            store.save(run(0))
            store.save(run(1))
            known, other, unknown = run(0).spec.key, run(1).spec.key, run(2).spec.key
            assert store.keys() == {known, other}
            assert store.keys([known, unknown]) == {known}
            assert known in store
            assert unknown not in store
            assert store.load([known, unknown]) == {known: run(0)}
            assert store.load([]) == {}

    def test_more_keys_than_a_query_can_carry(self, path):
        runs = [run(seed) for seed in range(1203)]
        with Store(path) as store:
            for result in runs[::400]:
                store.save(result)
            assert store.keys(result.spec.key for result in runs) == {
                result.spec.key for result in runs[::400]
            }

    def test_all_of_one_task(self, path):
        other = replace(RESULT, spec=replace(SPEC, task="mnist"))
        with Store(path) as store:
            store.save(other)
            store.save(RESULT)
            assert store.all("mnist") == [other]
            assert store.all("digits") == [RESULT]
            assert store.all("regression") == []
            assert len(store.all()) == 2

    def test_the_columns_one_filters_by(self, path):
        with Store(path) as store:
            store.save(run(3))
        row = (
            sqlite3.connect(path)
            .execute("select key, task, optimizer, rate, seed, status from surefoot_runs")
            .fetchone()
        )
        assert row == (run(3).spec.key, "digits", "srprop", 1e-2, 3, "finished")


class TestSaving:
    def test_the_same_key_twice_keeps_the_first(self, path):
        with Store(path) as store:
            store.save(RESULT)
            store.save(replace(RESULT, seconds=99.0))
            assert store.all() == [RESULT]

    def test_an_unfinished_run_is_never_stored(self, path):
        with Store(path) as store:
            with pytest.raises(ValueError, match="running"):
                store.save(replace(RESULT, status="running"))
            assert store.keys() == set()

    def test_opening_and_reading_write_nothing(self, tmp_path):
        path = tmp_path / "out" / "runs.sqlite"
        with Store(path) as store:
            assert store.keys() == set()
            assert store.load([SPEC.key]) == {}
            assert SPEC.key not in store
        assert list(tmp_path.iterdir()) == []

    def test_create_makes_the_folder_and_an_empty_store(self, tmp_path):
        path = tmp_path / "out" / "runs.sqlite"
        with Store(path) as store:
            store.create()
            store.create()
        with Store(path) as store:
            assert store.keys() == set()
        assert sqlite3.connect(path).execute("select version from surefoot_schema").fetchall() == [(SCHEMA,)]

    def test_a_failure_in_the_middle_leaves_all_or_nothing(self, path):
        with Store(path) as store:
            store.save(run(0))

            def fail(*args):
                raise KeyboardInterrupt

            event.listen(store._engine, "after_cursor_execute", fail)
            with pytest.raises(KeyboardInterrupt):
                store.save(run(1))
            event.remove(store._engine, "after_cursor_execute", fail)
            assert store.all() == [run(0)]
            store.save(run(1))  # and no lock is left behind
        with Store(path) as store:
            assert store.all() == [run(0), run(1)]

    def test_a_store_made_meanwhile_by_someone_else_is_seen(self, path):
        with Store(path) as early, Store(path) as other:
            other.save(run(0))
            assert early.keys() == {run(0).spec.key}
            early.save(run(1))
            assert len(other.all()) == 2


def _write(path, seeds, start):
    start.wait()
    with Store(path, timeout=60) as store:
        for seed in seeds:
            store.save(run(seed))


class TestProcesses:
    def write_together(self, path, *shares):
        context = multiprocessing.get_context("spawn")
        start = context.Barrier(len(shares))
        writers = [context.Process(target=_write, args=(path, share, start)) for share in shares]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0] * len(shares)
        with Store(path) as store:
            return [result.spec.seed for result in store.all()]

    def test_two_processes_make_and_fill_one_store(self, path):
        assert self.write_together(path, range(0, 60, 2), range(1, 60, 2)) == list(range(60))

    def test_two_processes_save_the_same_runs(self, path):
        assert self.write_together(path, range(30), range(30)) == list(range(30))


SEARCH = SearchSpec(
    task="digits",
    task_version="abc",
    optimizer="srprop",
    settings={"window": 50, "step_sizes": (1e-6, math.inf)},
    space={"rate": {"low": 1e-5, "high": 0.1, "log": True}},
    sampler="tpe",
    epochs=2,
    seeds=5,
    halving=3,
)
SETTINGS = [{"rate": 10.0**-i, "betas": (0.9, 0.1 + 0.2), "undo": None} for i in range(4)]


def _begin(path, settings, start):
    start.wait()
    with Store(path, timeout=60) as store:
        for setting in settings:
            store.begin_trials(SEARCH, [setting], 1, most=30)


class TestTrials:
    def test_they_come_back_as_they_were_begun(self, path):
        with Store(path) as store:
            assert store.trials(SEARCH) == []
            store.begin_trials(SEARCH, SETTINGS[:2], 1, most=10)
            store.begin_trials(SEARCH, SETTINGS[2:], 2, most=10)
        with Store(path) as store:
            expected = [Trial(i, setting, 1 if i < 2 else 2) for i, setting in enumerate(SETTINGS)]
            assert store.trials(SEARCH) == expected
            assert [trial.digest for trial in store.trials(SEARCH)] == [trial.digest for trial in expected]

    def test_no_setting_twice_and_no_more_than_wanted(self, path):
        with Store(path) as store:
            store.begin_trials(SEARCH, [SETTINGS[0], SETTINGS[0], SETTINGS[1]], 1, most=10)
            store.begin_trials(SEARCH, SETTINGS, 1, most=3)
            assert [trial.setting for trial in store.trials(SEARCH)] == SETTINGS[:3]

    def test_searches_have_nothing_to_do_with_each_other(self, path):
        other = replace(SEARCH, seeds=6)
        with Store(path) as store:
            store.begin_trials(SEARCH, SETTINGS[:1], 1, most=10)
            store.begin_trials(other, SETTINGS, 1, most=10)
            assert len(store.trials(SEARCH)) == 1
            assert len(store.trials(other)) == 4

    @pytest.mark.parametrize(
        "change",
        [
            {"task_version": "abd"},
            {"optimizer": "adam"},
            {"settings": {"window": 51}},
            {"space": {"rate": {"low": 1e-5, "high": 0.2, "log": True}}},
            {"sampler": "gp"},
            {"epochs": 3},
            {"seeds": 4},
            {"halving": None},
        ],
    )
    def test_a_search_is_known_by_all_that_decides_it(self, change):
        assert replace(SEARCH, **change).key != SEARCH.key

    def test_what_is_decided_first_holds(self, path):
        with Store(path) as store:
            store.begin_trials(SEARCH, SETTINGS, 1, most=10)
            first, second, third, _ = store.trials(SEARCH)
            store.grant(SEARCH, first, 2)
            store.prune(SEARCH, first)  # too late: it goes on
            store.prune(SEARCH, second)
            store.grant(SEARCH, second, 2)  # too late: it is given up
            store.grant(SEARCH, third, 2)
            store.grant(SEARCH, store.trials(SEARCH)[2], 5)
            assert [(trial.seeds, trial.pruned) for trial in store.trials(SEARCH)] == [
                (2, False),
                (1, True),
                (5, False),
                (1, False),
            ]

    def test_processes_number_them_without_a_gap_or_a_double(self, path):
        with Store(path) as store:
            store.create()
        context = multiprocessing.get_context("spawn")
        start = context.Barrier(2)
        shares = [[{"rate": float(i)} for i in range(first, first + 20)] for first in (0, 10)]
        beginners = [context.Process(target=_begin, args=(path, share, start)) for share in shares]
        for beginner in beginners:
            beginner.start()
        for beginner in beginners:
            beginner.join()
        with Store(path) as store:
            trials = store.trials(SEARCH)
        assert [trial.number for trial in trials] == list(range(30))
        assert {trial.setting["rate"] for trial in trials} == set(range(30))


class TestOlder:
    @pytest.fixture
    def old(self, path):
        """A store from before there were searches."""
        with Store(path) as store:
            store.save(run(0))
        with sqlite3.connect(path) as connection:
            for table in ("surefoot_searches", "surefoot_trials", "surefoot_leases"):
                connection.execute(f"drop table {table}")
        return path

    def test_it_is_read_without_a_change(self, old):
        before = old.read_bytes()
        with Store(old) as store:
            assert store.all() == [run(0)]
            assert store.trials(SEARCH) == []
        assert old.read_bytes() == before

    @pytest.mark.parametrize(
        "write",
        [
            lambda store: store.create(),
            lambda store: store.save(run(1)),
            lambda store: store.begin_trials(SEARCH, SETTINGS, 1, 10),
            lambda store: store.take(["key"], "me", 1.0),
        ],
    )
    def test_writing_adds_what_it_lacks(self, old, write):
        with Store(old) as store:
            write(store)
            store.begin_trials(SEARCH, SETTINGS, 1, most=10)
            assert run(0) in store.all()
            assert len(store.trials(SEARCH)) == 4


class TestAdding:
    @pytest.fixture
    def other(self, tmp_path):
        with Store(tmp_path / "other.sqlite") as other:
            yield other

    def test_runs_come_over_as_they_are_and_each_once(self, path, other):
        with Store(path) as store:
            for seed in range(3):
                store.save(run(seed))
            for seed in range(2, 1203, 300):
                other.save(run(seed, seconds=9.0))
            store.add(other)
            store.add(other)
            assert [(r.spec.seed, r.seconds) for r in store.all()] == [
                (0, 1.25), (1, 1.25), (2, 1.25), (302, 9.0), (602, 9.0), (902, 9.0), (1202, 9.0),
            ]  # fmt: skip
            times = "select key, saved from surefoot_runs where seed > 2 order by key"
            here, there = (sqlite3.connect(s._file).execute(times).fetchall() for s in (store, other))
            assert here == there
            assert len(other.all()) == 5

    def test_trials_of_one_search_are_put_together(self, path, other):
        with Store(path) as store:
            store.begin_trials(SEARCH, SETTINGS[:3], 1, most=10)
            other.begin_trials(SEARCH, SETTINGS[1:], 1, most=10)
            store.prune(SEARCH, store.trials(SEARCH)[1])
            other.grant(SEARCH, other.trials(SEARCH)[0], 5)  # the same setting: there it went on
            store.grant(SEARCH, store.trials(SEARCH)[2], 2)
            other.prune(SEARCH, other.trials(SEARCH)[2])
            store.add(other)
            store.add(other)
            assert store.trials(SEARCH) == [
                Trial(0, SETTINGS[0], 1),
                Trial(1, SETTINGS[1], 5),
                Trial(2, SETTINGS[2], 2),
                Trial(3, SETTINGS[3], 1, pruned=True),
            ]

    def test_a_search_that_is_new_comes_over_whole(self, path, other):
        other.begin_trials(SEARCH, SETTINGS, 1, most=10)
        with Store(path) as store:
            store.add(other)
            assert store.trials(SEARCH) == other.trials(SEARCH)

    def test_leases_stay_where_they_are(self, path, other):
        other.take([SPEC.key], "someone", 60.0)
        with Store(path) as store:
            store.add(other)
            assert store.take([SPEC.key], "me", 60.0) == {SPEC.key}


class TestRefusals:
    @pytest.mark.parametrize(
        "content", [b"hello", b"not a database, but long enough to have a header\n" * 100]
    )
    def test_a_file_that_is_no_database(self, path, content):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            Store(path)
        assert "no SQLite database" in sentence(caught)
        assert str(path) in sentence(caught)
        assert path.read_bytes() == content

    def test_an_empty_file_is_an_empty_store(self, path):
        path.touch()
        with Store(path) as store:
            assert store.keys() == set()
            store.save(RESULT)
            assert store.all() == [RESULT]

    def test_a_damaged_database(self, path):
        with Store(path) as store:
            for seed in range(50):
                store.save(run(seed))
        content = path.read_bytes()
        path.write_bytes(content[:4096] + b"\xff" * (len(content) - 4096))
        with pytest.raises(UserError) as caught, Store(path) as store:
            store.all()
        assert "damaged" in sentence(caught)

    def test_a_record_that_was_tampered_with(self, path):
        with Store(path) as store:
            store.save(RESULT)
            with sqlite3.connect(path) as connection:
                connection.execute("update surefoot_runs set record = '{\"spec\": {}}'")
            with pytest.raises(UserError) as caught:
                store.all()
        assert SPEC.key in sentence(caught)

    def test_a_locked_database_on_opening(self, path):
        with Store(path) as store:
            store.save(RESULT)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("begin exclusive")
        with pytest.raises(UserError) as caught:
            Store(path, timeout=0.05)
        assert "locked by another program" in sentence(caught)
        holder.close()
        with Store(path) as store:
            assert store.all() == [RESULT]

    def test_a_lock_against_writing_is_found_before_any_run(self, path):
        with Store(path) as store:
            store.save(RESULT)
        holder = sqlite3.connect(path, isolation_level=None)
        holder.execute("begin immediate")
        with Store(path, timeout=0.05) as store:
            assert SPEC.key in store  # reading is possible
            with pytest.raises(UserError) as caught:
                store.create()
            assert "locked by another program" in sentence(caught)

    def test_a_lock_that_comes_later_costs_one_save_and_nothing_else(self, path):
        with Store(path, timeout=0.05) as store:
            store.save(run(0))
            holder = sqlite3.connect(path, isolation_level=None)
            holder.execute("begin exclusive")
            with pytest.raises(UserError) as caught:
                store.save(run(1))
            assert "locked" in sentence(caught)
            holder.execute("rollback")
            store.save(run(1))
            assert store.all() == [run(0), run(1)]

    @pytest.mark.parametrize("version", [SCHEMA + 1, SCHEMA - 1])
    def test_another_schema(self, path, version):
        with Store(path) as store:
            store.save(RESULT)
        with sqlite3.connect(path) as connection:
            connection.execute("update surefoot_schema set version = ?", [version])
        with pytest.raises(UserError) as caught:
            Store(path)
        assert f"schema {version}" in sentence(caught)

    def test_a_table_of_the_same_name_from_elsewhere(self, path):
        with sqlite3.connect(path) as connection:
            connection.execute("create table surefoot_runs (x)")
        with pytest.raises(UserError) as caught:
            Store(path)
        assert "surefoot_runs" in sentence(caught)

    def test_other_tables_in_the_same_database_are_left_alone(self, path):
        with sqlite3.connect(path) as connection:
            connection.execute("create table mine (x)")
            connection.execute("insert into mine values (1)")
        with Store(path) as store:
            store.save(RESULT)
            assert store.all() == [RESULT]
        assert sqlite3.connect(path).execute("select x from mine").fetchall() == [(1,)]

    def test_a_full_disk_keeps_what_was_stored(self, path):
        with Store(path) as store:
            store.save(run(0))

            def limit(connection):
                connection.exec_driver_sql("PRAGMA max_page_count = 1")  # that is: not a page more

            event.listen(store._engine, "begin", limit)
            with pytest.raises(UserError) as caught:  # noqa: PT012 - whichever of them fills the last page
                for seed in range(1, 100):
                    store.save(run(seed))
            assert "disk is full" in sentence(caught)
        with Store(path) as store:
            kept = store.all()
        assert kept == [run(seed) for seed in range(len(kept))]
        assert kept

    def test_a_folder_instead_of_a_file(self, tmp_path):
        with pytest.raises(UserError) as caught:
            Store(tmp_path)
        assert "is a folder" in sentence(caught)

    def test_a_file_where_a_folder_is_wanted(self, tmp_path):
        (tmp_path / "file").touch()
        with Store(tmp_path / "file" / "runs.sqlite") as store, pytest.raises(UserError) as caught:
            store.create()
        assert "folder" in sentence(caught)

    def test_a_read_only_database(self, path):
        with Store(path) as store:
            store.save(RESULT)
        with Store(f"sqlite:///file:{path}?mode=ro&uri=true") as store:
            assert store.all() == [RESULT]
            with pytest.raises(UserError) as caught:
                store.create()
        assert "read-only" in sentence(caught)

    @pytest.mark.parametrize(
        ("url", "names"),
        [
            ("", "empty"),
            ("nosuchdatabase://x", "does not know"),
            ("://", "no database URL"),
            ("postgresql://user:hunter2@host:port/name", "no database URL"),
        ],
    )
    def test_urls_that_lead_nowhere(self, url, names):
        with pytest.raises(UserError) as caught:
            Store(url)
        assert names in sentence(caught)
        assert "hunter2" not in sentence(caught)

    def test_a_missing_driver_is_named_and_the_password_is_not(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "psycopg2", None)
        with pytest.raises(UserError) as caught:
            Store("postgresql+psycopg2://user:hunter2@host/name")
        assert "psycopg2" in sentence(caught)
        assert "hunter2" not in sentence(caught)


@pytest.mark.parametrize(
    ("url", "lasting"),
    [
        (":memory:", False),
        ("sqlite://", False),
        ("sqlite:///:memory:", False),
        pytest.param(
            "sqlite:///file:x?mode=memory&uri=true",
            False,
            marks=pytest.mark.filterwarnings("ignore:Selection of the SingletonThreadPool"),
        ),
        ("sqlite:///file::memory:?uri=true", False),
        ("runs.sqlite", True),
        ("sqlite:///runs.sqlite", True),
    ],
)
def test_a_store_knows_whether_it_outlives_its_closing(url, lasting, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Store(url) as store:
        assert store.lasting is lasting
