"""How the step's time grows: with the weights of one tensor, and with tensors at a fixed total."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from bench import baselines
from bench.harness import options
from bench.harness.bandwidth import Bandwidth
from bench.harness.machine import free_bytes, machine_line
from bench.harness.plots import Lines, plot_lines
from bench.harness.table import Column, Row, Table, percent, ratio
from bench.harness.timing import CpuClock, CudaClock, Mode, Task, interleave
from bench.harness.workload import Workload

COUNTS = (1, 3, 10, 30, 100, 300, 1000)
_KTHVALUE = "torch.kthvalue"
_SIZE_ROWS = (baselines.STEP, baselines.COLD, baselines.FLAT, baselines.TOPK, _KTHVALUE)
_COUNT_ROWS = (*(baselines.STEP, baselines.COLD, baselines.BASE, baselines.FLAT, baselines.TOPK),)
# Bytes per weight at once beyond weights and copy: |w|, values and indices, and on a CPU topk's
# pairs of value and index.
_EXTRA_BYTES = {baselines.TOPK: 32, _KTHVALUE: 20}
_STYLES = {
    baselines.STEP: {"color": "tab:orange", "linewidth": 2.5, "marker": "o"},
    baselines.COLD: {"color": "tab:orange", "linestyle": "--", "marker": "o", "markersize": 4},
    baselines.FLAT: {"color": "tab:gray", "marker": "o", "markersize": 4},
    baselines.BASE: {"color": "tab:gray", "linestyle": "--", "marker": "o", "markersize": 4},
    baselines.TOPK: {"color": "tab:blue", "marker": "o", "markersize": 4},
    _KTHVALUE: {"color": "tab:blue", "linestyle": "--", "marker": "o", "markersize": 4},
}
_FAN_IN = 1000
_SHARE_OF_MEMORY = 0.9
_FIRST_GUESS = 3e-9  # seconds per weight of a perturbation and a step, until they have been timed


@dataclass
class Point:
    """One place on the axis.

    Attributes:
        x: weights of the tensor, or number of tensors.
        shapes: of the weights.
        samples: row name -> seconds of each call.
        medians: row name -> median of them.
        skipped: row name -> why it was not timed.
    """

    x: int
    shapes: Sequence[tuple[int, int]]
    samples: dict[str, list[float]] = field(default_factory=dict)
    medians: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Weights in all."""
        return sum(rows * columns for rows, columns in self.shapes)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that only --scaling looks at."""
    parser.add_argument(
        "--largest", type=int, help="largest tensor of --scaling, default 10^9 (quick: 10^7)"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds for --scaling, default 240 (quick: 40)"
    )


def run(args: argparse.Namespace, settings: Any) -> None:
    """Measures, prints and writes both curves; `settings`: see `bench.step.Settings`."""
    largest = (10**7 if args.quick else 10**9) if args.largest is None else args.largest
    budget = (40.0 if args.quick else 240.0) if args.budget is None else args.budget
    if largest < 1000:
        raise ValueError(f"--largest is {largest}: use at least 1000")
    if budget <= 0:
        raise ValueError(f"--budget is {budget}: it must be above 0")
    factors = (1,) if args.quick else (1, 3)
    sizes = [f * 10**e for e in range(3, 10) for f in factors if f * 10**e <= largest]
    total = min(largest, 10**6 if args.quick else 10**7)
    counts = [count for count in COUNTS if total // count >= 100]
    end = time.monotonic() + budget
    points = [Point(count, [layer(total // count)] * count) for count in counts]
    tensors = measure("tensors", _COUNT_ROWS, points, settings, budget / 4)
    points = [Point(n, [layer(n)]) for n in sizes]
    weights = measure("weights", _SIZE_ROWS, points, settings, end - time.monotonic())
    tables = [weights, tensors]
    for table in tables:
        print(table.markdown(), flush=True)
    options.write_outputs(
        args, tables, lambda path: plot_lines([[_lines(table) for table in tables]], path, 4.4)
    )


def layer(numel: int) -> tuple[int, int]:
    """A layer of about so many weights, and of one fan-in: it sets the scale of the weights.

    One row of a million would start at a thousandth, which a step's perturbation changes a lot.
    """
    return max(1, numel // _FAN_IN), min(numel, _FAN_IN)


def measure(
    axis: str, names: Sequence[str], points: Sequence[Point], settings: Any, budget: float
) -> Table:
    """Times the rows at every point, as far as memory and time allow.

    Args:
        axis: "weights" or "tensors".
        names: of `bench.baselines.OPERATIONS`.
        points: in rising order; get their times.
        settings: see `bench.step.Settings`.
        budget: seconds for everything.
    """
    clock = settings.clock()
    # Not cold on a CPU: between two flushes even Python's own code has left the caches, and small
    # tensors would all take the same 0.2 ms.
    wanted = "graph" if settings.device == "cuda" else "warm"
    mode = next(mode for mode in clock.modes if mode.name == wanted)
    machine = machine_line(settings.device)
    probe = settings.probe()
    interleave(probe.tasks, clock, settings.rounds, settings.seconds, [mode])
    run_ = _Run(names, settings, clock, mode, _Pace(budget, len(points)))
    for point in points:
        run_.fill(point)
    total = points[-1].numel
    what = "one tensor" if axis == "weights" else f"{total} weights in several tensors"
    bandwidth = probe.result(mode.name)
    return Table(
        f"scaling: {what}, {settings.dtype}, sparsity {settings.sparsity}, "
        f"shrink {settings.shrink}",
        machine,
        _columns(axis, names, clock.unit),
        [_row(point, axis, names, settings.element_size, bandwidth) for point in points],
        _notes(axis, points, mode),
        roofline=str(bandwidth),
        limits=bandwidth.limits() | {"axis": axis, "mode": mode.name},
    )


def _columns(axis: str, names: Sequence[str], unit: str) -> list[Column]:
    return [
        Column(axis, axis),
        *(Column(name, name, unit) for name in names),
        *(Column("per weight", "step ns/weight"), Column("rate", unit="GB/s")),
        Column("share", "of roofline", format=percent),
        Column("over multiply", f"step / {baselines.FLAT}"),
        Column("topk over", "topk / step"),
    ]


def _row(point: Point, axis: str, names: Sequence[str], size: int, bandwidth: Bandwidth) -> Row:
    step = point.medians.get(baselines.STEP)
    traffic = (2 * size + 1 / 8) * point.numel
    medians = {name: point.medians.get(name) for name in names}
    cells = {axis: point.x, "numel": point.numel, **medians, "skipped": point.skipped}
    cells["per weight"] = step and step / point.numel * 1e9
    cells["rate"] = step and traffic / step
    cells["share"] = step and bandwidth.share(traffic, step)
    cells["over multiply"] = ratio(step, point.medians.get(baselines.FLAT))
    cells["topk over"] = ratio(point.medians.get(baselines.TOPK), step)
    cells["roofline per weight"] = (2 * size + 1 / 8) / bandwidth.peak * 1e9
    return Row(cells, point.samples)


def _notes(axis: str, points: Sequence[Point], mode: Mode) -> list[str]:
    notes = [
        f"Medians, {mode.name}, all rows of a line in turn. Bytes counted for the step: read "
        "w, write w, read the mask; above 100 % the caches held them. topk and kthvalue only "
        "select."
    ]
    for point in points:
        reasons: dict[str, list[str]] = {}
        for name, reason in point.skipped.items():
            reasons.setdefault(reason, []).append(name)
        notes += [
            f"{point.x} {axis}: {', '.join(names)} skipped, {reason}."
            for reason, names in reasons.items()
        ]
    return notes


class _Pace:
    """What is left of the budget, and how long a call will take, judged by the last point."""

    def __init__(self, budget: float, points: int) -> None:
        self._end, self._points = time.monotonic() + budget, points
        self._per_weight: dict[str, float] = {}

    def remaining(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def update(self, name: str, seconds: float, numel: int) -> None:
        """Keeps the seconds per weight of a call."""
        self._per_weight[name] = seconds / numel

    def guess(self, name: str, numel: int, default: float = 0.0) -> float:
        """Seconds of a call."""
        return self._per_weight.get(name, default) * numel

    def share(self) -> float:
        """Seconds that one row may take at one point."""
        return max(0.0, self.remaining()) / (2 * self._points)


@dataclass
class _Run:
    """Times rows at one point after the other."""

    names: Sequence[str]
    settings: Any
    clock: CpuClock | CudaClock
    mode: Mode
    pace: _Pace

    def fill(self, point: Point) -> None:
        """Fills in the times of a point, and why a row has none."""
        settings, pace = self.settings, self.pace
        free = _SHARE_OF_MEMORY * free_bytes(settings.device)
        # Weights, the copy for mul_, state.
        base = point.numel * (2 * settings.element_size + 1)
        step = pace.guess("warm up", point.numel, _FIRST_GUESS)
        reason = _memory_reason(base, free) or _time_reason(5 * step, pace)
        if reason:
            point.skipped = dict.fromkeys(self.names, reason)
            return
        workload = settings.workload(point.shapes)
        steps = max(5, min(settings.settle, int(pace.share() / step)))
        begin = time.monotonic()
        workload.warm_up(steps)
        workload.synchronize()
        pace.update("warm up", (time.monotonic() - begin) / steps, point.numel)
        tasks = {}
        for op in (op for op in baselines.OPERATIONS if op.name in self.names):
            needs = base + point.numel * _EXTRA_BYTES.get(op.name, 0)
            guess = pace.guess(op.name, point.numel)
            reason = _memory_reason(needs, free) or _time_reason(2 * guess, pace)
            if reason:
                point.skipped[op.name] = reason
            else:
                tasks[op.name] = _task(op, workload)
        seconds = min(settings.seconds, pace.share())
        interleave(list(tasks.values()), self.clock, settings.rounds, seconds, [self.mode])
        for name, task in tasks.items():
            if task.error:
                point.skipped[name] = task.error
                continue
            point.samples[name] = task.samples[self.mode.name]
            point.medians[name] = task.median(self.mode.name)
            pace.update(name, point.medians[name], point.numel)


def _task(op: baselines.Operation, workload: Workload) -> Task:
    return Task(op.make(workload), lambda: op.prepare(workload), required=op.ours)


def _memory_reason(needs: float, free: float) -> str | None:
    if needs <= free:
        return None
    return f"needs up to {needs / 1e9:.3g} GB and {free / 1e9:.3g} GB are free"


def _time_reason(seconds: float, pace: _Pace) -> str | None:
    if seconds <= max(0.0, pace.remaining()):
        return None
    return f"would take about {seconds:.2g} s and {max(0.0, pace.remaining()):.2g} s are left"


def _lines(table: Table) -> Lines:
    """Nanoseconds per weight against the axis, both logarithmic."""
    axis = table.limits["axis"]
    lines = Lines(
        table.title.removeprefix("scaling: "),
        f"number of {axis}",
        f"ns per weight, {table.limits['mode']}",
    )
    for name, style in _STYLES.items():
        timed = [row for row in table.rows if row.cells.get(name) is not None]
        if timed:
            x = [row[axis] for row in timed]
            y = [row[name] / row["numel"] * 1e9 for row in timed]
            lines.series.append((name, x, y, style))
    level = table.rows[0]["roofline per weight"]
    lines.series.append(("roofline", None, level, {"color": "black", "linestyle": ":"}))
    return lines
