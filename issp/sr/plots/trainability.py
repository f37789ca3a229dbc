"""Trainability: norm and variance of chosen layers' gradients, several runs beside each other.

Source: figure 1 of the supplement (docs/method.md, section 1.6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from issp.sr.plots import drawing, records

COLUMNS = {"norm": "L2 norm of the gradient", "variance": "variance of |gradient|"}
_KEY = "logger.grad_stats_freq=100"


def draw_trainability(
    runs: Mapping[str, str | Path],
    path: str | Path,
    layers: Sequence[str] = (),
    index_base: int = 1,
) -> list[str]:
    """A row of two panels for each layer: norm and variance of its gradient, a line for each run.

    Args:
        runs: name in the legend -> folder of a run that recorded gradients.
        path: PNG, PDF or SVG to write.
        layers: names, name patterns or indices; empty: the convolution and the linear layer in the
            middle of those that all runs recorded. The paper does not name its two.
        index_base: index of the first layer, 1 or 0.

    Returns:
        The names of the layers that were drawn.

    Raises:
        FileNotFoundError, ValueError: see `issp.sr.plots.records`.
    """
    found = [records.read_run(label, folder) for label, folder in runs.items()]
    recorded = [records.read_record(run, "gradients.csv", list(COLUMNS), _KEY) for run in found]
    networks = list(map(records.read_network, found, recorded))
    chosen = records.choose_layers(layers, networks[0], index_base)
    chosen = chosen or _middle_layers(recorded, networks)
    records.check_layers(chosen, recorded, networks)
    figure = drawing.new_figure(10, 2.4 * len(chosen) + 1.2)
    axes = figure.subplots(len(chosen), len(COLUMNS), squeeze=False, sharex=True)
    for line, layer in zip(axes, chosen, strict=True):
        for axis, column in zip(line, COLUMNS, strict=True):
            _draw_panel(axis, recorded, layer, column)
        line[0].set_title(records.describe(layer, networks[0], index_base), fontsize=9, loc="left")
    for axis in axes[-1]:
        axis.set_xlabel("iteration")
    longest = max(len(r.layers[layer]["norm"]) for r in recorded for layer in chosen)
    note = drawing.average_note(longest, "median")
    drawing.legend_below(figure, width=10, note=note)
    drawing.write(figure, path)
    return chosen


def _middle_layers(
    recorded: Sequence[records.Record], networks: Sequence[records.Network]
) -> list[str]:
    """The middle one of the convolutions and of the linear layers, where there are some."""
    modules = networks[0].modules
    if not modules:
        raise ValueError(f"{recorded[0].label} has no config.yml: choose layers with --layers")
    common = records.common_layers(recorded, networks)
    kinds = (nn.Conv2d, nn.Linear)
    found = ([n for n in common if isinstance(modules[n], kind)] for kind in kinds)
    return [names[len(names) // 2] for names in found if names]


def _draw_panel(axis: Any, recorded: Sequence[records.Record], layer: str, column: str) -> None:
    axis.set_yscale("log")
    freezes = [record.freeze for record in recorded]
    for i, record in enumerate(recorded):
        label = record.label
        if record.freeze and len(set(freezes)) > 1:
            label += f" (frozen at {record.freeze})"
        series = record.layers[layer]
        drawing.draw_series(axis, series["iteration"], series[column], i, label, "median")
    x, y = (
        np.concatenate([record.layers[layer][key] for record in recorded])
        for key in ("iteration", column)
    )
    # A logarithmic axis has no place for zero: a layer without gradient.
    lowest = min(y[(y > 0) & np.isfinite(y)], default=1.0)
    drawing.mark_hidden(axis, x, y, lowest, "zero (at the bottom) or not finite (at the top)")
    drawing.mark_freezes(axis, freezes)
    axis.set_ylabel(COLUMNS[column])
