"""Which way of training is the fastest, timed for a moment on the real work and remembered for this machine and task."""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pooch
import torch

from surefoot._version import __version__
from surefoot.lab.course import processor
from surefoot.lab.engines import AUTO, MOST, SEPARATE, STACKED, Timing, Way
from surefoot.lab.population import LOWERINGS, kind_of, lacks_memory, refusal, stack_step_seconds
from surefoot.lab.runs import NUMERICS, RunSpec, digest_of
from surefoot.lab.tasks.base import Task
from surefoot.lab.train import timed

try:
    import resource
except ModuleNotFoundError:  # Windows
    resource = None

MOMENT = 0.2
"""Seconds that each way is timed."""
WORTH = 5.0
"""Seconds of training: to make less of it faster, no time is spent."""
TRIAL = 60
"""About how many single steps it takes to try whether stacks can be had and are faster."""
DEAREST = 0.1
"""The largest share of the work that this may be."""
LONG = 0.05
"""Seconds of a step: of longer ones two runs together are no faster, or more are not either."""
_BETTER = 0.98
"""A way is better if it takes less than this share of the time."""


def timing(
    task: Task,
    spec: RunSpec,
    device: str,
    engine: str,
    runs: int,
    remember: bool = True,
    without_stacks: bool = False,
) -> Timing:
    """What runs like this one take, each of the ways that ``engine`` allows.

    Stacks are tried in powers of two as long as they become faster, and would not take more memory than each core may have;
    none for so little work that trying would be much of it. What was found is kept in the user's cache folder
    (``surefoot/engines``), a file for each machine, version, task and kind of run.

    Args:
        task: what is trained.
        spec: one of the runs.
        device: where.
        engine: one of :data:`surefoot.lab.engines.ENGINES`.
        runs: how many such runs there are to do.
        remember: keep what was found.
        without_stacks: trying them has failed or killed a worker, so they are not to be tried any more.
    """
    most = min(runs, MOST)
    file = _folder() / f"{_machine_and_kind(spec, device)}.json"
    known = _read(file)
    if known is not None and (engine == SEPARATE or most <= known.up_to):
        return known
    found = known or _alone(task, spec, device)
    alone = found.ways[0]
    long_enough = runs * found.seconds(alone) > WORTH and runs * found.steps > TRIAL / DEAREST
    if without_stacks:
        found = replace(found, up_to=MOST, refusal="trying it failed" if found.ways == (alone,) else None)
    elif most >= 2 and (engine == STACKED or (engine == AUTO and long_enough)):
        found = _stacks(found, task, spec, device, most)
    else:
        return found
    if remember:
        _write(file, found)
    return found


def _alone(task: Task, spec: RunSpec, device: str) -> Timing:
    found = timed(task, spec, device)
    return Timing(found.rest, found.steps, (Way(None, 1, found.step),), up_to=1)


def _stacks(found: Timing, task: Task, spec: RunSpec, device: str, most: int) -> Timing:
    """The same with stacks of up to ``most`` runs tried."""
    refusals = {name: refusal(task, spec, device, name) for name in LOWERINGS}
    usable = [name for name, reason in refusals.items() if reason is None]
    if not usable:
        return replace(found, up_to=MOST, refusal=list(refusals.values())[-1])
    ways = list(found.ways)
    if len(usable) > 1 and len(ways) == 1:  # which of them is told by the smallest, and then climbs alone
        ways += [way for name in usable if (way := _way(task, spec, device, name, 2))]
    lowering = min(ways[1:], key=lambda way: way.step).lowering if len(ways) > 1 else usable[0]
    assert lowering is not None
    tried = {way.runs: way for way in ways if way.lowering == lowering}
    best, size, worse = ways[0].step, 2, 0
    before, room = _peak_memory(), _free_memory() / (os.cpu_count() or 1)
    patience = 2 if best < LONG else 1
    while size <= most and worse < patience and 2 * (_peak_memory() - before) < room:
        if size not in tried:
            way = _way(task, spec, device, lowering, size)
            if way is None:  # no memory for it
                break
            ways.append(way)
            tried[size] = way
        step = tried[size].step
        worse = 0 if step < _BETTER * best else worse + 1
        best = min(best, step)
        size *= 2
    return replace(found, ways=tuple(ways), up_to=most if size > most else MOST)


def _way(task: Task, spec: RunSpec, device: str, lowering: str, runs: int) -> Way | None:
    specs = [replace(spec, seed=seed) for seed in range(runs)]
    try:
        return Way(lowering, runs, stack_step_seconds(task, specs, device, lowering, MOMENT) / runs)
    except Exception as error:
        if lacks_memory(error):
            return None
        raise


def _peak_memory() -> int:
    """The most bytes that this process has held so far; 0 where the system does not say."""
    if resource is None:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _free_memory() -> float:
    """Bytes that processes may still take; infinite where the system does not say."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="utf8").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    return math.inf


# ---------------------------------------------------------------------------------------------------- what is remembered


def _folder() -> Path:
    return Path(pooch.os_cache("surefoot")) / "engines"


def _machine_and_kind(spec: RunSpec, device: str) -> str:
    cuda = device.startswith("cuda")
    return digest_of(
        {
            "kind": kind_of(spec),
            "numerics": NUMERICS,
            "surefoot": __version__,
            "torch": str(torch.__version__),
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if cuda else device,
        }
    )


def _read(file: Path) -> Timing | None:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf8"))
        found = Timing(**{**record, "ways": tuple(Way(**way) for way in record["ways"])})
        numbers = [found.rest, found.steps, found.up_to, *(way.step for way in found.ways)]
        return found if found.ways[0].runs == 1 and all(number >= 0 for number in numbers) else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or not ours
        return None


def _write(file: Path, found: Timing) -> None:
    """Whole or not at all; without a folder that can be written the timing is made again next time."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=file.parent)
        with os.fdopen(descriptor, "w", encoding="utf8") as written:
            json.dump(asdict(found), written)
        os.replace(name, file)
