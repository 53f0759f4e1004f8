"""The job behind ``surefoot merge``: the runs of several machines in one store."""

from __future__ import annotations

from collections.abc import Sequence

from surefoot.lab.errors import UserError
from surefoot.lab.session import count
from surefoot.lab.store import Store


def merge(sources: Sequence[str], target: str) -> str:
    """Adds what every source has to the target, which is made if it is not there.

    A run that two of them have is taken once. Searches that began alike become one, with the trials of both.

    Returns:
        What was done, in words.

    Raises:
        UserError: a source is no store, or the target cannot be written. What was added before is kept.
    """
    for source in sources:
        with Store(source) as store:
            if not store.exists:
                raise UserError(f"There is no store {store.name} to merge.")
    with Store(target) as into:
        if not into.lasting:
            raise UserError(f"--into is {into.name!r}, in memory, where no run is kept; give it a file.")
        into.create()
        lines = []
        for source in sources:
            before = len(into.keys())
            with Store(source) as store:
                into.add(store)
                there = len(store.keys())
            lines.append(f"{store.name}: {count(there, 'run')}, {len(into.keys()) - before:,} of them new.")
        return "\n".join([*lines, f"{into.name}: {count(len(into.keys()), 'run')}."])
