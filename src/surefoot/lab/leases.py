"""Who is at which run, so that several processes on one store never make the same one twice.

A lease is a row in the store. It ends with the run that is stored, with the process that has it, or with time. A process
renews its leases as long as it lives; one that was killed cannot end them, so the next one on the same machine sees that
it is gone by a file that only a living process keeps locked. Elsewhere, and where files cannot be locked, the time ends them.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from surefoot.lab.errors import UserError
from surefoot.lab.store import Store

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

SECONDS = 120.0
"""How long a lease lasts that is not renewed."""
RENEWALS = 4
"""How often it is renewed in that time."""
PATIENCE = 0.5
"""Seconds between two looks at what others are at."""


class Leases:
    """One process's leases on the runs of one store, to be used in a ``with`` statement, whose end is theirs.

    Nothing is written before the first run is taken.

    Args:
        store: where the runs are kept.
        seconds: how long a lease lasts after the death of its process, where its death is not seen.
    """

    def __init__(self, store: Store, seconds: float = SECONDS) -> None:
        self._store, self._seconds = store, seconds
        self._owner = uuid.uuid4().hex
        self._lock: int | None = None
        self._ended = threading.Event()
        self._renewing = threading.Thread(target=self._renew, daemon=True)

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._renewing.is_alive():
            return
        self._ended.set()
        self._renewing.join()
        try:
            with contextlib.suppress(
                UserError
            ):  # what ends the command is told already; the time ends the leases
                self._store.release(self._owner)
        finally:
            if self._lock is not None:
                _file(self._owner).unlink(missing_ok=True)
                os.close(self._lock)

    def take(self, keys: Iterable[str]) -> set[str]:
        """Those of ``keys`` whose runs are now this process's to make: not stored, and nobody else is at them.

        Raises:
            UserError: the store cannot be written.
        """
        if not self._renewing.is_alive():
            self._lock = _lock(_file(self._owner))
            self._renewing.start()
        dead: set[str] = set()

        def is_dead(owner: str) -> bool:
            if _has_died(_file(owner)):
                dead.add(owner)
            return owner in dead

        taken = self._store.take(keys, self._owner, self._seconds, is_dead)
        for owner in dead:  # not before its leases are gone for good
            _file(owner).unlink(missing_ok=True)
        return taken

    def wait(self) -> None:
        """Lets some time pass in which others may finish."""
        time.sleep(PATIENCE)

    def _renew(self) -> None:
        while not self._ended.wait(self._seconds / RENEWALS):
            with contextlib.suppress(UserError):  # the next run to be stored will meet the reason
                self._store.renew(self._owner, self._seconds)


def _file(owner: str) -> Path:
    return Path(tempfile.gettempdir()) / f"surefoot-{owner}"


def _lock(path: Path) -> int | None:
    """The descriptor of a new file that is locked until it is closed, or its process ends, however it does."""
    if fcntl is None:
        return None
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o644)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return None
    return descriptor


def _has_died(path: Path) -> bool:
    """Whether the file is there and nobody has it locked any more."""
    if fcntl is None:
        return False
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:  # another machine's, or another user's
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
