"""A search that is killed again and again: run as a program, it forks one life after the other and ends each by SIGKILL.

Each life is the whole driver, store, leases and Optuna included, and trains for real, in its own process: workers of its own
would take seconds to load torch, which here is loaded once, before the lives begin.

    python sweeping.py KILLS SEED

In the current folder it leaves the search in ``out``, and the same one from a life that was not killed in ``untroubled``;
``starts``, with a line for each run that was begun (its key, and whether it was stored already); and ``lives``, with a line
for each life (how many runs it began, and how it ended).
"""

import os
import random
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from surefoot.lab import session, worker
from surefoot.lab.store import Store
from surefoot.lab.sweep import Sweep, sweep

TASK = """
import torch
from surefoot.lab.tasks import Task

def task():
    x = torch.linspace(-1, 1, 48).reshape(-1, 2)
    y = x.sum(dim=1, keepdim=True).tanh()
    return Task("line", lambda: torch.nn.Linear(2, 1), (x, y), (x, y), torch.nn.functional.mse_loss, batch_size=8, epochs=2)
"""
ASKED = Sweep(
    task="task.py:task",
    optimizer="momentum",
    sampler="tpe",
    trials=30,
    at_once=None,
    halving=None,
    rates=None,
    ranges=(),
    space=None,
    seeds=4,
    epochs=None,
    batch=None,
    data=None,
    out=Path("out"),
    device="cpu",
    store=None,
    workers=None,
)
MOST_STARTS = 6  # of a life that is going to be killed, and then
LONGEST = 0.03  # seconds of work


class Here:
    """An executor that does everything in this process and notes what it begins."""

    workers = 1

    def __init__(self, room):
        self._room = room

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def call(self, name, function, *arguments):
        return function(self._room, *arguments)

    def prepare(self, requests, rates):
        return worker.prepare(self._room, requests, rates)

    def estimate(self, specs, alike=None, remember=True):
        return [0.01] * len(specs)

    def refusals(self):
        return {}

    def arrange(self, specs):
        return [(spec,) for spec in specs]

    def run(self, batches):
        for (spec,) in batches:
            with Store(ASKED.store_url) as store, open("starts", "a") as starts:
                starts.write(f"{spec.key} {'again' if spec.key in store else 'new'}\n")
            yield from worker.run(self._room, [spec])


def begun():
    return Path("starts").read_bytes().count(b"\n")


def die(starts, seconds):
    """Ends this process when it has begun so many runs more and worked so long after it, however busy the machine is."""
    before = begun()
    while begun() - before < starts:
        time.sleep(0.001)
    until = time.process_time() + seconds
    while time.process_time() < until:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGKILL)


def live(room, asked=ASKED, death=None):
    """One life, to its own end or to ``death``: how it ended."""
    child = os.fork()
    if child == 0:
        session.LocalProcesses = lambda *arguments: Here(room)
        if death is not None:
            threading.Thread(target=die, args=death, daemon=True).start()
        with open(os.devnull, "w") as nowhere:
            os._exit(sweep(asked, Console(file=nowhere), Console(file=nowhere)))
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def main(kills, seed):
    rng = random.Random(seed)
    Path("task.py").write_text(TASK)
    Path("starts").touch()
    worker.begin()
    room = worker.Room(ASKED.task, None, "cpu")
    assert room.info
    import optuna.storages  # noqa: F401 - what a life imports late would be imported in each

    with open("lives", "w") as lives:
        for life in range(kills + 1):
            before = begun()
            death = (rng.randrange(MOST_STARTS), rng.uniform(0, LONGEST)) if life < kills else None
            status = live(room, death=death)
            lives.write(f"{begun() - before} {status}\n")
    os.rename("starts", "done")
    live(room, replace(ASKED, out=Path("untroubled")))
    os.rename("done", "starts")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
