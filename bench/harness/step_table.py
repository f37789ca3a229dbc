"""The table of one optimizer or pruning step: times, ratios, traffic, share of the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.harness.bandwidth import Bandwidth
from bench.harness.plots import Bars, plot_bars
from bench.harness.table import SCALES, Column, Row, Table, percent, ratio
from bench.harness.timing import CpuClock, CudaClock, Task


@dataclass
class Entry:
    """One row before its ratios are known.

    Attributes:
        name: as printed.
        task: its times.
        traffic: bytes that any implementation must move.
        extra: bytes of memory needed beyond weights and results, per weight; None: not measured.
        missing: why it is not timed at all, such as "not installed".
    """

    name: str
    task: Task
    traffic: float
    extra: float | None = None
    missing: str | None = None


def make(
    *,
    title: str,
    machine: str,
    clock: CpuClock | CudaClock,
    bandwidth: Bandwidth,
    numel: int,
    entries: Sequence[Entry],
    base: str,
    ratio_name: str = "ratio",
) -> Table:
    """Fills the table.

    Args:
        title, machine: see `Table`.
        clock: its `basis` is the mode that rates, roofline share, spread and best refer to.
        bandwidth: of the same run, in the mode `basis`.
        numel: weights in all.
        entries: the rows.
        base: name of the row that the ratios refer to.
        ratio_name: heads the columns of ratios.
    """
    columns = [Column("what", "what")]
    for mode in clock.modes:
        columns += [Column(mode.name, mode.name, clock.unit)]
        columns += [Column(f"{mode.name} ratio", ratio_name)]
    columns += [Column("traffic", "B/weight"), Column("rate", unit="GB/s")]
    columns += [Column("share", "of roofline", format=percent)]
    columns += [Column("spread", "spread", format=percent), Column("best", "best", clock.unit)]
    if any(entry.extra is not None for entry in entries):
        columns.append(Column("extra", "extra B/weight"))
    columns.append(Column("runs", "runs"))
    base_task = next(entry.task for entry in entries if entry.name == base)
    return Table(
        title,
        machine,
        columns,
        [_row(entry, base_task, clock, bandwidth, numel) for entry in entries],
        roofline=str(bandwidth),
        limits=bandwidth.limits() | {"mode": clock.basis, "unit": clock.unit},
    )


def _row(
    entry: Entry, base: Task, clock: CpuClock | CudaClock, bandwidth: Bandwidth, numel: int
) -> Row:
    task, basis = entry.task, clock.basis
    cells = {"what": entry.name}
    for mode in clock.modes:
        cells[mode.name] = task.median(mode.name)
        cells[f"{mode.name} ratio"] = ratio(cells[mode.name], base.median(mode.name))
    medians = [task.median(basis), *(task.median(mode.name) for mode in clock.modes)]
    # What a CUDA graph cannot hold is judged by its eager time.
    seconds = next((s for s in medians if s is not None), None)
    cells["rated time"] = seconds
    if entry.missing:
        cells[clock.modes[0].name] = entry.missing
    cells["traffic"] = entry.traffic / numel
    cells["rate"] = seconds and entry.traffic / seconds
    cells["share"] = seconds and bandwidth.share(entry.traffic, seconds)
    cells |= {"spread": task.spread(basis), "best": task.best(basis), "extra": entry.extra}
    cells["runs"] = max(map(len, task.samples.values()), default=0)
    return Row(cells, task.samples)


def plot(tables: Sequence[Table], path: Path) -> None:
    """Draws the times of every table as bars."""
    panels = []
    for table in tables:
        rows = [row for row in table.rows if row["rated time"] is not None]
        unit, mode = table.limits["unit"], table.limits["mode"]
        lengths = [row["rated time"] * SCALES[unit] for row in rows]
        panels.append(
            Bars(
                table.title, f"median {unit}, {mode}", [row["what"] for row in rows], {"": lengths}
            )
        )
    plot_bars(panels, path)
