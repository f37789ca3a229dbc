"""Tables of measured times: markdown for people, samples for programs, a picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.bandwidth import Roof
from issp.utils.files import atomic_write
from issp.utils.timing import CpuClock, CudaClock, Task

UNITS = {"ms": 1e3, "us": 1e6}
_WIDE = 20


@dataclass
class Line:
    """One measured row.

    Attributes:
        name: what was timed.
        samples: mode name -> seconds of each call.
        seconds: mode name -> median, None where it could not be timed.
        best: seconds of the shortest call, in the table's basis mode.
        spread: quartile distance over the median, in the table's basis mode.
        traffic: bytes that any implementation must move.
        extra: bytes of memory needed beyond weights and results, per weight; None: not measured.
        missing: why it is not timed at all, such as "not installed".
    """

    name: str
    samples: dict[str, list[float]]
    seconds: dict[str, float | None]
    best: float | None
    spread: float | None
    traffic: float
    extra: float | None = None
    missing: str | None = None

    @property
    def repetitions(self) -> int:
        """Calls per mode, of the mode with the most."""
        return max(map(len, self.samples.values()), default=0)


@dataclass
class Table:
    """The measurements of one model.

    Attributes:
        title: model, tensors, weights, dtype, settings.
        machine: see `bench.harness.machine`.
        unit: "ms" or "us".
        basis: the mode that GB/s, roofline share and spread refer to.
        base: name of the line that the ratios refer to.
        ratio_name: heads the columns of ratios.
        numel: weights in all.
        roof: the machine's bandwidth, of the same run.
        lines: in the order of printing.
        notes: sentences under the table.
    """

    title: str
    machine: str
    unit: str
    basis: str
    base: str
    numel: int
    roof: Roof
    ratio_name: str = "ratio"
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)

    def modes(self) -> list[str]:
        """Names of the timed modes."""
        return list(self.lines[0].seconds)

    def settled(self, line: Line) -> float | None:
        """Seconds in the basis mode, or in the first mode where that one could not be timed."""
        known = [line.seconds[self.basis], *line.seconds.values()]
        return next((s for s in known if s is not None), None)

    def rate(self, line: Line) -> float | None:
        """Counted bytes per second."""
        seconds = self.settled(line)
        return None if seconds is None else line.traffic / seconds

    def share(self, line: Line) -> float | None:
        """Part of the roofline."""
        seconds = self.settled(line)
        return None if seconds is None else self.roof.share(line.traffic, seconds)

    def ratio(self, line: Line, mode: str) -> float | None:
        """Time over that of the base line in the same mode."""
        mine, base = line.seconds[mode], self.line(self.base).seconds[mode]
        return None if mine is None or base is None else mine / base

    def markdown(self) -> str:
        """The table with its machine line and notes."""
        head = ["what"]
        for mode in self.modes():
            head += [f"{mode} {self.unit}", self.ratio_name]
        head += ["B/weight", "GB/s", "of roofline", "spread", f"best {self.unit}"]
        head += ["extra B/weight"] * self._has_extra() + ["runs"]
        text = [f"### {self.title}", "", self.machine, "", f"Roofline: {self.roof}.", ""]
        text += grid(head, map(self._cells, self.lines))
        text += ["", *(f"- {note}" for note in self.notes), ""]
        return "\n".join(text)

    def record(self) -> dict[str, Any]:
        """Title, machine and every measured time in seconds, for JSON."""
        roof = {"copy": self.roof.copy, "multiply": self.roof.multiply, "bytes": self.roof.nbytes}
        return {
            "title": self.title,
            "machine": self.machine,
            "roofline": roof,
            "seconds": {line.name: line.samples for line in self.lines},
        }

    def _has_extra(self) -> bool:
        return any(line.extra is not None for line in self.lines)

    def _cells(self, line: Line) -> list[str]:
        cells = [line.name]
        for mode in self.modes():
            cells.append(self._time(line.seconds[mode]))
            cells.append(number(self.ratio(line, mode)))
        if line.missing:
            cells[1] = line.missing
        rate = self.rate(line)
        cells.append(number(line.traffic / self.numel))
        cells.append(number(None if rate is None else rate / 1e9))
        cells += [percent(self.share(line)), percent(line.spread), self._time(line.best)]
        cells += [number(line.extra)] * self._has_extra()
        return [*cells, str(line.repetitions)]

    def _time(self, seconds: float | None) -> str:
        return number(None if seconds is None else seconds * UNITS[self.unit])


def measured(
    name: str,
    task: Task,
    clock: CpuClock | CudaClock,
    traffic: float,
    extra: float | None = None,
    missing: str | None = None,
) -> Line:
    """The line of a timed task; the other arguments are `Line`'s."""
    return Line(
        name=name,
        samples=task.samples,
        seconds={mode.name: task.median(mode.name) for mode in clock.modes},
        best=task.best(clock.basis),
        spread=task.spread(clock.basis),
        traffic=traffic,
        extra=extra,
        missing=missing,
    )


def exceptions(lines: Sequence[Line], errors: dict[str, str], rounds: int) -> list[str]:
    """Notes on the rows that ran less often than the others, or not at all.

    Args:
        lines: of a table.
        errors: row name -> why it could not be timed.
        rounds: how often a row runs that is not slow.
    """
    few = [f"{line.name} ({line.repetitions})" for line in lines if 0 < line.repetitions < rounds]
    notes = [f"Slow, so run less often than {rounds} times: {', '.join(few)}."] if few else []
    return notes + [f"{name} could not be timed, {error}." for name, error in errors.items()]


def grid(head: Sequence[str], rows) -> list[str]:
    """Lines of a markdown table: first column to the left, the others to the right."""
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows)]


def number(value: float | None) -> str:
    """Three significant digits, or three decimals below 0.001; no exponent; "-" for None."""
    if value is None:
        return "-"
    if value != 0 and abs(value) < 100:
        return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.3f}"
    return f"{value:.0f}"


def percent(value: float | None) -> str:
    """A share in percent, with two digits where it is small; "-" for None."""
    if value is None:
        return "-"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 else f"{100 * value:.2g} %"


def new_figure(**size):
    """An empty matplotlib figure that belongs to no window.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'matplotlib is needed for --plot: pip install "issp[train]"', name=error.name
        ) from error
    return Figure(layout="constrained", **size)


def save_figure(figure, path: Path) -> None:
    """Writes a figure as a .png file."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    atomic_write(path, image.getvalue())


def plot(tables: Sequence[Table], path: Path) -> None:
    """A picture of the times, one panel per table; logarithmic where they differ widely.

    Args:
        tables: at least one.
        path: .png file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    heights = [1.3 + 0.28 * len(table.lines) for table in tables]
    figure = new_figure(figsize=(9, sum(heights)))
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        lines = [line for line in table.lines if table.settled(line) is not None]
        times = [table.settled(line) * UNITS[table.unit] for line in lines]
        bars(panel, [line.name for line in lines], times)
        if max(times) > _WIDE * min(times):
            panel.set_xscale("log")
        panel.set_xlabel(f"median {table.unit}, {table.basis}")
        panel.set_title(textwrap.fill(table.title, 90), fontsize="small")
        panel.margins(x=0.15)
    save_figure(figure, path)


def bars(panel, names: Sequence[str], values: Sequence[float]) -> None:
    """Labelled horizontal bars, the first on top, our own in colour."""
    colors = ["tab:orange" if "issp" in name else "tab:gray" for name in names]
    drawn = panel.barh(names, values, color=colors)
    panel.bar_label(drawn, labels=[f" {number(value)}" for value in values])
    panel.invert_yaxis()
