"""What an option of a method may be, one sentence for each kind."""

from __future__ import annotations

import math
import numbers
import reprlib
from typing import Any


def whole_number(name: str, value: Any, least: int, most: int | None = None) -> int:
    """The value of an option that counts something.

    Raises:
        ValueError: no whole number, or one outside least..most.
    """
    is_whole = isinstance(value, numbers.Real) and not isinstance(value, bool) and value % 1 == 0
    if not is_whole or value < least or (most is not None and value > most):
        limits = f"from {least}" if most is None else f"in {least}..{most}"
        raise ValueError(f"{name} is {reprlib.repr(value)}: it must be a whole number {limits}")
    return int(value)


def check_number(
    name: str, value: Any, least: float, most: float | None = None, above: bool = False
) -> None:
    """Refuses what is no finite number in least..most.

    Args:
        above: `least` itself is refused as well.

    Raises:
        ValueError: it is not.
    """
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    is_right = is_number and least <= value < math.inf and not (above and value == least)
    if not is_right or (most is not None and value > most):
        limits = f"in {least:g}..{most:g}" if most is not None else f"from {least:g}"
        limits = f"above {least:g}" if above else limits
        raise ValueError(f"{name} is {reprlib.repr(value)}: it must be a number {limits}")
