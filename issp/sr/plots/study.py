"""Scores of many runs: one axis for each test set, one row of it for each method."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from issp.sr.plots.drawing import new_figure, write
from issp.sr.results import Result

# Told apart without colours; the last one repeats for further sparsities.
_MARKERS = ("o", "s", "^", "D", "v", "P")


def scores(results: Sequence[Result], path: str | Path, channel: str = "y") -> None:
    """PSNR of every seed as a small mark, and their mean as a large one; a line for bicubic.

    Args:
        results: of one study.
        path: PNG to write.
        channel: "y" or "rgb".

    Raises:
        ValueError: there is nothing to draw.
    """
    of_channel = [row for row in results if row.channel == channel]
    rows = [row for row in of_channel if row.arch]
    bicubic = {(row.scale, row.set): row.psnr for row in of_channel if not row.arch}
    if not rows:
        raise ValueError(f"{path}: no run has scores yet; let the study go on for a while")
    kinds = list(dict.fromkeys((row.arch, row.scale) for row in rows))
    sets = list(dict.fromkeys(row.set for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    levels = sorted({row.sparsity for row in rows if row.sparsity})
    height = 0.9 + 0.22 * len(methods) * max(1, min(2, len(levels)))
    figure = new_figure(2.2 + 2.6 * len(sets), 0.6 + height * len(kinds))
    axes = figure.subplots(len(kinds), len(sets), squeeze=False, sharey=True)
    for line, (arch, scale) in zip(axes, kinds, strict=True):
        for axis, name in zip(line, sets, strict=True):
            own = [r for r in rows if (r.arch, r.scale, r.set) == (arch, scale, name)]
            _draw(axis, own, methods, levels)
            if (scale, name) in bicubic:
                axis.axvline(bicubic[scale, name], color="0.4", linestyle=":", label="bicubic")
            axis.set_title(f"{arch} x{scale}, {name}", fontsize=9)
            axis.set_xlabel(f"PSNR ({'Y' if channel == 'y' else 'RGB'}), dB", fontsize=8)
            axis.tick_params(labelsize=8)
        line[0].set_yticks(range(len(methods)), methods)
        line[0].set_ylim(len(methods) - 0.5, -0.5)
    handles = {
        label: handle
        for axis in axes.flat
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    place: dict[str, Any] = {"loc": "outside lower center", "ncols": 5, "fontsize": 8}
    place |= {"title": "small marks: seeds", "title_fontsize": 8}
    figure.legend(handles.values(), handles.keys(), **place)
    write(figure, path)


def _draw(axis: Any, rows: Sequence[Result], methods: list[str], levels: list[float]) -> None:
    for position, method in enumerate(methods):
        axis.axhline(position, color="0.85", linewidth=0.6, zorder=0)
        for level in (None, *levels):
            values = [r.psnr for r in rows if r.method == method and (r.sparsity or None) == level]
            if not values:
                continue
            order = levels.index(level) if level else 0
            place = position + (0.5 * (order - (len(levels) - 1) / 2) / len(levels) if level else 0)
            marker = _MARKERS[min(order, len(_MARKERS) - 1)] if level else "|"
            style = {"color": "black", "marker": marker, "linestyle": "none"}
            axis.plot(values, [place] * len(values), markersize=3, alpha=0.6, **style)
            label = f"mean at {100 * level:g} % sparsity" if level else "mean, dense"
            mean = [sum(values) / len(values)]
            axis.plot(mean, [place], markersize=8, fillstyle="none", label=label, **style)
    axis.grid(axis="x", color="0.9", linewidth=0.6)
