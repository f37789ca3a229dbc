"""The figures that the sparse products must show, each with its target beside it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.harness.report import UNITS, grid, number
from bench.products import report as products_report
from bench.products.forms import Form
from bench.products.layers import Layer
from bench.products.report import Entry, Report

SPARSITIES = (0.9, 0.95, 0.99)
STEP_AT = 0.95
LAYERS = (
    Layer((256, 256, 3, 3), (1, 256, 48, 48)),
    Layer((60, 60, 3, 3), (1, 60, 64, 64)),
    Layer((256, 256, 1, 1), (1, 256, 32, 32)),
)
_STEP_TARGET = 3.0


@dataclass(frozen=True)
class Column:
    """One column of the table.

    Attributes:
        form: what is timed.
        base: precision of the dense product that it is compared with, in its fastest layout.
        targets: per layer, one per sparsity; None: reported only.
        step: target of the training step of the first layer; None: not timed.
    """

    form: Form
    base: str
    targets: Sequence[Sequence[float] | None]
    step: float | None = None


_PLAIN = ((4, 7, 16), (5, 8, 20), (4, 6, 9))
_SHARED = ((6, 10, 25), (7, 11, 30), (6, 9, 14))  # by four rows of the weight
COLUMNS = {
    "cpu": (
        Column(Form(nm=False), "fp32", _PLAIN, _STEP_TARGET),
        Column(Form(1), "fp32", _PLAIN, _STEP_TARGET),
        Column(Form(4, nm=False), "fp32", _SHARED, _STEP_TARGET),
        Column(Form(4), "fp32", _SHARED, _STEP_TARGET),
    ),
    "cuda": (
        Column(Form(4), "fp32", ((9, 15, 35), (4, 6, 10), None)),
        Column(Form(16, precision="tf32"), "tf32", ((4, 8, 18), None, None)),
    ),
}


@dataclass
class Figure:
    """One measured ratio.

    Attributes:
        layer, column, sparsity, pass_: which.
        entry, dense: the calls that are compared.
        speed: how many times faster; None where it could not be timed.
        target: that it must reach, or None.
    """

    layer: Layer
    column: Column
    sparsity: float
    pass_: str
    entry: Entry
    dense: Entry
    speed: float | None
    target: float | None

    @property
    def verdict(self) -> str:
        """Whether the target is reached, in a word."""
        if self.target is None or self.speed is None:
            return "-"
        return "yes" if self.speed >= self.target else "no"


@dataclass
class Targets:
    """The table for one number of threads."""

    reports: list[Report]
    figures: list[Figure]

    @property
    def title(self) -> str:
        """With the number of threads."""
        threads = self.reports[0].threads
        return f"What must show, {threads} thread{'s' * (threads > 1)}"

    def markdown(self) -> str:
        """The short table, then every figure with its times."""
        first = self.reports[0]
        missed = [f for f in self.figures if f.verdict == "no"]
        known = [f for f in self.figures if f.target is not None]
        text = [f"### {self.title}", "", first.machine, "", *self._short(), ""]
        text += [f"{len(known) - len(missed)} of {len(known)} targets reached.", "", *self._long()]
        notes = dict.fromkeys(note for report in self.reports for note in report.notes)
        return "\n".join([*text, "", *(f"- {note}" for note in notes), ""])

    def _short(self) -> list[str]:
        columns = list(dict.fromkeys(f.column for f in self.figures))
        percents = " / ".join(f"{100 * s:g}" for s in SPARSITIES)
        head = ["layer", *(f"{c.form.name} over {c.base}, {percents} %" for c in columns)]
        rows = []
        for layer in LAYERS:
            for pass_ in products_report.WORDS:
                mine = [f for f in self.figures if (f.layer, f.pass_) == (layer, pass_)]
                if mine:
                    where = layer.name + f", step at {100 * STEP_AT:g} %" * (pass_ == "step")
                    cells = [[f for f in mine if f.column == column] for column in columns]
                    rows.append([where, *map(_cell, cells)])
        return grid(head, rows)

    def _long(self) -> list[str]:
        mode = self.reports[0].modes[0]
        head = ["layer", "pass", "form", "pattern", f"{mode} us", "GFLOP/s", "of roofline"]
        head += ["dense", f"{mode} us", "speed", "target", "reached"]
        rows = []
        for f in self.figures:
            report = next(r for r in self.reports if r.layer == f.layer)
            rate, target = report.rate(f.entry), f.target
            rows.append(
                [
                    *(f.layer.name, f.pass_, f.entry.name, f.entry.label),
                    _micro(report.seconds(f.entry)),
                    number(None if rate is None else rate / 1e9),
                    products_report.percent(report.share(f.entry)),
                    *(f.dense.name, _micro(report.seconds(f.dense)), number(f.speed)),
                    *("-" if target is None else f">= {target:g}", f.verdict),
                ]
            )
        return grid(head, rows)

    def record(self) -> dict[str, Any]:
        """Every measured time, for JSON."""
        reports = [report.record() for report in self.reports]
        return {"title": self.title, "machine": self.reports[0].machine, "layers": reports}


def _cell(figures: Sequence[Figure]) -> str:
    if not figures:
        return "-"
    speeds = " / ".join(number(f.speed) for f in figures)
    known = [f"{f.target:g}" for f in figures if f.target is not None]
    return f"{speeds} (must: {' / '.join(known)})" if known else f"{speeds} (reported)"


def _micro(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * UNITS["us"])


def run(
    args: argparse.Namespace, settings: Any, measure: Callable[[Layer, Any], list[Report]]
) -> list[Targets]:
    """Measures the table and prints it, once per number of threads.

    Args:
        args: for the device.
        settings: how long to measure, see `bench.products.measure.Settings`.
        measure: `bench.products.measure.measure`.
    """
    columns = COLUMNS[args.device]
    settings = replace(
        settings,
        sparsities=SPARSITIES,
        forms=[column.form for column in columns],
        passes=("forward",),
        peers=False,
    )
    reports = [measure(layer, settings) for layer in LAYERS]
    if any(column.step for column in columns):
        settings = replace(settings, passes=("step",), sparsities=(STEP_AT,))
        reports.append(measure(LAYERS[0], settings))
    tables = []
    for same in zip(*reports, strict=True):
        figures = [f for report in same for column in columns for f in _figures(report, column)]
        tables.append(Targets(list(same), figures))
        print(tables[-1].markdown(), flush=True)
    return tables


def _figures(report: Report, column: Column) -> list[Figure]:
    place, found = LAYERS.index(report.layer), []
    for entry in report.entries:
        if entry.dense or entry.name != f"issp {column.form.name}":
            continue
        dense = report.best(entry.pass_, column.base)
        if entry.pass_ == "step":
            target = column.step
        else:
            targets = column.targets[place]
            target = targets and targets[SPARSITIES.index(entry.sparsity)]
        speed = report.over(entry, dense)
        found.append(
            Figure(
                *(report.layer, column, entry.sparsity, entry.pass_, entry, dense, speed, target)
            )
        )
    return found


def plot(tables: Sequence[Targets], path: Path) -> None:
    """The curves of the table's forward passes."""
    reports = [r for table in tables for r in table.reports if r.passes() == ["forward"]]
    products_report.plot(reports, path)
