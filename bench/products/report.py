"""Tables and pictures of measured products: speed over dense, and from which sparsity on it is one.

Ratios are speeds: 4 means four times faster than what stands behind "over".
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.bandwidth import Roof
from bench.harness.report import UNITS, grid, new_figure, number, percent, save_figure
from bench.products.layers import Layer
from issp.utils.timing import Task

_MARKS = "os^Dv*"
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)


@dataclass
class Entry:
    """One timed call.

    Attributes:
        name: what computes: "dense fp32", "N:M v=4", "torch CSR".
        pass_: "forward" or "step".
        precision: of the products, for the roofline.
        flops: of the useful work, two per weight that is not zero and application.
        nbytes: what must be read and written: activations, gradients and stored weights.
        task: its times.
        dense: it computes the dense product.
        sparsity: asked for, None for dense.
        actual: the share that is pruned; less than asked where no pattern divides the channels.
        label: pattern and actual sparsity.
    """

    name: str
    pass_: str
    precision: str
    flops: float
    nbytes: float
    task: Task
    dense: bool = False
    sparsity: float | None = None
    actual: float | None = None
    label: str = ""


@dataclass
class Report:
    """The measurements of one layer with one number of threads.

    Attributes:
        layer: what was timed.
        threads: of the CPU.
        machine: see `bench.harness.machine`.
        unit: "us".
        modes: names of the timed modes; the first is what all ratios refer to.
        roof: memory bandwidth of the same rounds.
        peaks: precision -> operations per second of a large matrix product, of its shortest call.
        entries: in the order of printing.
        notes: sentences under the tables.
    """

    layer: Layer
    threads: int
    machine: str
    modes: Sequence[str]
    roof: Roof
    peaks: dict[str, float]
    entries: list[Entry]
    notes: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The layer, where it occurs, threads."""
        found = f" ({', '.join(self.layer.models)})" if self.layer.models else ""
        return f"{self.layer.name}{found}, {self.threads} thread{'s' * (self.threads > 1)}"

    def passes(self) -> list[str]:
        """Those that were timed."""
        return list(dict.fromkeys(entry.pass_ for entry in self.entries))

    def seconds(self, entry: Entry, mode: str | None = None) -> float | None:
        """Median of a mode; by default of the first that was timed. None where it could not be."""
        modes = self.modes if mode is None else [mode]
        return next((s for m in modes if (s := entry.task.median(m)) is not None), None)

    def dense(self, pass_: str) -> list[Entry]:
        """The dense products of one pass that could be timed."""
        found = [e for e in self.entries if e.dense and e.pass_ == pass_]
        return [e for e in found if self.seconds(e) is not None]

    def best(self, pass_: str, precision: str | None = None) -> Entry | None:
        """The fastest dense product, of one precision or of all."""
        found = [e for e in self.dense(pass_) if precision in (None, e.precision)]
        return min(found, key=self.seconds, default=None)

    def over(self, entry: Entry, other: Entry | None) -> float | None:
        """How many times faster an entry is than another."""
        mine = self.seconds(entry)
        return None if mine is None or other is None else self.seconds(other) / mine

    def rate(self, entry: Entry) -> float | None:
        """Useful operations per second."""
        seconds = self.seconds(entry)
        return None if seconds is None else entry.flops / seconds

    def share(self, entry: Entry) -> float | None:
        """Part of the roofline: the time that arithmetic or memory alone would take, over ours."""
        seconds = self.seconds(entry)
        if seconds is None:
            return None
        arithmetic = entry.flops / self.peaks[entry.precision]
        return max(arithmetic, entry.nbytes / self.roof.rate) / seconds

    def curve(self, name: str, pass_: str, precision: str | None) -> list[tuple[float, float]]:
        """Sparsity and speed over the best dense product, ascending.

        Args:
            name: of the entries.
            pass_: theirs.
            precision: of the dense product; None: whichever is fastest.
        """
        base = self.best(pass_, precision)
        found = [e for e in self.entries if (e.name, e.pass_) == (name, pass_) and not e.dense]
        points = [(e.actual, self.over(e, base)) for e in found if e.actual is not None]
        return sorted((s, ratio) for s, ratio in points if ratio is not None)

    def forms(self, pass_: str) -> list[str]:
        """Names of the sparse entries of one pass, in the order of printing."""
        sparse = [e for e in self.entries if not e.dense and e.actual is not None]
        return list(dict.fromkeys(e.name for e in sparse if e.pass_ == pass_))

    def markdown(self) -> str:
        """All tables with machine line and notes."""
        peaks = ", ".join(f"{name} {x / 1e9:.4g}" for name, x in self.peaks.items())
        text = [f"### {self.title}", "", self.machine, ""]
        text += [f"Roofline: GFLOP/s of a large matrix product: {peaks}; memory: {self.roof}.", ""]
        for pass_ in self.passes():
            best = self.best(pass_, "fp32")
            yard = f"; yardstick: {best.name}" if best else ""
            text += [f"**{WORDS[pass_]}**{yard}", "", *self._table(pass_), ""]
        text += ["**Speed over dense, and break-even**", "", *self._summary()]
        return "\n".join([*text, "", *(f"- {note}" for note in self.notes), ""])

    def _table(self, pass_: str) -> list[str]:
        dense = self.dense(pass_)
        head = ["what", "sparsity", *(f"{mode} us" for mode in self.modes), "spread", "GFLOP/s"]
        head += ["of roofline", "over best fp32", *(e.name.replace("dense", "over") for e in dense)]
        bases = [self.best(pass_, "fp32"), *dense]
        rows = []
        for entry in (e for e in self.entries if e.pass_ == pass_):
            rate = self.rate(entry)
            cells = [entry.name, entry.label or "-"]
            cells += [_micro(self.seconds(entry, mode)) for mode in self.modes]
            cells += [percent(entry.task.spread(self.modes[0]))]
            cells += [number(None if rate is None else rate / 1e9), percent(self.share(entry))]
            rows.append(cells + [number(self.over(entry, base)) for base in bases])
        return grid(head, rows)

    def _summary(self) -> list[str]:
        asked = self.asked()
        head = ["form", *(f"{100 * s:g} %" for s in asked), *_ENDS]
        lines = self.speeds(asked)
        return grid(head, [[f"{name}, {pass_}", *cells] for name, pass_, cells in lines])

    def asked(self) -> list[float]:
        """The sparsities that were asked for."""
        return sorted({e.sparsity for e in self.entries if e.sparsity is not None})

    def speeds(self, asked: Sequence[float]) -> list[tuple[str, str, list[str]]]:
        """Form, pass, and as text: speed over the best fp32 layout, where it breaks even."""
        lines = []
        for pass_ in self.passes():
            base = self.best(pass_, "fp32")
            for name in self.forms(pass_):
                mine = {
                    e.sparsity: self.over(e, base)
                    for e in self.entries
                    if (e.name, e.pass_) == (name, pass_)
                }
                ends = [break_even(self.curve(name, pass_, p)) for p in ("fp32", None)]
                lines.append((name, pass_, [*(number(mine.get(s)) for s in asked), *ends]))
        return lines

    def record(self) -> dict[str, Any]:
        """Title, machine and every measured time in seconds, for JSON."""
        timed = [
            {
                "what": e.name,
                "pass": e.pass_,
                "sparsity": e.sparsity,
                "pattern": e.label,
                "seconds": e.task.samples,
            }
            for e in self.entries
        ]
        peaks = {"copy": self.roof.copy, "multiply": self.roof.multiply, "flops": self.peaks}
        return {
            "title": self.title,
            "machine": self.machine,
            "roofline": peaks,
            "seconds": timed,
        }


@dataclass
class Overview:
    """One table over all layers: how fast each form is, and from which sparsity on it pays."""

    reports: Sequence[Report]

    def markdown(self) -> str:
        """The table."""
        asked = sorted({s for report in self.reports for s in report.asked()})
        head = ["layer", "pass", "threads", "form", *(f"{100 * s:g} %" for s in asked), *_ENDS]
        rows = [
            [report.layer.name, pass_, str(report.threads), name, *cells]
            for report in self.reports
            for name, pass_, cells in report.speeds(asked)
        ]
        title = "### Speed over the best dense fp32 layout, and break-even, all layers"
        return "\n".join([title, "", self.reports[0].machine, "", *grid(head, rows), ""])

    def record(self) -> dict[str, Any]:
        """Nothing that the layers' own records do not hold."""
        return {"title": "overview", "layers": [report.title for report in self.reports]}


_ENDS = ("over fp32 from", "over any from")
WORDS = {"forward": "Forward", "step": "Training step: forward, dX, dW"}


def _micro(seconds: float | None) -> str:
    return number(None if seconds is None else seconds * UNITS["us"])


def break_even(curve: Sequence[tuple[float, float]]) -> str:
    """The sparsity from which on a form is faster than dense, in words.

    Args:
        curve: sparsity and speed over dense, ascending.

    Returns:
        "87 %", interpolated between the last point that is slower than dense and the next (the
        logarithms of speed and of what is kept); "below 50 %" or "above 99 %" where the first and
        last points lie on one side; "-" without points.
    """
    if not curve:
        return "-"
    slower = [i for i, (_, ratio) in enumerate(curve) if ratio < 1]
    if not slower:
        return f"below {100 * curve[0][0]:.4g} %"
    if slower[-1] == len(curve) - 1:
        return f"above {100 * curve[-1][0]:.4g} %"
    (s, low), (t, high) = curve[slower[-1] : slower[-1] + 2]
    if t == s:
        return f"{100 * t:.3g} %"
    # A form that stores nothing at all has no logarithm: half a weight in ten million instead.
    a, b = (math.log(max(1 - x, 5e-8)) for x in (s, t))
    place = math.log(1 / low) / math.log(high / low)
    return f"{100 * (1 - math.exp(a + place * (b - a))):.3g} %"


def plot(reports: Sequence[Report], path: Path) -> None:
    """Speed over the best fp32 layout against sparsity: a row per layer, a column per pass.

    One colour per form, dashed for fewer threads; gray lines are the dense products of other
    precisions, black is the yardstick.
    """
    layers = list(dict.fromkeys(report.layer for report in reports))
    passes = list(dict.fromkeys(p for report in reports for p in report.passes()))
    figure = new_figure(figsize=(1 + 5 * len(passes), 0.6 + 3.4 * len(layers)))
    panels = figure.subplots(len(layers), len(passes), squeeze=False)
    names = list(dict.fromkeys(n for r in reports for p in passes for n in r.forms(p)))
    most = max(report.threads for report in reports)
    seen: dict[str, Any] = {}
    for line, layer in zip(panels, layers, strict=True):
        for panel, pass_ in zip(line, passes, strict=True):
            for report in (r for r in reports if r.layer == layer and pass_ in r.passes()):
                style = "-" if report.threads == most else "--"
                _draw(panel, report, pass_, names, style, seen)
            _axes(panel, f"{layer.name}: {pass_}")
    figure.legend(seen.values(), seen.keys(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


def _draw(panel, report: Report, pass_: str, names, style: str, seen: dict[str, Any]) -> None:
    threads = f", {report.threads} thread{'s' * (report.threads > 1)}"
    for i, name in enumerate(names):
        curve = report.curve(name, pass_, "fp32")
        if curve:
            x, y = zip(*((1 - s, ratio) for s, ratio in curve), strict=True)
            mark = _MARKS[i % len(_MARKS)]
            (drawn,) = panel.plot(x, y, style, color=f"C{i}", marker=mark, markersize=4)
            seen.setdefault(name + threads, drawn)
    yard = report.best(pass_, "fp32")
    for precision in report.peaks:
        best = report.best(pass_, precision)
        if precision != "fp32" and best and yard:
            ratio = report.over(best, yard)
            drawn = panel.axhline(ratio, color="gray", linestyle=style, linewidth=1)
            panel.annotate(
                best.name.removeprefix("dense ") + threads,
                (0.01, ratio),
                (0, 2),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                fontsize="xx-small",
                color="gray",
            )
            seen.setdefault("dense, other precisions" + threads, drawn)


def _axes(panel, title: str) -> None:
    panel.axhline(1, color="black", linewidth=1)
    panel.set_xscale("log")
    panel.set_yscale("log")
    ticks = [s for s in (0.5, 0.75, 0.9, 0.95, 0.99) if _inside(panel.get_xlim(), 1 - s)]
    panel.set_xticks([1 - s for s in ticks], [f"{100 * s:g} %" for s in ticks])
    panel.minorticks_off()
    panel.invert_xaxis()
    low, high = panel.get_ylim()
    values = [v for v in _TICKS if low <= v <= high]
    panel.set_yticks(values, [f"{v:g}" for v in values])
    panel.set_xlabel("sparsity")
    panel.set_ylabel("speed over best dense fp32")
    panel.set_title(textwrap.fill(title, 50), fontsize="small")
    panel.grid(alpha=0.3)


def _inside(limits: tuple[float, float], x: float) -> bool:
    return limits[0] <= x <= limits[1]
