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
from surefoot.lab.runs import RunResult, RunSpec
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
