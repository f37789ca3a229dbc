"""What all pictures share: the figure, its file, lines, and marks for values outside the axes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from issp.utils.errors import import_optional
from issp.utils.files import atomic_write

# Dense lines of several runs hide each other; their running averages, over this part of the values
# of a run, do not.
AVERAGED_SHARE = 30
MOST_BEHIND = 4  # series whose values are drawn behind their averages: more would be a blot
Average = Literal["mean", "median"]

BLUE, ORANGE, GREY, RED = "#1f5fa8", "#d9731a", "#777777", "#b02a30"


def new_figure(width: float, height: float) -> Any:
    """An empty figure of this size in inches, which no window shows."""
    import_optional("matplotlib", "matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def write(figure: Any, path: str | Path) -> None:
    """Writes a figure, as PDF or SVG if its suffix says so, else as PNG; complete or not at all."""
    kind = Path(path).suffix.lower().lstrip(".")
    kind = kind if kind in ("pdf", "svg") else "png"
    atomic_write(path, lambda file: figure.savefig(file, format=kind, dpi=130))


def plain(text: str) -> str:
    """A name as matplotlib has to get it: no formula, not left out of legends, valid Unicode."""
    text = text.encode(errors="backslashreplace").decode().replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def draw_line(axis: Any, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    """A line, with its points where there are few: a line of one point would not be seen."""
    axis.plot(x, y, linewidth=1.2, marker="." if len(x) <= 20 else None, **style)


def mark_hidden(
    axis: Any, x: Sequence[float], y: Sequence[float], lowest: float, label: str = ""
) -> bool:
    """Triangles at the edge of the axis for values that it does not show.

    Args:
        axis: over iterations.
        x, y: the points, [n].
        lowest: the axis shows what is at least that.
        label: of both edges in the legend; "": how many there are and their extreme.

    Returns:
        Whether there are any.
    """
    iterations, values = np.asarray(x), np.asarray(y, dtype=np.float64)
    below, above = values < lowest, ~np.isfinite(values)
    for edge, marker, hidden, extreme, where in (
        (0.0, "v", below, np.min, "below: down to"),
        (1.0, "^", above, np.max, "above: up to"),
    ):
        if not hidden.any():
            continue
        most = extreme(values[hidden])
        axis.plot(
            iterations[hidden],
            np.full(hidden.sum(), edge),
            marker,
            transform=axis.get_xaxis_transform(),
            clip_on=False,
            color=RED,
            markersize=6,
            label=label
            or f"{hidden.sum()} {'not finite:' if np.isnan(most) else where} {most:.4g}",
        )
    return bool(below.any() or above.any())


@dataclass(frozen=True)
class Style:
    """How one of several series is drawn; each differs from the others without its colour too."""

    color: str
    linestyle: Any
    marker: str
    hatch: str
    offset: float  # of the markers, as a share of their distance

    def line(self, x: np.ndarray) -> dict[str, Any]:
        """Options of `Axes.plot`: about eight markers, so that dense lines can be told apart."""
        every = max(1, len(x) // 8)
        return {
            "color": self.color,
            "linestyle": self.linestyle,
            "marker": self.marker,
            "markersize": 5,
            "markerfacecolor": "white",
            "markevery": (int(self.offset * every), every),
            "linewidth": 1.4,
        }


# Neighbours differ in luminance; the lengths are such that combinations do not repeat soon.
_COLORS = ("black", "#d9731a", "#1f5fa8", "#8a8a8a", "#b02a30", "#3f8f4f", "#9467bd")
_LINESTYLES: tuple[Any, ...] = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
_MARKERS = ("o", "s", "^", "D", "v", "x", "P", "<", "*", ">", "+")
_HATCHES = ("", "///", "...", "xxx", "\\\\\\", "---", "ooo", "+++")


def series_style(i: int) -> Style:
    """The style of series number `i`, counted from 0."""
    lists = (_COLORS, _LINESTYLES, _MARKERS, _HATCHES)
    return Style(*(options[i % len(options)] for options in lists), offset=0.3 * i % 1)


def draw_series(
    axis: Any, x: np.ndarray, y: np.ndarray, number: int, label: str, average: Average
) -> None:
    """One of several lines over the iterations: the running average, and the values behind it.

    Args:
        axis: over iterations.
        x, y: the values, [n].
        number: of the series; from `MOST_BEHIND` on its values are left out.
        label: in the legend.
        average: that is drawn in place of many values.
    """
    window, style = len(y) // AVERAGED_SHARE, series_style(number)
    if window > 1 and number < MOST_BEHIND:
        axis.plot(x, y, color=style.color, linewidth=0.5, alpha=0.3, zorder=1)
    axis.plot(x, running(average, y, window), label=plain(label), **style.line(x))


def average_note(longest: int, average: Average) -> str:
    """What `draw_series` has done with series of at most this length, for the legend."""
    if longest // AVERAGED_SHARE <= 1:
        return ""
    return f"thick: running {average} over 1/{AVERAGED_SHARE} of a run's values"


def running(average: Average, values: np.ndarray, window: int) -> np.ndarray:
    """Average of `window` values around each, of fewer at both ends; NaN is left out.

    Args:
        average: "mean" or "median".
        values: [n] float64.
        window: 0 and 1 leave the values as they are.
    """
    if window <= 1:
        return values
    function = np.nanmean if average == "mean" else np.nanmedian
    before, after = window // 2, window - window // 2
    pieces = (values[max(0, i - before) : i + after] for i in range(len(values)))
    return np.array([np.nan if np.isnan(p).all() else function(p) for p in pieces])


def mark_freezes(axis: Any, freezes: Iterable[int | None]) -> None:
    """A vertical line at every iteration where a run's mask was fixed."""
    for i, freeze in enumerate(sorted(set(freezes) - {None})):
        line = {"color": GREY, "linestyle": ":", "linewidth": 1.5}
        axis.axvline(freeze, label="" if i else "mask frozen", **line)


def legend_below(figure: Any, width: float, note: str = "") -> None:
    """One legend for all axes below the figure, in as many columns as its names allow.

    Args:
        figure: with labelled series; names that several axes share appear once.
        width: of the figure in inches.
        note: a line above the names.
    """
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            entries.setdefault(label, handle)
    longest = max(map(len, entries), default=0)
    columns = max(1, min(len(entries), int(14 * width) // (longest + 10)))
    place = {"loc": "outside lower center", "ncols": columns, "frameon": False}
    text = {"fontsize": 8, "title": note, "title_fontsize": 8}
    figure.legend(entries.values(), entries.keys(), handlelength=4, **place, **text)
