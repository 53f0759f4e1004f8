"""Leases: no two processes at one run, none that stays for a process that is gone, and nothing left behind."""

import multiprocessing
import os
import signal
import sqlite3
import tempfile
import time
from pathlib import Path

import pytest
from test_store import run

from surefoot.lab import leases as module
from surefoot.lab.errors import UserError
from surefoot.lab.leases import Leases
from surefoot.lab.store import Store

KEYS = [run(seed).spec.key for seed in range(4)]


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    (tmp_path / "locks").mkdir()
    return tmp_path / "runs.sqlite"


@pytest.fixture
def store(path):
    with Store(path) as store:
        yield store


def rows(path):
    return set(sqlite3.connect(path).execute("select key from surefoot_leases").fetchall())


class TestTaking:
    def test_what_one_has_the_other_does_not_get(self, store):
        with Leases(store) as one, Leases(store) as other:
            assert one.take(KEYS[:2]) == set(KEYS[:2])
            assert other.take(KEYS) == set(KEYS[2:])
            assert one.take(KEYS) == set(KEYS[:2])  # and its own it has still

    def test_a_stored_run_is_nobodys(self, store):
        with Leases(store) as leases:
            store.save(run(0))
            assert leases.take(KEYS) == set(KEYS[1:])

    def test_a_run_is_stored_and_its_lease_ended_at_once(self, store, path):
        with Leases(store) as leases:
            leases.take(KEYS)
            store.save(run(0))
            assert rows(path) == {(key,) for key in KEYS[1:]}

    def test_the_end_gives_back_what_was_not_made(self, store):
        with Leases(store) as one:
            one.take(KEYS)
        with Leases(store) as other:
            assert other.take(KEYS) == set(KEYS)

    def test_an_error_gives_it_back_too(self, store):
        with pytest.raises(ZeroDivisionError), Leases(store) as one:  # noqa: PT012 - it is raised inside
            one.take(KEYS)
            raise ZeroDivisionError
        with Leases(store) as other:
            assert other.take(KEYS) == set(KEYS)

    def test_nothing_is_written_before_something_is_taken(self, store, path, tmp_path):
        with Leases(store):
            assert not path.exists()
            assert list((tmp_path / "locks").iterdir()) == []

    def test_nothing_is_left_behind(self, store, path, tmp_path):
        with Leases(store) as leases:
            leases.take(KEYS)
            assert len(list((tmp_path / "locks").iterdir())) == 1
        assert list((tmp_path / "locks").iterdir()) == []
        assert rows(path) == set()

    def test_more_keys_than_a_query_can_carry(self, store):
        keys = [f"{number:064}" for number in range(1203)]
        with Leases(store) as one, Leases(store) as other:
            assert one.take(keys[::2]) == set(keys[::2])
            assert other.take(keys) == set(keys[1::2])

    def test_a_store_that_fails_is_told(self, store, path):
        with Leases(store) as leases:
            leases.take(KEYS[:1])
            path.write_bytes(b"no database any more" * 400)
            with pytest.raises(UserError, match="no SQLite database"):
                leases.take(KEYS)
            path.unlink()


class TestTime:
    def test_a_lease_that_is_not_renewed_ends(self, store, monkeypatch):
        monkeypatch.setattr(module, "_has_died", lambda path: False)  # as on another machine
        monkeypatch.setattr(Store, "renew", lambda *args: None)
        with Leases(store, seconds=0.2) as one, Leases(store) as other:
            one.take(KEYS)
            assert other.take(KEYS) == set()
            time.sleep(0.25)
            assert other.take(KEYS) == set(KEYS)

    def test_a_living_process_keeps_its_leases_however_long_a_run_takes(self, store, monkeypatch):
        monkeypatch.setattr(module, "_has_died", lambda path: False)
        with Leases(store, seconds=0.4) as one, Leases(store) as other:
            one.take(KEYS)
            deadline = time.monotonic() + 1.2
            while time.monotonic() < deadline:
                assert other.take(KEYS) == set()
                time.sleep(0.1)

    def test_a_lease_that_was_lost_does_not_cost_the_run(self, store, monkeypatch):
        monkeypatch.setattr(module, "_has_died", lambda path: False)
        monkeypatch.setattr(Store, "renew", lambda *args: None)
        with Leases(store, seconds=0.05) as asleep, Leases(store) as other:
            asleep.take(KEYS[:1])
            time.sleep(0.1)
            assert other.take(KEYS[:1]) == {KEYS[0]}
            store.save(run(0, seconds=1.0))
            store.save(run(0, seconds=2.0))  # both made it: the first counts
            assert [result.seconds for result in store.all()] == [1.0]


def _take_and_wait(path, locks, taken):
    tempfile.tempdir = locks
    with Store(path) as store, Leases(store) as leases:
        leases.take(KEYS)
        taken.set()
        time.sleep(60)


def _take_each(path, locks, keys, start, answers):
    tempfile.tempdir = locks
    with Store(path, timeout=60) as store, Leases(store) as leases:
        start.wait()
        answers.put([key for key in keys if leases.take([key])])
        start.wait()  # before leases end


class TestProcesses:
    def test_a_killed_process_holds_nothing_up(self, store, path, tmp_path):
        context = multiprocessing.get_context("spawn")
        taken = context.Event()
        process = context.Process(target=_take_and_wait, args=(path, tempfile.tempdir, taken))
        process.start()
        assert taken.wait(60)
        with Leases(store) as leases:
            assert leases.take(KEYS) == set()
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            assert leases.take(KEYS) == set(KEYS)
            assert len(list((tmp_path / "locks").iterdir())) == 1  # its own; the dead one's is gone

    def test_two_processes_share_the_runs_without_a_gap_or_a_double(self, path, store):
        store.create()
        context = multiprocessing.get_context("spawn")
        start, answers = context.Barrier(2), context.Queue()
        keys = [f"{number:064}" for number in range(60)]
        takers = [
            context.Process(target=_take_each, args=(path, tempfile.tempdir, keys, start, answers))
            for _ in range(2)
        ]
        for taker in takers:
            taker.start()
        taken = [answers.get(timeout=60) for _ in takers]
        for taker in takers:
            taker.join()
        assert sorted(taken[0] + taken[1]) == keys

    def test_without_locked_files_the_time_decides(self, store, monkeypatch):
        monkeypatch.setattr(module, "fcntl", None)
        with Leases(store) as one, Leases(store) as other:
            assert one.take(KEYS) == set(KEYS)
            assert other.take(KEYS) == set()
        assert list(Path(tempfile.tempdir).iterdir()) == []
