"""Stopping between iterations: a signal is kept until the state is saved.

A second Ctrl-C acts at once, but for processes of torchrun. SIGTERM and SIGHUP may arrive several
times: a closed terminal and its shell both send one, and job schedulers repeat theirs. SIGUSR1 is
what schedulers send as a warning.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType

_SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")


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
    """A context in which `signal` is the first of `_SIGNALS` that has arrived; 0: none.

    Args:
        from_launcher: a second Ctrl-C changes nothing, because torchrun repeats the first one.
    """

    def __init__(self, from_launcher: bool = False) -> None:
        self.signal, self._from_launcher = 0, from_launcher
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        # Only the main thread may set handlers; elsewhere signals keep their usual meaning.
        if threading.current_thread() is threading.main_thread():
            for name in _SIGNALS:
                number = getattr(signal, name, None)  # Windows has the first two
                # nohup asks for hang-ups to be ignored.
                ignored = name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN
                if number is not None and not ignored:
                    self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.signal and number == signal.SIGINT and not self._from_launcher:
            raise KeyboardInterrupt
        self.signal = self.signal or number
