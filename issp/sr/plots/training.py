"""Pictures of one run: curves over iterations, gradients, sparsity per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from issp.sr import config, logging
from issp.sr.plots import drawing, records
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
    if not rows:
        raise ValueError(f"{path}: the log has no rows yet; let the run go on for a while")
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
    _against_iterations(axes, rows, rows, freeze)
    figure.suptitle(title or "training", fontsize=11)
    figure.align_ylabels(list(axes))
    drawing.write(figure, path)


def gradients(
    rows: Sequence[dict[str, Any]],
    training: Sequence[dict[str, Any]],
    path: str | Path,
    freeze: int | None = None,
) -> None:
    """Norm and variance of every layer's gradient against iterations, coloured by depth.

    Args:
        rows: of gradients.csv.
        training: of train.csv, for the freeze.
        path, freeze: see `curves`.
    """
    if not rows:
        raise ValueError(f"{path}: no gradients have been recorded yet")
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_layer.setdefault(str(row["layer"]), []).append(row)
    figure = drawing.new_figure(8, 6)
    from matplotlib import colormaps

    axes = figure.subplots(2, 1, sharex=True)
    for axis, key in zip(axes, ("norm", "variance"), strict=True):
        axis.set_yscale("log")
        for i, (name, layer_rows) in enumerate(by_layer.items()):
            is_labelled = i in (0, len(by_layer) - 1)
            color = colormaps["viridis"](0.9 * i / max(1, len(by_layer) - 1))
            drawing.draw_line(
                axis, layer_rows, key, label=name if is_labelled else None, color=color
            )
        # A logarithmic axis has no place for zero: a layer without gradient.
        x, y = [row["iteration"] for row in rows], [row[key] for row in rows]
        drawing.mark_hidden(axis, x, y, lowest=min((v for v in y if v > 0), default=1))
    axes[0].set(ylabel="norm of the gradient")
    axes[1].set(ylabel="variance of its magnitudes")
    axes[0].legend(title="first and last layer", fontsize=8, loc="upper right")
    _against_iterations(axes, rows, training, freeze)
    figure.align_ylabels(list(axes))
    drawing.write(figure, path)


def _against_iterations(
    axes: Any,
    rows: Sequence[dict[str, Any]],
    training: Sequence[dict[str, Any]],
    freeze: int | None,
) -> None:
    """The style of all plots over the iterations of `rows`; marks the freeze if it has happened."""
    last = max(row["iteration"] for row in [*rows, *training])
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
    axes[-1].set_xlim(left=0, right=1.01 * last)


def layers(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Sparsity of every layer, from the latest of the `rows` of layers.csv; see `curves`."""
    if not rows:
        raise ValueError(f"{path}: the run has written no checkpoint yet")
    latest = rows[-1]["iteration"]
    rows = [row for row in rows if row["iteration"] == latest]
    names = [str(row["layer"]) for row in rows]
    height = min(max(2.0, 0.22 * len(rows) + 1.2), 60)
    figure = drawing.new_figure(8, height)
    axis = figure.subplots()
    for key, color, size in (("selected", drawing.ORANGE, 0.8), ("zeros", drawing.BLUE, 0.45)):
        shares = [100 * row[key] / max(1, row["weights"]) for row in rows]
        axis.barh(range(len(rows)), shares, size, color=color, label=f"{key} (% of weights)")
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_title(f"sparsity per layer at iteration {latest}", fontsize=11)
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
    drawing.draw_line(
        axis, [row for row in rows if row.get(key) is not None], key, color=drawing.BLUE
    )
    axis.set_ylabel(label)


def of_run(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draws curves.png, for a pruned run layers.png, and gradients.png where they were recorded.

    Args:
        folder: experiments/<name>.
        out: folder for the pictures; None: visualization inside the run's.

    Returns:
        The pictures written.

    Raises:
        FileNotFoundError: the folder is not one of a run.
        ValueError: a log is damaged, or has no rows.
    """
    folder = user_path(folder)
    log = folder / "log"
    if not (log / "train.csv").is_file():
        raise FileNotFoundError(f"{folder} is not a run of `issp train`: it has no log/train.csv")
    out = folder / "visualization" if out is None else user_path(out)
    written = [out / "curves.png"]
    training, freeze = _training_rows(log / "train.csv"), _freeze_of(folder / "config.yml")
    pruned = _layer_rows(log / "layers.csv", ("weights", "selected", "zeros"))
    recorded = _layer_rows(log / "gradients.csv", ("norm", "variance"))
    curves(training, written[0], title=folder.name, freeze=freeze)
    if pruned:
        written.append(out / "layers.png")
        layers(pruned, written[-1])
    if recorded:
        written.append(out / "gradients.png")
        gradients(recorded, training, written[-1], freeze)
    return written


def _freeze_of(path: Path) -> int | None:
    """`sparsity.freeze_iter` of a run's configuration; None where there is none."""
    section = config.load_yaml(path).get("sparsity") if path.is_file() else None
    return section.get("freeze_iter") if isinstance(section, dict) else None


def _training_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of train.csv.

    Raises:
        ValueError: it is another log, or has text in the place of a number.
    """
    rows = logging.read_csv(path)
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


def _layer_rows(path: Path, columns: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a log of layers, if there is one; `columns` hold numbers."""
    rows = logging.read_csv(path) if path.is_file() else []
    for row in rows:
        records.check_row(row, columns, path)
    return rows
