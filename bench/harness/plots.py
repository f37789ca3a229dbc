"""The pictures of the benchmarks: bars of times, and lines."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness.table import number
from issp.utils.files import atomic_write

_WIDE_RANGE = 100


@dataclass
class Bars:
    """Horizontal bars, the first on top.

    Attributes:
        title: above them.
        xlabel: what they measure.
        names: one per bar.
        parts: name in the legend -> length of this part of each bar; one part has no legend and
            draws our own bars in colour.
        labels: at the end of the bars; empty: their lengths.
    """

    title: str
    xlabel: str
    names: Sequence[str]
    parts: dict[str, Sequence[float]]
    labels: Sequence[str] = ()


@dataclass
class Lines:
    """Lines over one axis.

    Attributes:
        title, xlabel, ylabel: texts.
        series: legend name, x, y and matplotlib style of each line; a y without x is a level
            across the panel.
        finish: sets the axes of the panel.
    """

    title: str
    xlabel: str
    ylabel: str
    series: list[tuple[str, Sequence[float] | None, Any, dict[str, Any]]] = field(
        default_factory=list
    )
    finish: Callable[[Any], None] = lambda panel: None


def plot_bars(panels: Sequence[Bars], path: Path) -> None:
    """Draws one panel below the other; logarithmic where the lengths differ widely.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    heights = [1.3 + 0.28 * len(bars.names) for bars in panels]
    figure = _new_figure(figsize=(9, sum(heights)))
    axes = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, bars in zip(axes, panels, strict=True):
        totals = [0.0] * len(bars.names)
        for index, (label, lengths) in enumerate(bars.parts.items()):
            colors = ["tab:gray", "tab:orange"][index]
            if len(bars.parts) == 1:
                colors = ["tab:orange" if "issp" in name else "tab:gray" for name in bars.names]
            drawn = panel.barh(bars.names, lengths, left=totals, color=colors, label=label)
            totals = [a + b for a, b in zip(totals, lengths, strict=True)]
        panel.bar_label(drawn, labels=[f" {x}" for x in bars.labels or map(number, totals)])
        if len(bars.parts) == 1 and max(totals) > _WIDE_RANGE * min(totals):
            panel.set_xscale("log")
        panel.invert_yaxis()
        panel.margins(x=0.25 if bars.labels else 0.15)
        panel.set_xlabel(bars.xlabel)
        panel.set_title(textwrap.fill(bars.title, 90), fontsize="small")
    if len(panels[0].parts) > 1:
        handles, names = axes[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=2)
    _save_figure(figure, path)


def plot_lines(rows: Sequence[Sequence[Lines]], path: Path, height: float) -> None:
    """Draws rows of panels with one legend below.

    Args:
        rows: equally many panels each.
        path: .png file.
        height: inches of a row.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    columns = len(rows[0])
    figure = _new_figure(figsize=(1 + 5 * columns, 0.6 + height * len(rows)))
    handles = {}
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for panel, lines in zip(axes, row, strict=True):
            for name, x, y, style in lines.series:
                level = x is None
                drawn = panel.axhline(y, **style) if level else panel.plot(x, y, **style)[0]
                handles.setdefault(name, drawn)
            panel.set(xlabel=lines.xlabel, ylabel=lines.ylabel, xscale="log", yscale="log")
            panel.set_title(textwrap.fill(lines.title, 50), fontsize="small")
            panel.grid(True, alpha=0.3)
            lines.finish(panel)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=1 + columns)
    _save_figure(figure, path)


def _new_figure(**size):
    """An empty matplotlib figure that belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'matplotlib is needed for --plot: pip install "issp[train]"', name=error.name
        ) from error
    return Figure(layout="constrained", **size)


def _save_figure(figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    atomic_write(path, image.getvalue())
