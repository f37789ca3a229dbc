"""What can be timed: the benchmarks of `issp bench`, and the rows of their tables."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

_BENCHMARKS = {
    "step": "bench.step",
    "optim": "bench.optim",
    "train": "bench.train",
    "matmul": "bench.matmul",
    "conv": "bench.conv",
    "network": "bench.network",
    "accuracy": "bench.accuracy",
}


class ParityError(RuntimeError):
    """What was to be timed is not right: not the reference's bits, or too far from float64."""


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: as printed.
        traffic: bytes that any implementation must move, from (weights, bytes per weight).
        counted: the same in words.
        make: from a workload, the call that is timed.
        prepare: from a workload, what happens before each call, not timed.
        ours: an error in it is an error; an error in a peer becomes a note.
        per_layer: works on one tensor after the other, so the largest sets its peak memory.
        capturable: a CUDA graph can hold it.
        missing: why it cannot be timed here ("not installed"), or None.
    """

    name: str
    traffic: Callable[[int, int], float]
    counted: str
    make: Callable[[Any], Callable[[], object]]
    prepare: Callable[[Any], object]
    ours: bool = False
    per_layer: bool = False
    capturable: bool = True
    missing: Callable[[], str | None] = lambda: None


def benchmarks() -> dict[str, ModuleType]:
    """Name -> module with `add_arguments`, `run`, `EXAMPLE` and a docstring."""
    return {name: importlib.import_module(path) for name, path in _BENCHMARKS.items()}
