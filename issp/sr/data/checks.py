"""Checks of arguments that several functions of this package take."""

from __future__ import annotations

from typing import Any

import numpy as np


def check_whole(name: str, value: Any, least: int) -> int:
    """Returns ``value`` as an int; raises ValueError unless it is a whole number >= ``least``."""
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return int(value)


def check_small(small: str) -> None:
    """Raises ValueError unless ``small``, what to do with small images, is "error" or "skip"."""
    if small not in ("error", "skip"):
        raise ValueError(f'small must be "error" or "skip", got {small!r}')
