"""Lines on stderr that show how far a benchmark is, one every ten seconds at most."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

T = TypeVar("T")
_EVERY = 10.0  # seconds
_last_line = time.monotonic()


def restart() -> None:
    """A benchmark begins: the next line is due in ten seconds."""
    global _last_line
    _last_line = time.monotonic()


def counted(items: Sequence[T], what: str) -> Iterator[T]:
    """The items; prints which one begins when the last line is ten seconds old.

    Args:
        items: of a loop that may take long.
        what: one item is, such as "round".
    """
    for number, item in enumerate(items, 1):
        if time.monotonic() - _last_line >= _EVERY:
            restart()
            print(f"{what} {number} of {len(items)}", file=sys.stderr, flush=True)
        yield item
