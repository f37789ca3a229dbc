"""Tables and pictures of whole networks: packed beside dense, and where the time goes."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.report import (
    UNITS,
    bars,
    grid,
    new_figure,
    number,
    percent,
    save_figure,
)
from issp.deploy import report as pack_report
from issp.utils.timing import Task


@dataclass(frozen=True)
class Where:
    """Shares of a packed network's time: in sparse layers, in layers left dense, elsewhere."""

    sparse: float
    dense: float
    rest: float


@dataclass
class Dense:
    """The dense network in one precision and layout.

    Attributes:
        variant: as printed: "fp32 channels_last".
        precision: of its products.
        task: its times.
    """

    variant: str
    precision: str
    task: Task

    @property
    def name(self) -> str:
        """As printed."""
        return f"dense {self.variant}"


@dataclass
class Packed:
    """The packed network at one sparsity.

    Attributes:
        v: rows that share a pattern.
        sparsity: asked for.
        weights, kept: of all convolutions and linear layers.
        layers: what packing did to each.
        task: its times.
        where: they go; None: not measured.
    """

    v: int
    sparsity: float
    weights: int
    kept: int
    layers: pack_report.PackReport
    task: Task | None = None
    where: Where | None = None

    @property
    def name(self) -> str:
        """As notes name it."""
        return f"v={self.v} at {100 * self.sparsity:g} %"


@dataclass
class Report:
    """The measurements of one network on one input.

    Attributes:
        model: with its scale: "edsr-l x4".
        shape: of the input.
        machine: see `bench.harness.machine`.
        mode: name of the timed mode.
        dense, packed: the rows.
        notes: sentences under the table.
    """

    model: str
    shape: str
    machine: str
    mode: str
    dense: list[Dense]
    packed: list[Packed]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Network and input."""
        return f"{self.model} on {self.shape}, packed and dense"

    def rows(self) -> list[Dense | Packed]:
        """All that was timed."""
        return [*self.dense, *self.packed]

    def seconds(self, row: Dense | Packed | None) -> float | None:
        """Median; None where it could not be timed."""
        return None if row is None else row.task.median(self.mode)

    def best(self, precision: str) -> Dense | None:
        """The fastest dense network of a precision."""
        found = [row for row in self.dense if row.precision == precision]
        return min(filter(self.seconds, found), key=self.seconds, default=None)

    def others(self) -> list[str]:
        """The precisions of dense beside fp32."""
        return list(dict.fromkeys(row.precision for row in self.dense if row.precision != "fp32"))

    def speed(self, row: Packed, precision: str = "fp32") -> float | None:
        """How many times faster a packed network is than the fastest dense one of a precision."""
        dense, mine = self.seconds(self.best(precision)), self.seconds(row)
        return None if dense is None or mine is None else dense / mine

    def markdown(self) -> str:
        """The table with machine line and notes."""
        plain, others = self._plain(), self.others()
        head = ["model", "input", "v", "sparsity", "kept weights", *(f"{d.name} ms" for d in plain)]
        head += ["packed ms", "spread", "speed", "sparse layers"]
        head += ["time in sparse layers", "in dense layers", "the rest"] * self._has_where()
        for precision in others:
            best = self.best(precision)
            head += [f"{best.name if best else precision} ms", f"speed over {precision}"]
        text = [f"### {self.title}", "", self.machine, ""]
        text += grid(head, map(self._cells, self.packed))
        return "\n".join([*text, "", *(f"- {note}" for note in self.notes), ""])

    def record(self) -> dict[str, Any]:
        """Title, machine and every measured time in seconds, for JSON."""
        packed = [
            {
                "v": row.v,
                "sparsity": row.sparsity,
                "weights": row.weights,
                "kept": row.kept,
                "layers": {line.name: line.choice for line in row.layers.lines},
                "seconds": row.task.samples,
            }
            for row in self.packed
        ]
        return {
            "title": self.title,
            "machine": self.machine,
            "dense": {row.variant: row.task.samples for row in self.dense},
            "packed": packed,
        }

    def _plain(self) -> list[Dense]:
        return [row for row in self.dense if row.precision == "fp32"]

    def _has_where(self) -> bool:
        return any(row.where for row in self.packed)

    def _cells(self, row: Packed) -> list[str]:
        sparse = sum(line.is_sparse for line in row.layers.lines)
        cells = [self.model, self.shape, str(row.v), f"{100 * row.sparsity:g} %"]
        cells += [f"{row.kept:,} ({100 * row.kept / row.weights:.3g} %)"]
        cells += [_milli(self.seconds(dense)) for dense in self._plain()]
        cells += [_milli(self.seconds(row)), percent(row.task.spread(self.mode))]
        cells += [number(self.speed(row)), f"{sparse} of {len(row.layers.lines)}"]
        if self._has_where():
            shares = row.where
            cells += [percent(x) for x in (shares.sparse, shares.dense, shares.rest)]
        for precision in self.others():
            best = self.seconds(self.best(precision))
            cells += [_milli(best), number(self.speed(row, precision))]
        return cells


def _milli(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * UNITS["ms"])


def plot(reports: Sequence[Report], path: Path) -> None:
    """Bars of the times, one panel per network: dense in gray, packed in colour."""
    heights = [1.3 + 0.28 * len(report.rows()) for report in reports]
    figure = new_figure(figsize=(9, sum(heights)))
    panels = figure.subplots(len(reports), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, report in zip(panels, reports, strict=True):
        timed = [row for row in report.rows() if report.seconds(row) is not None]
        names = [row.name if isinstance(row, Dense) else f"issp {row.name}" for row in timed]
        bars(panel, names, [report.seconds(row) * UNITS["ms"] for row in timed])
        panel.set_xlabel(f"median ms, {report.mode}")
        panel.set_title(textwrap.fill(report.title, 90), fontsize="small")
        panel.margins(x=0.15)
    save_figure(figure, path)
