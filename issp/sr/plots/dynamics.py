"""Mask dynamics: how many weights change class per iteration, several runs beside each other.

Source: figure 2 of the supplement (docs/method.md, section 1.6).
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from issp.sr.plots import drawing, records

PAPER_LAYERS = (1, 3, 36, 80)  # whether the paper counts from 1 or from 0 is unknown
_KEY = "logger.mask_stats_freq=100"
_WIDTH = 10.0


@dataclass(frozen=True)
class Activity:
    """Mean flips of one run per iteration of its pruning stage.

    Attributes:
        label: of the run.
        layers: of each drawn layer.
        total: of all layers that every run recorded, together.
        share: `total` as a share of their weights; None where only logs tell of the layers.
    """

    label: str
    layers: dict[str, float]
    total: float
    share: float | None


def draw_dynamics(
    runs: Mapping[str, str | Path],
    path: str | Path,
    layers: Sequence[str] = (),
    index_base: int = 1,
) -> list[Activity]:
    """A panel of flips against iterations for each layer, and a bar of the mean for each run.

    Flips are counted from one iteration to the next. The iterations are those of the pruning stage
    that the run recorded; the first is left out, because nothing was selected before it. Means are
    taken up to the last iteration that all runs reached.

    Args:
        runs: name in the legend -> folder of a run that prunes.
        path: PNG, PDF or SVG to write.
        layers: names, name patterns or indices; empty: the paper's, or where a network has fewer,
            four from its first to its last.
        index_base: index of the first layer, 1 or 0.

    Returns:
        The means of each run.

    Raises:
        FileNotFoundError, ValueError: see `issp.sr.plots.records`.
    """
    found = [records.read_run(label, folder) for label, folder in runs.items()]
    recorded = list(map(_pruning_record, found))
    networks = list(map(records.read_network, found, recorded))
    network = networks[0]
    common = records.common_layers(recorded, networks)
    chosen = records.choose_layers(layers, network, index_base)
    chosen = chosen or _papers_layers(network.order, common, index_base)
    records.check_layers(chosen, recorded, networks)
    last = min(record.last for record in recorded)
    activities = [_activity(record, network, chosen, common, last) for record in recorded]
    figure = _figure(recorded, network, chosen, activities, index_base)
    drawing.write(figure, path)
    return activities


def _pruning_record(run: records.Run) -> records.Record:
    """The flips of a run in its pruning stage, without those of the first selection."""
    if not run.prunes:
        raise ValueError(f"{run.label} is a dense run, which has no masks: leave it out")
    file = "masks.csv"
    if not (run.log / file).is_file() and (run.log / "layers.csv").is_file():
        file = "layers.csv"  # that has them at checkpoints
    record = records.read_record(run, file, ["flips"], _KEY)
    last = record.freeze or record.last
    kept = {}
    for layer, series in record.layers.items():
        in_stage = (series["iteration"] > 1) & (series["iteration"] <= last)
        if in_stage.any():
            kept[layer] = {column: values[in_stage] for column, values in series.items()}
    if not kept:
        raise ValueError(f"{run.label} recorded no flips in its pruning stage: use --set {_KEY}")
    return replace(record, layers=kept)


def _papers_layers(order: Sequence[str], recorded: Sequence[str], base: int) -> list[str]:
    """The paper's layers, or as many of the recorded ones, spread from the first to the last."""
    if len(order) >= max(PAPER_LAYERS) + 1 - base:
        paper = [records.layer_at(index, order, base) for index in PAPER_LAYERS]
        if set(paper) <= set(recorded):
            return paper
    return _spread(recorded, len(PAPER_LAYERS))


def _spread(layers: Sequence[str], count: int) -> list[str]:
    """So many of the layers, evenly spread from the first to the last."""
    places = np.linspace(0, len(layers) - 1, min(count, len(layers))).round().astype(int)
    return [layers[place] for place in places]


def _activity(
    record: records.Record,
    network: records.Network,
    chosen: Sequence[str],
    common: Sequence[str],
    last: int,
) -> Activity:
    """The means of a run up to the iteration `last`."""
    means = {}
    for layer in common:
        series = record.layers[layer]
        flips = series["flips"][series["iteration"] <= last]
        if not len(flips):
            raise ValueError(
                f"{record.label} recorded {layer} after iteration {last} only, where another run "
                "ends: let that one go on, or leave it out"
            )
        means[layer] = float(np.mean(flips))
    total = sum(means.values())
    weights = sum(module.weight.numel() for n, module in network.modules.items() if n in means)
    shown = {layer: means[layer] for layer in chosen}
    return Activity(record.label, shown, total, total / weights if weights else None)


def _figure(
    recorded: Sequence[records.Record],
    network: records.Network,
    chosen: Sequence[str],
    activities: Sequence[Activity],
    index_base: int,
) -> Any:
    columns = min(2, len(chosen))
    lines = -(-len(chosen) // columns)
    bars = 0.7 + 0.25 * len(recorded)
    figure = drawing.new_figure(_WIDTH, 2.3 * lines + bars + 1.2)
    grid = figure.add_gridspec(lines + 1, columns, height_ratios=[2.3] * lines + [bars])
    for i, layer in enumerate(chosen):
        axis = figure.add_subplot(grid[i // columns, i % columns])
        for number, record in enumerate(recorded):
            x, y = record.layers[layer]["iteration"], record.layers[layer]["flips"]
            drawing.draw_series(axis, x, y, number, record.label, "mean")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(0, max(10, axis.get_ylim()[1]))  # ticks also where nothing flips
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(records.describe(layer, network, index_base), fontsize=9, loc="left")
        axis.set(ylabel="flips per iteration", xlabel="iteration of the pruning stage")
    last = min(record.last for record in recorded)
    _draw_bars(figure.add_subplot(grid[-1, :]), activities, last)
    longest = max(len(r.layers[layer]["flips"]) for r in recorded for layer in chosen)
    note = drawing.average_note(longest, "mean")
    drawing.legend_below(figure, _WIDTH, note)
    return figure


def _draw_bars(axis: Any, activities: Sequence[Activity], last: int) -> None:
    for i, activity in enumerate(activities):
        style = drawing.series_style(i)
        color = {"facecolor": "white", "edgecolor": style.color, "hatch": style.hatch}
        bar = axis.barh(i, activity.total, 0.7, **color)
        text = f"{activity.total:.4g}"
        if activity.share is not None:
            text += f" ({100 * activity.share:.3g} % of the weights)"
        axis.bar_label(bar, [text], padding=4, fontsize=8)
    names = [drawing.plain(textwrap.fill(activity.label, 24)) for activity in activities]
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.4 * max(a.total for a in activities) or 1)
    axis.set_xlabel(f"mean flips per iteration up to {last}, all recorded layers together")
