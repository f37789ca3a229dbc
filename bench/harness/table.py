"""The table of every benchmark: markdown for people, samples for programs."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.harness.timing import Task
from issp.utils import text

# Cells are in seconds, and in bytes or operations per second.
SCALES = {"": 1.0, "us": 1e6, "ms": 1e3, "ns": 1e9, "GB/s": 1e-9, "GFLOP/s": 1e-9}


def number(value: float) -> str:
    """Three significant digits, or three decimals below 0.001; no exponent."""
    if value != 0 and abs(value) < 100:
        return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.3f}"
    return f"{value:.0f}"


def percent(value: float) -> str:
    """A share in percent, with two digits where it is small."""
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 else f"{100 * value:.2g} %"


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: of its cells.
        name: heads it.
        unit: printed behind the name; cells are scaled to it.
        format: text of a scaled number.
    """

    key: str
    name: str = ""
    unit: str = ""
    format: Callable[[float], str] = number

    @property
    def heading(self) -> str:
        """Name and unit."""
        return f"{self.name} {self.unit}".strip()

    def text(self, value: float | str | None) -> str:
        """A cell as printed; "-" for None, text as it is."""
        if value is None:
            return "-"
        return value if isinstance(value, str) else self.format(value * SCALES[self.unit])


@dataclass
class Row:
    """One row of a table.

    Attributes:
        cells: key -> number, text or None. A key without a column is only in the samples file.
        samples: what was timed, such as the mode -> seconds of each call.
    """

    cells: dict[str, Any]
    samples: dict[str, list[float]] = field(default_factory=dict)

    def __getitem__(self, key: str) -> Any:
        return self.cells[key]


@dataclass
class Table:
    """What was measured, as every benchmark prints it.

    Attributes:
        title: what was measured, and with which settings.
        machine: see `bench.harness.machine`.
        columns: the first one names the rows.
        rows: in the order of printing.
        notes: sentences under the table.
        roofline: what the shares of the roofline refer to, in words; "" prints none.
        limits: the same in numbers, for the samples file.
    """

    title: str
    machine: str
    columns: Sequence[Column]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    roofline: str = ""
    limits: dict[str, Any] = field(default_factory=dict)

    def row(self, name: str) -> Row:
        """The row of that name."""
        return next(row for row in self.rows if row[self.columns[0].key] == name)

    def markdown(self) -> str:
        """The table under its title and machine line, above its notes."""
        parts = [f"### {self.title}", self.machine]
        if self.roofline:
            parts.append(f"Roofline: {self.roofline}.")
        cells = ([c.text(row.cells.get(c.key)) for c in self.columns] for row in self.rows)
        parts.append(text.table([column.heading for column in self.columns], cells))
        if self.notes:
            parts.append("\n".join(f"- {note}" for note in self.notes))
        return "\n\n".join(parts) + "\n"

    def record(self) -> dict[str, Any]:
        """Title, machine, limits, cells and every measured time in seconds, for JSON."""
        return {
            "title": self.title,
            "machine": self.machine,
            "roofline": self.limits,
            "rows": [{**row.cells, "seconds": row.samples} for row in self.rows],
        }


def median(seconds: Sequence[float] | None) -> float | None:
    """The median, or None where nothing was measured."""
    return statistics.median(seconds) if seconds else None


def ratio(value: float | None, base: float | None) -> float | None:
    """`value` over `base`, or None where one of them was not measured."""
    return None if value is None or base is None else value / base


def timing_notes(tasks: Iterable[tuple[str, Task]], rounds: int) -> list[str]:
    """Notes on what ran less often than the other rows, or not at all.

    Args:
        tasks: pairs of name and task; one name may occur several times.
        rounds: how often a task runs that is not slow.
    """
    runs: dict[str, int] = {}
    errors: dict[str, str] = {}
    for name, task in tasks:
        if task.error:
            errors[name] = task.error
        if task.samples:
            max_runs = max(map(len, task.samples.values()))
            runs[name] = min(max_runs, runs.get(name, max_runs))
    few = [f"{name} ({n})" for name, n in runs.items() if n < rounds]
    notes = [f"Slow, so run less often than {rounds} times: {', '.join(few)}."] if few else []
    return notes + [f"{name} could not be timed, {error}." for name, error in errors.items()]
