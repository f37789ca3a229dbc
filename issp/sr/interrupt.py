"""Stopping between iterations: the first Ctrl-C or SIGTERM is kept, the second acts at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupted(Exception):
    """A run was asked to stop: its state is saved and the run has ended.

    Args:
        iteration: the last one done.
        command: what continues the run.
        status: exit status, 128 + signal number.
    """

    def __init__(self, iteration: int, command: str, status: int):
        super().__init__(f"stopped after iteration {iteration}; continue with: {command}")
        self.iteration, self.command, self.status = iteration, command, status


class StopRequest:
    """A context in which `signal` is the SIGINT or SIGTERM that has arrived; 0: none."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere signals keep their usual meaning.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
