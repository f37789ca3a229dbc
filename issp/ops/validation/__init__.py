"""Argument checks of the ops: one clear sentence with the remedy, before anything is written."""

from __future__ import annotations

from collections.abc import Callable


def raise_python_error(check: Callable[..., None]) -> Callable:
    """Wraps a native op: when it refuses, `check` raises the exact sentence and kind of error.

    Native ops know RuntimeError only. The check runs after a refusal alone, so that a call that
    succeeds does not pay for it.
    """

    def wrap(call: Callable) -> Callable:
        def checked(*args):
            try:
                return call(*args)
            except (RuntimeError, TypeError):
                check(*args)
                raise

        return checked

    return wrap
