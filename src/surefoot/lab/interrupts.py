"""Ctrl-C and SIGTERM, taken at a moment that loses nothing."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupts:
    """While the block lasts, SIGINT and SIGTERM raise :class:`KeyboardInterrupt`, once, and never inside :meth:`held`.

    A second signal changes nothing, so that an impatient Ctrl-C cannot interrupt the clearing up after the first. A
    signal that was ignored stays so (``nohup``, a job in the background).
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        """The signal that came; ``None``: none did."""
        self._held = False
        self._before: dict[int, object] = {}

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that a signal ended: 130 after Ctrl-C."""
        return 128 + (self.signal or signal.SIGINT)

    def __enter__(self) -> Interrupts:
        for number in (signal.SIGINT, signal.SIGTERM):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._take)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType] - what signal.signal gave

    @contextmanager
    def held(self) -> Iterator[None]:
        """Lets the block come to its end; a signal that arrives in it is raised after it."""
        self._held = True
        try:
            yield
        finally:
            self._held = False
        if self.signal is not None:
            raise KeyboardInterrupt

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = number
            if not self._held:
                raise KeyboardInterrupt
