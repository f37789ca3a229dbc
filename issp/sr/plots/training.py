"""Pictures of one run: curves over iterations, gradients, sparsity per layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from issp.sr import config, logging
from issp.sr.plots import drawing, records
from issp.utils import csv_log
from issp.utils.errors import ConfigError
from issp.utils.files import user_path


def curves(
    rows: Sequence[dict[str, Any]],
    path: str | Path,
    title: str = "",
    bicubic: float | None = None,
    freeze: int | None = None,
) -> None:
    """PSNR, loss, learning rate, flips per iteration and mean threshold against iterations.

    Args:
        rows: of train.csv, see `issp.sr.logging.read_csv`.
        path: PNG to write.
        title: above the plots.
        bicubic: PSNR of bicubic interpolation on the validation set, drawn as a line.
        freeze: iteration that fixes the mask, marked once the rows reach it; None: as the rows say.

    Raises:
        ValueError: there is nothing to draw.
    """
    _refuse_empty(rows, path)
    pruned = any(row.get("flips") is not None for row in rows)
    figure = drawing.new_figure(8, 9 if pruned else 6)
    heights = [2, 1, 1, 1, 1] if pruned else [2, 1, 1]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    _psnr(axes[0], rows, bicubic)
    _line(axes[1], rows, "loss", "loss")
    _line(axes[2], rows, "lr", "learning rate")
    axes[2].set_ylim(bottom=0)
    if pruned:
        _line(axes[3], rows, "flips", "flips per iteration")
        axes[3].set_yscale("symlog", linthresh=1)
        axes[3].set_ylim(0, max(10, axes[3].get_ylim()[1]))  # ticks also where nothing flips
        _line(axes[4], rows, "threshold", "mean threshold |w|")
        axes[4].set_ylim(bottom=0)
    _against_iterations(axes, rows[-1]["iteration"], rows, freeze)
    figure.suptitle(drawing.plain(title) or "training", fontsize=11)
    figure.align_ylabels(list(axes))
    drawing.write(figure, path)


def gradients(
    recorded: Mapping[str, records.Series],
    training: Sequence[dict[str, Any]],
    path: str | Path,
    freeze: int | None = None,
) -> None:
    """Norm and variance of every layer's gradient against iterations, coloured by depth.

    Args:
        recorded: by layer "iteration", "norm" and "variance" of gradients.csv.
        training: of train.csv, for the freeze.
        path, freeze: see `curves`.
    """
    if not recorded:
        raise ValueError(f"{path}: no gradients have been recorded yet")
    figure = drawing.new_figure(8, 6)
    from matplotlib import colormaps

    axes = figure.subplots(2, 1, sharex=True)
    for axis, key in zip(axes, ("norm", "variance"), strict=True):
        axis.set_yscale("log")
        for i, (name, series) in enumerate(recorded.items()):
            label = drawing.plain(name) if i in (0, len(recorded) - 1) else None
            color = colormaps["viridis"](0.9 * i / max(1, len(recorded) - 1))
            drawing.draw_line(axis, series["iteration"], series[key], label=label, color=color)
        # A logarithmic axis has no place for zero: a layer without gradient.
        x = np.concatenate([series["iteration"] for series in recorded.values()])
        y = np.concatenate([series[key] for series in recorded.values()])
        drawing.mark_hidden(axis, x, y, lowest=min(y[y > 0], default=1.0))
    axes[0].set(ylabel="norm of the gradient")
    axes[1].set(ylabel="variance of its magnitudes")
    axes[0].legend(title="first and last layer", fontsize=8, loc="upper right")
    last = max(int(series["iteration"][-1]) for series in recorded.values())
    _against_iterations(axes, last, training, freeze)
    figure.align_ylabels(list(axes))
    drawing.write(figure, path)


def _against_iterations(
    axes: Any, last: int, training: Sequence[dict[str, Any]], freeze: int | None
) -> None:
    """The style of all plots up to the iteration `last`; marks the freeze if it has happened."""
    last = max([last, *(row["iteration"] for row in training)])
    if freeze is None and any(row["stage"] == "fine-tuning" for row in training):
        freeze = max((r["iteration"] for r in training if r["stage"] == "pruning"), default=None)
    if freeze is not None and freeze > last:
        freeze = None
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if freeze is not None:
            axis.axvline(freeze, color=drawing.GREY, linestyle="--", linewidth=1)
    if freeze is not None:
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        text = {"color": drawing.GREY, "fontsize": 9}
        axes[1].annotate("mask frozen", (freeze, 1.0), xytext=(4, -10), **place, **text)
    axes[-1].set_xlabel("iteration")
    # A little beyond the last iteration, so that its point is whole.
    axes[-1].set_xlim(left=0, right=1.01 * max(1, last))


def layers(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Sparsity of every layer, from `rows` of layers.csv of one iteration; see `curves`."""
    if not rows:
        raise ValueError(f"{path}: the run has written no checkpoint yet")
    names = [drawing.plain(str(row["layer"])) for row in rows]
    height = min(max(2.0, 0.22 * len(rows) + 1.2), 60)
    figure = drawing.new_figure(8, height)
    axis = figure.subplots()
    for key, color, size in (("selected", drawing.ORANGE, 0.8), ("zeros", drawing.BLUE, 0.45)):
        shares = [100 * row[key] / max(1, row["weights"]) for row in rows]
        axis.barh(range(len(rows)), shares, size, color=color, label=f"{key} (% of weights)")
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_title(f"sparsity per layer at iteration {rows[0]['iteration']}", fontsize=11)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    drawing.write(figure, path)


def _psnr(axis: Any, rows: Sequence[dict[str, Any]], bicubic: float | None) -> None:
    sparse, soft = (
        [{"iteration": row["iteration"], "psnr": y} for row in rows if (y := psnr(row)) is not None]
        for psnr in (logging.sparse_psnr, logging.soft_psnr)
    )
    is_pruned = any(row.get("selected") for row in rows)
    for points, label, color, style in (
        (soft, "soft model: selected weights small, not zero", drawing.ORANGE, "s"),
        (sparse, "sparse model: mask applied" if is_pruned else "model", drawing.BLUE, "o-"),
    ):
        x, y = [row["iteration"] for row in points], [row["psnr"] for row in points]
        if points:
            face = color if points is sparse else "white"
            axis.plot(x, y, style, color=color, markerfacecolor=face, markersize=4, label=label)
    if bicubic is not None:
        axis.axhline(bicubic, color="black", linewidth=1, linestyle=":", label="bicubic")
    scored = [*sparse, *soft]
    if not scored:
        axis.text(
            0.5, 0.5, "no validation", transform=axis.transAxes, ha="center", color=drawing.GREY
        )
    # The first iterations score far lower than the rest and would compress the curve.
    finite = [row["psnr"] for row in scored if math.isfinite(row["psnr"])]
    lowest = max([*finite, bicubic or -math.inf], default=0) - 4
    axis.set_ylim(bottom=max(axis.get_ylim()[0], lowest))
    x, y = [row["iteration"] for row in scored], [row["psnr"] for row in scored]
    hidden = drawing.mark_hidden(axis, x, y, axis.get_ylim()[0])
    if soft or bicubic is not None or hidden:
        axis.legend(fontsize=8, loc="best")
    axis.set_ylabel("PSNR (dB)")


def _line(axis: Any, rows: Sequence[dict[str, Any]], key: str, label: str) -> None:
    points = [(row["iteration"], row[key]) for row in rows if row.get(key) is not None]
    drawing.draw_line(axis, [x for x, _ in points], [y for _, y in points], color=drawing.BLUE)
    axis.set_ylabel(label)


@dataclass(frozen=True)
class RunLogs:
    """What the pictures of one run show.

    Attributes:
        folder: experiments/<name>.
        training: rows of train.csv, at least one.
        freeze: `sparsity.freeze_iter` of its configuration.
        sparsity: rows of layers.csv of its latest iteration.
        gradients: see `gradients`; empty where none were recorded.
    """

    folder: Path
    training: list[dict[str, Any]]
    freeze: int | None
    sparsity: list[dict[str, Any]]
    gradients: dict[str, records.Series]


def read_logs(folder: str | Path) -> RunLogs:
    """Reads the logs of a run.

    Raises:
        FileNotFoundError: the folder is not one of a run.
        ValueError: a log is damaged, or there is nothing to draw yet.
    """
    folder = user_path(folder)
    log = folder / "log"
    if not (log / "train.csv").is_file():
        raise FileNotFoundError(f"{folder} is not a run of `issp train`: it has no log/train.csv")
    training, freeze = _training_rows(log / "train.csv"), _freeze_of(folder / "config.yml")
    recorded: dict[str, records.Series] = {}
    if (log / "gradients.csv").is_file():
        recorded, _ = records.read_layers(log / "gradients.csv", ("norm", "variance"))
    return RunLogs(folder, training, freeze, _latest_rows(log / "layers.csv"), recorded)


def draw_logs(logs: RunLogs, out: str | Path | None = None) -> list[Path]:
    """Draws curves.png, for a pruned run layers.png, and gradients.png where they were recorded.

    Args:
        logs: of the run.
        out: folder for the pictures; None: visualization inside the run's.

    Returns:
        The pictures written.

    Raises:
        OSError: the folder cannot be written.
    """
    out = logs.folder / "visualization" if out is None else user_path(out)
    written = [out / "curves.png"]
    curves(logs.training, written[0], title=logs.folder.name, freeze=logs.freeze)
    if logs.sparsity:
        written.append(out / "layers.png")
        layers(logs.sparsity, written[-1])
    if logs.gradients:
        written.append(out / "gradients.png")
        gradients(logs.gradients, logs.training, written[-1], logs.freeze)
    return written


def _freeze_of(path: Path) -> int | None:
    """`sparsity.freeze_iter` of a run's configuration; None where there is none."""
    section = config.load_yaml(path).get("sparsity") if path.is_file() else None
    freeze = section.get("freeze_iter") if isinstance(section, dict) else None
    if not isinstance(freeze, int | None):
        raise ConfigError(
            f"{path}: sparsity.freeze_iter is {freeze!r}: it must be a whole number of iterations"
        )
    return freeze


def _training_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of train.csv.

    Raises:
        ValueError: it is another log, has text in the place of a number, or no rows.
    """
    rows = logging.read_csv(path)
    _refuse_empty(rows, path)
    for row in rows:
        if "stage" not in row:
            raise ValueError(f"{path} has no column stage: it is no log of a training")
        for name in set(row) - {"stage"}:
            if isinstance(row[name], str):
                raise ValueError(
                    f"{path} is damaged: {name} at iteration {row['iteration']} is {row[name]!r}, "
                    "no number; remove that row"
                )
    return rows


def _refuse_empty(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    if not rows:
        raise ValueError(f"{path}: the log has no rows yet; let the run go on for a while")


def _latest_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of layers.csv of its latest iteration, if there is such a log."""
    rows: list[dict[str, Any]] = []
    columns = ("layer", "weights", "selected", "zeros")
    for row in csv_log.iterate_csv(path, columns) if path.is_file() else ():
        records.check_row(row, columns[1:], path)
        if rows and rows[0]["iteration"] != row["iteration"]:
            rows = []
        rows.append(row)
    return rows
