"""Tables of measured times: markdown for people, a picture, files written whole or not at all."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

_UNITS = {"ms": 1e3, "us": 1e6}


@dataclass
class Line:
    """One measured row.

    Attributes:
        name: what was timed.
        seconds: mode name -> median, None where it could not be timed.
        repetitions: calls per mode, of the mode with the most.
        best: seconds of the shortest call, in the table's basis mode.
        spread: quartile distance over the median, in the table's basis mode.
        traffic: bytes that any implementation must move.
        extra: bytes of memory needed beyond weights and results, per weight.
    """

    name: str
    seconds: dict[str, float | None]
    repetitions: int
    best: float | None
    spread: float | None
    traffic: float
    extra: float


@dataclass
class Table:
    """The measurements of one model.

    Attributes:
        title: model, tensors, weights, dtype, settings.
        machine: see `issp.bench.machine`.
        unit: "ms" or "us".
        basis: the mode that GB/s, roofline share and spread refer to.
        base: name of the line that the ratios refer to.
        floors: names of the lines whose best GB/s is the roofline.
        lines: in the order of printing.
        notes: sentences under the table.
    """

    title: str
    machine: str
    unit: str
    basis: str
    base: str
    floors: Sequence[str]
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)

    def modes(self) -> list[str]:
        """Names of the timed modes."""
        return list(self.lines[0].seconds)

    def settled(self, line: Line) -> float:
        """Seconds in the basis mode, or in the first mode where that one could not be timed."""
        known = [line.seconds[self.basis], *line.seconds.values()]
        return next((s for s in known if s is not None), float("nan"))

    def rate(self, line: Line) -> float:
        """Counted bytes per second."""
        return line.traffic / self.settled(line)

    def roofline(self) -> float:
        """Best rate of the floors, bytes per second."""
        return max(self.rate(self.line(name)) for name in self.floors)

    def ratio(self, line: Line, mode: str) -> float | None:
        """Time over that of the base line in the same mode."""
        mine, base = line.seconds[mode], self.line(self.base).seconds[mode]
        return None if mine is None or base is None else mine / base

    def markdown(self) -> str:
        """The table with its machine line and notes."""
        modes = self.modes()
        head = ["what"]
        for mode in modes:
            head += [f"{mode} {self.unit}", "ratio"]
        head += ["GB/s", "of roofline", "spread", f"best {self.unit}"]
        head += ["extra B/weight", "runs"]
        rule = ["---"] + ["---:"] * (len(head) - 1)
        rows = [head, rule, *map(self._cells, self.lines)]
        text = [f"### {self.title}", "", self.machine, ""]
        text += ["| " + " | ".join(cells) + " |" for cells in rows]
        text += ["", *(f"- {note}" for note in self.notes), ""]
        return "\n".join(text)

    def _cells(self, line: Line) -> list[str]:
        cells = [line.name]
        for mode in self.modes():
            cells.append(self._time(line.seconds[mode]))
            cells.append(number(self.ratio(line, mode)))
        cells.append(number(self.rate(line) / 1e9))
        cells.append(f"{100 * self.rate(line) / self.roofline():.0f} %")
        cells.append("-" if line.spread is None else f"{100 * line.spread:.0f} %")
        return [*cells, self._time(line.best), number(line.extra), str(line.repetitions)]

    def _time(self, seconds: float | None) -> str:
        return number(None if seconds is None else seconds * _UNITS[self.unit])


def number(value: float | None) -> str:
    """Three significant digits, or three decimals below 0.001; no exponent; "-" for None."""
    if value is None:
        return "-"
    if value != 0 and abs(value) < 100:
        return f"{value:.3g}" if abs(value) >= 0.001 else f"{value:.3f}"
    return f"{value:.0f}"


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole: a full disk or an interruption leaves the old one."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def plot(tables: Sequence[Table], path: Path) -> None:
    """A picture of the times, one panel per table, logarithmic.

    Args:
        tables: at least one.
        path: .png file.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'matplotlib is needed for --plot: pip install "issp[train]"', name=error.name
        ) from error
    height = 1.4 + 0.3 * len(tables[0].lines)
    figure = Figure(figsize=(9, height * len(tables)), layout="constrained")
    panels = figure.subplots(len(tables), 1, squeeze=False)[:, 0]
    for panel, table in zip(panels, tables, strict=True):
        names = [line.name for line in table.lines]
        times = [table.settled(line) * _UNITS[table.unit] for line in table.lines]
        colors = ["tab:orange" if name.startswith("issp") else "tab:gray" for name in names]
        bars = panel.barh(names, times, color=colors)
        panel.bar_label(bars, labels=[f" {number(t)}" for t in times])
        panel.set_xscale("log")
        panel.set_xlabel(f"median {table.unit}, {table.basis}")
        panel.set_title(table.title, fontsize="medium")
        panel.invert_yaxis()
        panel.margins(x=0.15)
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_atomically(path, image.getvalue())
