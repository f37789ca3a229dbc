"""Stopping between iterations: a first Ctrl-C or SIGTERM is remembered, a second acts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A run that was asked to stop did so, with everything saved.

    Args:
        iteration: the last one done.
        command: what continues the run.
        status: exit status, 128 + signal number.
    """

    def __init__(self, iteration: int, command: str, status: int):
        super().__init__(f"stopped after iteration {iteration}; continue with: {command}")
        self.iteration, self.command, self.status = iteration, command, status


class StopRequest:
    """While entered, `signal` tells which of SIGINT and SIGTERM has arrived (0: none)."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere signals keep their usual meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._arrived)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _arrived(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
