"""A search that is killed at random moments loses at most what it was at, and counts nothing twice."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import sweeping

KILLS = 20


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_a_search_that_is_killed_twenty_times_ends_as_if_it_never_was(tmp_path):
    locks, folder = tmp_path / "locks", tmp_path / "folder"
    locks.mkdir()
    folder.mkdir()
    command = [sys.executable, str(Path(__file__).with_name("sweeping.py")), str(KILLS), "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(locks)}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=300)

    lives = [tuple(map(int, line.split())) for line in (folder / "lives").read_text().splitlines()]
    *killed, (_, last) = lives
    assert last == 0
    assert [status for _, status in killed] == [-signal.SIGKILL] * KILLS
    assert sum(began > 0 for began, _ in killed) > KILLS / 2  # most of them in the midst of their work

    asked = sweeping.ASKED
    store = sqlite3.connect(folder / "out" / "runs.sqlite")
    trials = store.execute("select number, seeds, pruned from surefoot_trials order by number").fetchall()
    assert trials == [(number, asked.seeds, 0) for number in range(asked.trials)]
    runs = Counter(store.execute("select rate, seed from surefoot_runs"))
    assert len(runs) == asked.trials * asked.seeds
    assert set(runs.values()) == {1}
    assert {seed for _, seed in runs} == set(range(asked.seeds))

    starts = [line.split() for line in (folder / "starts").read_text().splitlines()]
    assert {word for _, word in starts} == {"new"}  # nothing that was stored was ever begun again
    assert len(starts) <= len(runs) + KILLS  # and no life lost more than the run that it was at
    assert store.execute("select count(*) from surefoot_leases").fetchone() == (0,)

    untroubled = sqlite3.connect(folder / "untroubled" / "runs.sqlite")
    keys = "select key from surefoot_runs order by key"
    assert store.execute(keys).fetchall() == untroubled.execute(keys).fetchall()
