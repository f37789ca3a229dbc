"""The speeds that the sparse ops must reach, each beside its target."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.harness import options
from bench.harness.table import Column, Row, Table, number, percent
from bench.sparse import tables
from bench.sparse.forms import Form
from bench.sparse.layer_times import Entry, LayerTimes
from bench.sparse.layers import Layer

SPARSITIES = (0.9, 0.95, 0.99)
STEP_AT = 0.95
LAYERS = (
    Layer((256, 256, 3, 3), (1, 256, 48, 48)),
    Layer((60, 60, 3, 3), (1, 60, 64, 64)),
    Layer((256, 256, 1, 1), (1, 256, 32, 32)),
)
_STEP_TARGET = 3.0


@dataclass(frozen=True)
class Goal:
    """One column of the table.

    Attributes:
        form: what is timed.
        base: precision of the dense op that it is compared with, in its fastest layout.
        targets: per layer, one per sparsity; None: reported only.
        step: target of the training step of the first layer; None: not timed.
    """

    form: Form
    base: str
    targets: Sequence[Sequence[float] | None]
    step: float | None = None


_PLAIN = ((4, 7, 16), (5, 8, 20), (4, 6, 9))
_SHARED = ((6, 10, 25), (7, 11, 30), (6, 9, 14))  # by four rows of the weight
GOALS = {
    "cpu": (
        Goal(Form(nm=False), "fp32", _PLAIN, _STEP_TARGET),
        Goal(Form(1), "fp32", _PLAIN, _STEP_TARGET),
        Goal(Form(4, nm=False), "fp32", _SHARED, _STEP_TARGET),
        Goal(Form(4), "fp32", _SHARED, _STEP_TARGET),
    ),
    "cuda": (
        Goal(Form(4), "fp32", ((9, 15, 35), (4, 6, 10), None)),
        Goal(Form(16, precision="tf32"), "tf32", ((4, 8, 18), None, None)),
    ),
}


@dataclass
class Speed:
    """One measured ratio.

    Attributes:
        times: of the layer.
        goal: the column.
        entry, dense: the calls that are compared; dense is None where none could be timed.
        target: that the speed must reach, or None.
    """

    times: LayerTimes
    goal: Goal
    entry: Entry
    dense: Entry | None
    target: float | None

    @property
    def speed(self) -> float | None:
        """How many times faster than dense; None where it could not be timed."""
        return self.times.over(self.entry, self.dense)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without a target or a speed."""
        if self.target is None or self.speed is None:
            return None
        return self.speed >= self.target


def run(
    args: argparse.Namespace, settings: Any, measure: Callable[[Layer, Any], list[LayerTimes]]
) -> None:
    """Measures the speeds and prints them, once per number of threads.

    Args:
        args: for the device and the files to write.
        settings: how long to measure, see `bench.sparse.measure.Settings`.
        measure: `bench.sparse.measure.measure`.
    """
    goals = GOALS[args.device]
    settings = replace(
        settings,
        sparsities=SPARSITIES,
        forms=[goal.form for goal in goals],
        passes=("forward",),
        baselines=False,
    )
    forward = [measure(layer, settings) for layer in LAYERS]
    steps = []
    if any(goal.step for goal in goals):
        settings = replace(settings, passes=("step",), sparsities=(STEP_AT,))
        steps.append(measure(LAYERS[0], settings))
    printed = []
    for same_threads in zip(*forward, *steps, strict=True):
        speeds = [s for times in same_threads for goal in goals for s in _speeds(times, goal)]
        for table in (summary(speeds), details(speeds)):
            printed.append(table)
            print(table.markdown(), flush=True)
    all_times = [times for each in forward for times in each]
    options.write_outputs(args, printed, lambda path: tables.plot(all_times, path))


def _speeds(times: LayerTimes, goal: Goal) -> list[Speed]:
    speeds = []
    for entry in times.entries:
        if entry.dense or entry.name != f"issp {goal.form.name}":
            continue
        if entry.pass_ == "step":
            target = goal.step
        else:
            of_layer = goal.targets[LAYERS.index(times.layer)]
            target = of_layer and of_layer[SPARSITIES.index(entry.sparsity)]
        dense = times.best(entry.pass_, goal.base)
        speeds.append(Speed(times, goal, entry, dense, target))
    return speeds


def _title(speeds: Sequence[Speed]) -> str:
    threads = speeds[0].times.threads
    return f"What must show, {threads} thread{'s' * (threads > 1)}"


def summary(speeds: Sequence[Speed]) -> Table:
    """A row per layer and pass: the speeds of every sparsity and their targets."""
    goals = list(dict.fromkeys(s.goal for s in speeds))
    percents = " / ".join(f"{100 * s:g}" for s in SPARSITIES)
    columns = [Column("layer", "layer")]
    columns += [
        Column(goal.form.name, f"{goal.form.name} over {goal.base}, {percents} %") for goal in goals
    ]
    rows = []
    for layer in LAYERS:
        for pass_ in tables.PASS_NAMES:
            same = [s for s in speeds if (s.times.layer, s.entry.pass_) == (layer, pass_)]
            if same:
                step = f", step at {100 * STEP_AT:g} %" if pass_ == "step" else ""
                cells = {"layer": layer.name + step}
                cells |= {
                    goal.form.name: _summary_cell([s for s in same if s.goal == goal])
                    for goal in goals
                }
                rows.append(Row(cells))
    known = [s for s in speeds if s.target is not None]
    missed = [s for s in speeds if s.reached is False]
    note = f"{len(known) - len(missed)} of {len(known)} targets reached."
    return Table(_title(speeds), speeds[0].times.machine, columns, rows, [note])


def _summary_cell(speeds: Sequence[Speed]) -> str | None:
    if not speeds:
        return None
    text = " / ".join("-" if s.speed is None else number(s.speed) for s in speeds)
    targets = " / ".join(f"{s.target:g}" for s in speeds if s.target is not None)
    return f"{text} (must: {targets})" if targets else f"{text} (reported)"


def details(speeds: Sequence[Speed]) -> Table:
    """A row per speed, with the times behind it."""
    mode = speeds[0].times.basis
    columns = [Column(key, key) for key in ("layer", "pass", "form", "pattern")]
    columns += [Column("seconds", mode, "us"), Column("rate", unit="GFLOP/s")]
    columns += [Column("share", "of roofline", format=percent), Column("dense", "dense")]
    columns += [Column("dense seconds", mode, "us"), Column("speed", "speed")]
    columns += [Column("target", "target", format=lambda x: f">= {x:g}")]
    columns += [Column("reached", "reached")]
    rows = []
    for s in speeds:
        times, entry, dense = s.times, s.entry, s.dense
        cells = {"layer": times.layer.name, "pass": entry.pass_, "form": entry.name}
        cells |= {"pattern": entry.label, "seconds": times.seconds(entry)}
        cells |= {"rate": times.rate(entry), "share": times.share(entry)}
        cells |= {"speed": s.speed, "target": s.target}
        if dense:
            cells |= {"dense": dense.name, "dense seconds": times.seconds(dense)}
        if s.reached is not None:
            cells["reached"] = "yes" if s.reached else "no"
        samples = {f"dense {k}": v for k, v in dense.task.samples.items()} if dense else {}
        rows.append(Row(cells, entry.task.samples | samples))
    notes = list(dict.fromkeys(note for s in speeds for note in s.times.notes))
    return Table(f"{_title(speeds)}: times", speeds[0].times.machine, columns, rows, notes)
