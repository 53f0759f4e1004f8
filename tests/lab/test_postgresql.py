"""The store in a real PostgreSQL, which several drivers share.

Runs where ``SUREFOOT_TEST_POSTGRESQL`` names a database, such as ``postgresql+psycopg://user:password@127.0.0.1/runs``. Each
test works in a schema of its own there and removes it.
"""

import math
import multiprocessing
import os
import shlex
import signal
import subprocess
import sys
import time
import uuid

import pytest
import sqlalchemy as sa

from surefoot.lab import store as module
from surefoot.lab.errors import UserError
from surefoot.lab.runs import SearchSpec
from surefoot.lab.store import Store

SERVER = os.environ.get("SUREFOOT_TEST_POSTGRESQL")
pytestmark = pytest.mark.skipif(
    SERVER is None, reason="SUREFOOT_TEST_POSTGRESQL names no PostgreSQL database to test with"
)


@pytest.fixture
def server():
    """A connection beside the store's."""
    engine = sa.create_engine(SERVER, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        yield connection
    engine.dispose()


@pytest.fixture
def url(server):
    schema = f"test_{uuid.uuid4().hex}"
    server.execute(sa.schema.CreateSchema(schema))
    here = sa.make_url(SERVER).update_query_dict(
        {"options": f"-csearch_path={schema}", "application_name": schema}
    )
    yield here.render_as_string(hide_password=False)
    server.execute(sa.schema.DropSchema(schema, cascade=True))


def rows(server, url, table="surefoot_runs"):
    schema = sa.make_url(url).query["application_name"]
    return server.scalar(sa.text(f'select count(*) from "{schema}".{table}'))


def disconnect(server, url):
    """Ends every connection of the store's, as a server that is started again does."""
    ended = sa.text("select pg_terminate_backend(pid) from pg_stat_activity where application_name = :name")
    server.execute(ended, {"name": sa.make_url(url).query["application_name"]}).all()


@pytest.fixture
def run(make_run):
    return lambda seed=0, **changes: make_run(0.5, seed=seed, **changes)


def test_everything_comes_back_equal(url, run):
    settings = {"etas": (0.5, 1.2), "limit": math.inf, "growth": None, "undo": "exact"}
    results = [
        run(0, settings=settings, rate=5e-324),
        run(2**62, settings=settings),
        run(1, optimizer="srprop"),
    ]
    with Store(url) as store:
        assert store.keys() == set()
        assert store.lasting
        for result in results:
            store.save(result)
            store.save(result)
    with Store(url) as store:
        assert store.load(r.spec.key for r in results) == {r.spec.key: r for r in results}
        assert sorted(r.spec.seed for r in store.all("made-up")) == [0, 1, 2**62]
        assert store.all("another") == []


def test_opening_makes_nothing(url, server):
    with Store(url) as store:
        assert store.keys() == set()
        assert not store.exists
    assert sa.inspect(server).get_table_names(sa.make_url(url).query["application_name"]) == []


def test_stores_of_both_kinds_come_together(url, run, tmp_path):
    with Store(url) as store, Store(tmp_path / "runs.sqlite") as file:
        for seed in range(600):  # more than one query's worth
            (store if seed % 3 else file).save(run(seed))
        store.save(run(0))
        file.add(store)
        store.add(file)
        assert {r.spec.seed for r in store.all()} == {r.spec.seed for r in file.all()} == set(range(600))


def test_the_trials_of_a_search(url):
    space = {"rate": {"kind": "float", "low": 1e-4, "high": 1.0, "log": True}}
    search = SearchSpec("made-up", "v1", "adam", {"eps": 1e-8}, space, "random", 2, 3, None)
    with Store(url) as store, Store(url) as other:
        store.begin_trials(search, [{"rate": 0.1}, {"rate": 0.01}], 1, most=3)
        other.begin_trials(search, [{"rate": 0.01}, {"rate": 1.0}, {"rate": 0.5}], 1, most=3)
        first, second, third = store.trials(search)
        assert [t.setting for t in (first, second, third)] == [{"rate": 0.1}, {"rate": 0.01}, {"rate": 1.0}]
        store.grant(search, first, 3)
        other.prune(search, first)  # decided already
        other.prune(search, second)
        assert [(t.seeds, t.pruned) for t in store.trials(search)] == [(3, False), (1, True), (1, False)]


def _drive(url, results, begin):
    """One of several drivers that all store the same runs."""
    begin.wait()
    with Store(url) as store:
        for result in results:
            taken = store.take([result.spec.key], str(os.getpid()), 60.0)
            if taken:
                store.save(result)


@pytest.mark.slow
def test_drivers_that_begin_at_once_make_each_run_once(url, run, server):
    results = [run(seed) for seed in range(60)]
    context = multiprocessing.get_context("spawn")
    begin = context.Event()
    drivers = [
        context.Process(target=_drive, args=(url, results[i:] + results[:i], begin)) for i in (0, 20, 40)
    ]
    for driver in drivers:
        driver.start()
    begin.set()  # on an empty database: all find the tables missing
    for driver in drivers:
        driver.join(300)
    assert [driver.exitcode for driver in drivers] == [0, 0, 0]
    with Store(url) as store:
        assert store.load(r.spec.key for r in results) == {r.spec.key: r for r in results}
    assert rows(server, url) == 60
    assert rows(server, url, "surefoot_leases") == 0


def test_a_lease_ends_with_its_time_by_the_servers_clock(url, run, monkeypatch):
    keys = [run(seed).spec.key for seed in range(4)]
    with Store(url) as mine, Store(url) as other:
        assert mine.take(keys[:3], "me", 1.0) == set(keys[:3])
        monkeypatch.setattr(module.time, "time", lambda: 0.0)  # a machine whose clock is wrong
        assert other.take(keys, "you", 60.0) == {keys[3]}
        deadline = time.monotonic() + 20
        while not (taken := other.take(keys[:3], "you", 60.0)):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert taken == set(keys[:3])


def test_a_connection_that_is_lost_is_made_anew(url, run, server):
    with Store(url) as store:
        store.save(run(0))
        disconnect(server, url)
        assert store.keys() == {run(0).spec.key}
        disconnect(server, url)
        store.save(run(1))
        disconnect(server, url)
        assert store.take([run(2).spec.key], "me", 60.0)
    assert rows(server, url) == 2


def test_a_server_that_is_away_for_a_while_is_waited_for(url, run, monkeypatch):
    with Store(url) as store:
        store.save(run(0))
        connect, refusals = store._engine.dialect.connect, []

        def away(*arguments, **options):
            if len(refusals) < 2:
                refusals.append(1)
                raise store._engine.dialect.loaded_dbapi.OperationalError(
                    "the database system is starting up"
                )
            return connect(*arguments, **options)

        monkeypatch.setattr(store._engine.dialect, "connect", away)
        store._engine.dispose()
        store.save(run(1))
        assert len(refusals) == 2
        assert len(store.keys()) == 2
        refusals.clear()
        monkeypatch.setattr(module, "_AWAY", 0.0)
        store._engine.dispose()
        with pytest.raises(UserError, match=r"cannot be used: the database system is starting up\.$"):
            store.keys()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"database": "no_such_database"}, "no_such_database"),
        ({"port": 1}, "port 1 failed"),
        ({"username": "nobody_here", "password": "hunter2"}, "nobody_here"),
    ],
)
def test_what_is_wrong_is_one_sentence_without_a_password(change, said):
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        Store(sa.make_url(SERVER).set(**change).render_as_string(hide_password=False))
    sentence = str(caught.value)
    assert said in sentence
    assert "hunter2" not in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert time.monotonic() - began < 30  # it is not waited for one that was never there


def test_a_table_of_another_schema_is_refused(url, run, server):
    with Store(url) as store:
        store.save(run())
    schema = sa.make_url(url).query["application_name"]
    server.execute(sa.text(f'update "{schema}".surefoot_schema set version = 99'))
    with pytest.raises(UserError, match="has schema 99"):
        Store(url)


# The command line, but taking one run at a time, so that two of them soon have some each.
SHARING = "from surefoot.lab import session; session.SHARE = 0.0; from surefoot.cli import main; main()"


@pytest.mark.slow
def test_two_commands_share_the_work_and_one_that_is_killed_is_taken_over(url, server, tmp_path):
    command = shlex.split(
        "compare digits-mlp --optimizers sgd --rates 1e-2:1e0 --seeds 3 --epochs 40 --workers 1 --log tensorboard "
        "--engine separate"  # one run after another, so that there is something to share
    )
    drivers = [
        subprocess.Popen(
            [sys.executable, "-c", SHARING, *command, "--store", url, "--out", out], cwd=tmp_path, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for out in ("killed", "other")
    ]  # fmt: skip
    logged = [tmp_path / out / "tensorboard" for out in ("killed", "other")]
    deadline = time.monotonic() + 300
    while not all(list(folder.rglob("*tfevents*")) for folder in logged):  # each has made a run
        assert time.monotonic() < deadline
        assert all(driver.poll() is None for driver in drivers), [d.communicate() for d in drivers]
        time.sleep(0.05)
    drivers[0].send_signal(signal.SIGKILL)
    drivers[0].communicate()
    out, errors = drivers[1].communicate(timeout=400)
    assert drivers[1].returncode == 0, errors
    assert "Report: other/report.html" in out
    assert rows(server, url) == 9
    made = sum(len(list(folder.rglob("*tfevents*"))) for folder in logged)
    assert made in (8, 9)  # killed between the two, a run is stored and not logged; none is made twice
    with Store(url) as store:
        assert len({(r.spec.rate, r.spec.seed) for r in store.all()}) == 9
