"""How the step's time grows: with the weights of one tensor, and with tensors at a fixed total."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench import baselines
from bench.harness import options
from bench.harness.bandwidth import Probe, Roof
from bench.harness.machine import free_bytes, machine_line
from bench.harness.report import UNITS, grid, new_figure, number, percent, save_figure
from bench.harness.workload import Workload
from issp.utils.timing import CpuClock, CudaClock, Task, interleave

COUNTS = (1, 3, 10, 30, 100, 300, 1000)
_SIZE_ROWS = (baselines.STEP, baselines.COLD, baselines.FLAT, baselines.TOPK, "torch.kthvalue")
_COUNT_ROWS = (baselines.STEP, baselines.COLD, baselines.BASE, baselines.FLAT, baselines.TOPK)
# Bytes per weight at once beyond weights and copy: |w|, values and indices, and on a CPU topk's
# pairs of value and index.
_NEEDS = {baselines.TOPK: 32, "torch.kthvalue": 20}
_STYLES = {
    baselines.STEP: {"color": "tab:orange", "linewidth": 2.5},
    baselines.COLD: {"color": "tab:orange", "linestyle": "--", "markersize": 4},
    baselines.FLAT: {"color": "tab:gray", "markersize": 4},
    baselines.BASE: {"color": "tab:gray", "linestyle": "--", "markersize": 4},
    baselines.TOPK: {"color": "tab:blue", "markersize": 4},
    "torch.kthvalue": {"color": "tab:blue", "linestyle": "--", "markersize": 4},
}
_FAN_IN = 1000
_SHARE_OF_MEMORY = 0.9
_FIRST_GUESS = 3e-9  # seconds per weight of a drift and a step, until they have been timed


@dataclass
class Point:
    """One place on the axis.

    Attributes:
        x: weights of the tensor, or number of tensors.
        numel: weights in all.
        samples: row name -> seconds of each call.
        skipped: row name -> why it was not timed.
    """

    x: int
    numel: int
    samples: dict[str, list[float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def seconds(self, name: str) -> float | None:
        """Median of a row, or None."""
        calls = sorted(self.samples.get(name, ()))
        return (calls[(len(calls) - 1) // 2] + calls[len(calls) // 2]) / 2 if calls else None


@dataclass
class Curve:
    """Times of some rows along one axis.

    Attributes:
        title, machine, unit, mode: as printed; mode: how the clock timed.
        axis: what `Point.x` counts.
        names: of the rows.
        size: bytes of one weight.
        roof: bandwidth of the machine.
        points: in rising order.
    """

    title: str
    machine: str
    unit: str
    mode: str
    axis: str
    names: Sequence[str]
    size: int
    roof: Roof
    points: list[Point] = field(default_factory=list)

    def markdown(self) -> str:
        """The table: medians of every row, then the step's rate and its ratios."""
        multiply = baselines.FLAT
        head = [self.axis, *(f"{name} {self.unit}" for name in self.names)]
        head += ["step ns/weight", "GB/s", "of roofline", f"step / {multiply}", "topk / step"]
        text = [f"### {self.title}", "", self.machine, "", f"Roofline: {self.roof}.", ""]
        text += grid(head, map(self._cells, self.points))
        notes = [
            f"Medians, {self.mode}, all rows of a line in turn. Bytes counted for the step: read "
            "w, write w, read the mask; above 100 % the caches held them. topk and kthvalue only "
            "select."
        ]
        for point in self.points:
            reasons: dict[str, list[str]] = {}
            for name, reason in point.skipped.items():
                reasons.setdefault(reason, []).append(name)
            notes += [
                f"{point.x} {self.axis}: {', '.join(names)} skipped, {reason}."
                for reason, names in reasons.items()
            ]
        return "\n".join([*text, "", *(f"- {note}" for note in notes), ""])

    def record(self) -> dict[str, Any]:
        """Title, machine and every measured time in seconds, for JSON."""
        return {
            "title": self.title,
            "machine": self.machine,
            "roofline": {"copy": self.roof.copy, "multiply": self.roof.multiply},
            "axis": self.axis,
            "points": [
                {"x": p.x, "numel": p.numel, "seconds": p.samples, "skipped": p.skipped}
                for p in self.points
            ],
        }

    def _cells(self, point: Point) -> list[str]:
        times = [point.seconds(name) for name in self.names]
        factor = UNITS[self.unit]
        cells = [str(point.x), *(number(None if t is None else t * factor) for t in times)]
        step, multiply, topk = map(point.seconds, (baselines.STEP, baselines.FLAT, baselines.TOPK))
        if step is None:
            return [*cells, "-", "-", "-", "-", "-"]
        traffic = (2 * self.size + 1 / 8) * point.numel
        cells += [number(step / point.numel * 1e9), number(traffic / step / 1e9)]
        cells += [percent(self.roof.share(traffic, step))]
        cells += [number(multiply and step / multiply), number(topk and topk / step)]
        return cells


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that only --scaling looks at."""
    parser.add_argument(
        "--largest", type=int, help="largest tensor of --scaling, default 10^9 (quick: 10^7)"
    )
    parser.add_argument(
        "--budget", type=float, help="seconds for --scaling, default 240 (quick: 40)"
    )


def run(args: argparse.Namespace, settings) -> list[Curve]:
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
    places = [(count, [layer(total // count)] * count) for count in counts]
    tensors = measure("tensors", _COUNT_ROWS, places, settings, budget / 4)
    places = [(n, [layer(n)]) for n in sizes]
    weights = measure("weights", _SIZE_ROWS, places, settings, end - time.monotonic())
    curves = [weights, tensors]
    for curve in curves:
        print(curve.markdown(), flush=True)
    options.deliver(args, curves, plot)
    return curves


def layer(numel: int) -> tuple[int, int]:
    """A layer of about so many weights, and of one fan-in: it sets the scale of the weights.

    One row of a million would start at a thousandth, where the drift of a step is no small change.
    """
    return max(1, numel // _FAN_IN), min(numel, _FAN_IN)


def measure(
    axis: str,
    names: Sequence[str],
    places: Sequence[tuple[int, list[tuple[int, int]]]],
    settings,
    budget: float,
) -> Curve:
    """Times the rows at every place, as far as memory and time allow.

    Args:
        axis: "weights" or "tensors".
        names: of rows in `peers.ROWS`.
        places: what the axis counts -> shapes of the weights.
        settings: see `bench.step.Settings`.
        budget: seconds for everything.
    """
    clock = (CudaClock if settings.device == "cuda" else CpuClock)(settings.flush_bytes)
    # Not cold on a CPU: between two flushes even Python's own code has left the caches, and small
    # tensors would all take the same 0.2 ms.
    wanted = "graph" if settings.device == "cuda" else "warm"
    mode = next(mode for mode in clock.modes if mode.name == wanted)
    rows = [row for row in baselines.ROWS if row.name in names]
    machine = machine_line(settings.device)
    probe = Probe(settings.device, settings.probe_bytes)
    interleave(probe.tasks, clock, settings.rounds, settings.seconds, [mode])
    total = sum(rows_ * columns for rows_, columns in places[-1][1])
    what = "one tensor" if axis == "weights" else f"{total} weights in several tensors"
    curve = Curve(
        title=f"scaling: {what}, {settings.dtype}, sparsity {settings.sparsity}, "
        f"shrink {settings.shrink}",
        machine=machine,
        unit=clock.unit,
        mode=mode.name,
        axis=axis,
        names=[row.name for row in rows],
        size=getattr(torch, settings.dtype).itemsize,
        roof=probe.roof(mode.name),
    )
    pace = _Pace(budget, len(places))
    for x, model_shapes in places:
        point = Point(x, sum(rows_ * columns for rows_, columns in model_shapes))
        curve.points.append(point)
        _fill(point, model_shapes, rows, settings, clock, mode, pace)
    return curve


class _Pace:
    """What is left of the budget, and how long a call will take, judged by the last place."""

    def __init__(self, budget: float, places: int) -> None:
        self._end, self._places = time.monotonic() + budget, places
        self._per_weight: dict[str, float] = {}

    def left(self) -> float:
        """Seconds."""
        return self._end - time.monotonic()

    def learn(self, name: str, seconds: float, numel: int) -> None:
        """Keeps the seconds per weight of a call."""
        self._per_weight[name] = seconds / numel

    def guess(self, name: str, numel: int, default: float = 0.0) -> float:
        """Seconds of a call."""
        return self._per_weight.get(name, default) * numel

    def share(self) -> float:
        """Seconds that one row may take at one place."""
        return max(0.0, self.left()) / (2 * self._places)


def _fill(point: Point, model_shapes, rows, settings, clock, mode, pace: _Pace) -> None:
    size = getattr(torch, settings.dtype).itemsize
    free = _SHARE_OF_MEMORY * free_bytes(settings.device)
    base = point.numel * (2 * size + 1)  # weights, the copy for mul_, state
    step = pace.guess("settle", point.numel, _FIRST_GUESS)
    reason = _too_much(base, free) or _too_slow(5 * step, pace)
    if reason:
        point.skipped = dict.fromkeys((row.name for row in rows), reason)
        return
    dtype = getattr(torch, settings.dtype)
    work = Workload(model_shapes, settings.sparsity, dtype, settings.device, settings.shrink)
    steps = max(5, min(settings.settle, int(pace.share() / step)))
    begin = time.monotonic()
    work.settle(steps)
    work.synchronize()
    pace.learn("settle", (time.monotonic() - begin) / steps, point.numel)
    tasks = {}
    for row in rows:
        needs = base + point.numel * _NEEDS.get(row.name, 0)
        reason = _too_much(needs, free) or _too_slow(2 * pace.guess(row.name, point.numel), pace)
        if reason:
            point.skipped[row.name] = reason
        else:
            tasks[row.name] = Task(row.make(work), _prepare(row, work), required=row.ours)
    interleave(
        list(tasks.values()), clock, settings.rounds, min(settings.seconds, pace.share()), [mode]
    )
    for name, task in tasks.items():
        if task.error:
            point.skipped[name] = task.error
            continue
        point.samples[name] = task.samples[mode.name]
        pace.learn(name, task.median(mode.name), point.numel)


def _prepare(row, work: Workload):
    return lambda: row.prepare(work)


def _too_much(needs: float, free: float) -> str | None:
    if needs <= free:
        return None
    return f"needs up to {needs / 1e9:.3g} GB and {free / 1e9:.3g} GB are free"


def _too_slow(seconds: float, pace: _Pace) -> str | None:
    if seconds <= max(0.0, pace.left()):
        return None
    return f"would take about {seconds:.2g} s and {max(0.0, pace.left()):.2g} s are left"


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Nanoseconds per weight against the axis of each curve, both logarithmic, side by side."""
    figure = new_figure(figsize=(11, 5))
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    handles = {}
    for panel, curve in zip(panels, curves, strict=True):
        for name in curve.names:
            known = [p for p in curve.points if p.samples.get(name)]
            x = [p.x for p in known]
            y = [p.seconds(name) / p.numel * 1e9 for p in known]
            handles[name] = panel.plot(x, y, label=name, marker="o", **_STYLES[name])[0]
        limit = (2 * curve.size + 1 / 8) / curve.roof.rate * 1e9
        handles["roofline"] = panel.axhline(limit, color="black", linestyle=":", label="roofline")
        panel.set(xscale="log", yscale="log")
        panel.set_xlabel(f"number of {curve.axis}")
        panel.set_ylabel(f"ns per weight, {curve.mode}")
        panel.set_title(curve.title.removeprefix("scaling: "), fontsize="small")
        panel.grid(True, alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="outside lower center", ncols=4)
    save_figure(figure, path)
