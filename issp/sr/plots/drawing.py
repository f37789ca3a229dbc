"""What all pictures share: the figure, its file, lines, and marks for values outside the axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from issp.utils.errors import import_optional
from issp.utils.files import atomic_write

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
    """Writes a figure as PNG, complete or not at all."""
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))


def draw_line(axis: Any, rows: Sequence[dict[str, Any]], key: str, **style: Any) -> None:
    """A line, with its points where there are few: a line of one point would not be seen."""
    marker = "." if len(rows) <= 20 else None
    x, y = [row["iteration"] for row in rows], [row[key] for row in rows]
    axis.plot(x, y, linewidth=1.2, marker=marker, **style)


def mark_hidden(axis: Any, rows: Sequence[dict[str, Any]], key: str, lowest: float) -> bool:
    """Triangles at the edge of the axis for values that it does not show, with their extreme."""
    found = False
    for edge, marker, hidden, extreme, where in (
        (0.0, "v", [r for r in rows if r[key] < lowest], min, "below: down to"),
        (1.0, "^", [r for r in rows if not math.isfinite(r[key])], max, "above: up to"),
    ):
        if hidden:
            found = True
            axis.plot(
                [row["iteration"] for row in hidden],
                [edge] * len(hidden),
                marker,
                transform=axis.get_xaxis_transform(),
                clip_on=False,
                color=RED,
                markersize=6,
                label=f"{len(hidden)} {where} {extreme(row[key] for row in hidden):.4g}",
            )
    return found
