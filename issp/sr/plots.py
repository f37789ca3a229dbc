"""Pictures of a run: curves over iterations, sparsity per layer, comparison sheets of crops."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from issp.sr import logging
from issp.utils.errors import import_optional
from issp.utils.files import atomic_write, user_path

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9731a", "#777777"


@dataclass(frozen=True)
class Panel:
    """One image of a comparison sheet.

    Args:
        title: what it is.
        image: [H, W, 3] uint8; a smaller one is shown enlarged without smoothing.
        note: second line, such as its PSNR.
    """

    title: str
    image: np.ndarray
    note: str = ""


def curves(
    rows: Sequence[dict[str, Any]], path: str | Path, title: str = "", bicubic: float | None = None
) -> None:
    """PSNR, flips per iteration and mean threshold against iterations, the freeze marked.

    Args:
        rows: of train.csv, see `issp.sr.logging.read_csv`.
        path: PNG to write.
        title: above the plots.
        bicubic: PSNR of bicubic interpolation on the validation set, drawn as a line.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not rows:
        raise ValueError(f"{path}: the log has no rows yet; let the run go on for a while")
    pruned = any(row.get("flips") is not None for row in rows)
    figure = _figure(8, 8 if pruned else 5)
    axes = figure.subplots(3 if pruned else 2, 1, sharex=True)
    _psnr(axes[0], rows, bicubic)
    if pruned:
        _line(axes[1], rows, "flips", "flips per iteration")
        axes[1].set_yscale("symlog", linthresh=1)
        axes[1].set_ylim(bottom=0)
        _line(axes[2], rows, "threshold", "mean threshold |w|")
        axes[2].set_ylim(bottom=0)
    else:
        _line(axes[1], rows, "loss", "loss")
    _against_iterations(axes, rows)
    figure.suptitle(title or "training", fontsize=11)
    figure.align_ylabels(list(axes))
    _write(figure, path)


def gradients(
    rows: Sequence[dict[str, Any]], training: Sequence[dict[str, Any]], path: str | Path
) -> None:
    """Norm and variance of every layer's gradient against iterations, coloured by depth.

    Args:
        rows: of gradients.csv.
        training: of train.csv, for the freeze.
        path: see `curves`.
    """
    if not rows:
        raise ValueError(f"{path}: no gradients have been recorded yet")
    by_layer: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_layer.setdefault(str(row["layer"]), []).append(row)
    figure = _figure(8, 6)
    from matplotlib import colormaps

    axes = figure.subplots(2, 1, sharex=True)
    for i, (name, layer_rows) in enumerate(by_layer.items()):
        is_labelled = i in (0, len(by_layer) - 1)
        color = colormaps["viridis"](0.9 * i / max(1, len(by_layer) - 1))
        x = [row["iteration"] for row in layer_rows]
        for axis, key in zip(axes, ("norm", "variance"), strict=True):
            y = [row[key] for row in layer_rows]
            axis.plot(x, y, label=name if is_labelled else None, color=color, linewidth=1)
    axes[0].set(ylabel="norm of the gradient", yscale="log")
    axes[1].set(ylabel="variance of its magnitudes", yscale="log")
    axes[0].legend(title="first and last layer", fontsize=8, frameon=False)
    _against_iterations(axes, training)
    figure.align_ylabels(list(axes))
    _write(figure, path)


def _against_iterations(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    """The style of all plots over the iterations of train.csv; marks the freeze."""
    freeze = max((r["iteration"] for r in rows if r["stage"] == "pruning"), default=None)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
        if freeze is not None:
            axis.axvline(freeze, color=_GREY, linestyle="--", linewidth=1)
    if freeze is not None:
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        text = {"color": _GREY, "fontsize": 9}
        axes[0].annotate("mask frozen", (freeze, 0.02), xytext=(4, 0), **place, **text)
    axes[-1].set_xlabel("iteration")
    axes[-1].set_xlim(left=0, right=rows[-1]["iteration"] if rows else None)


def layers(rows: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Sparsity of every layer, from the latest of the `rows` of layers.csv; see `curves`."""
    if not rows:
        raise ValueError(f"{path}: the run has written no checkpoint yet")
    latest = rows[-1]["iteration"]
    rows = [row for row in rows if row["iteration"] == latest]
    names = [str(row["layer"]) for row in rows]
    height = min(max(2.0, 0.22 * len(rows) + 1.2), 60)
    figure = _figure(8, height)
    axis = figure.subplots()
    for key, color, size in (("selected", _ORANGE, 0.8), ("zeros", _BLUE, 0.45)):
        shares = [100 * row[key] / row["weights"] for row in rows]
        axis.barh(range(len(rows)), shares, size, color=color, label=f"{key} (% of weights)")
    axis.set_yticks(range(len(rows)), names, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_title(f"sparsity per layer at iteration {latest}", fontsize=11)
    axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.6 / height), ncols=2, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    _write(figure, path)


def comparison(sheets: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Rows of crops side by side, each with its title and note.

    Args:
        sheets: one sequence of panels per row, equally long.
        path: PNG to write.
    """
    across = len(sheets[0])
    figure = _figure(2.6 * across, 3.05 * len(sheets))
    axes = figure.subplots(len(sheets), across, squeeze=False)
    for line, panels in zip(axes, sheets, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            axis.imshow(panel.image, interpolation="nearest")
            axis.set_title(panel.title, fontsize=10, pad=4)
            axis.set_xlabel(panel.note, fontsize=9, labelpad=3)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    _write(figure, path)


def busiest(image: np.ndarray, size: int, multiple: int, border: int = 0) -> tuple[int, int]:
    """Top left corner of the window with the most detail, as the sum of pixel differences.

    Args:
        image: [H, W, 3] uint8.
        size: side of the window in pixels.
        multiple: the corner's coordinates are multiples of it.
        border: pixels at the image's edge which the window avoids.
    """
    grey = image.astype(np.float64).mean(axis=2)
    detail = np.zeros_like(grey)
    detail[:-1] += np.abs(np.diff(grey, axis=0))
    detail[:, :-1] += np.abs(np.diff(grey, axis=1))
    total = np.pad(detail.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    height, width = grey.shape
    tops = np.arange(-(-border // multiple) * multiple, height - size - border + 1, multiple)
    lefts = np.arange(-(-border // multiple) * multiple, width - size - border + 1, multiple)
    if not len(tops) or not len(lefts):
        return 0, 0
    high, low = total[tops + size], total[tops]
    sums = high[:, lefts + size] - high[:, lefts] - low[:, lefts + size] + low[:, lefts]
    top, left = np.unravel_index(int(sums.argmax()), sums.shape)
    return int(tops[top]), int(lefts[left])


def _psnr(axis: Any, rows: Sequence[dict[str, Any]], bicubic: float | None) -> None:
    scored = [row for row in rows if row.get("psnr") is not None]
    soft = [row for row in scored if (row["zeros"] or 0) < (row["selected"] or 0)]
    hard = [row for row in scored if row not in soft]
    for points, label, color, face in (
        (soft, "soft model: selected weights shrunk, not yet zero", _ORANGE, "white"),
        (hard, "sparse model" if soft else "model", _BLUE, _BLUE),
    ):
        x, y = [row["iteration"] for row in points], [row["psnr"] for row in points]
        if points:
            axis.plot(x, y, "o-", color=color, markerfacecolor=face, markersize=4, label=label)
    if bicubic is not None:
        axis.axhline(bicubic, color="black", linewidth=1, linestyle=":", label="bicubic")
    if not scored:
        axis.text(0.5, 0.5, "no validation", transform=axis.transAxes, ha="center", color=_GREY)
    elif soft or bicubic is not None:
        axis.legend(fontsize=8, frameon=False, loc="lower right")
    # The first iterations score far lower than the rest and would compress the curve.
    top = max([row["psnr"] for row in scored] + ([bicubic] if bicubic else []), default=0)
    axis.set_ylim(bottom=max(axis.get_ylim()[0], top - 4))
    axis.set_ylabel("PSNR (dB)")


def _line(axis: Any, rows: Sequence[dict[str, Any]], key: str, label: str) -> None:
    known = [row for row in rows if row.get(key) is not None]
    axis.plot([r["iteration"] for r in known], [r[key] for r in known], color=_BLUE, linewidth=1.2)
    axis.set_ylabel(label)


def _figure(width: float, height: float) -> Any:
    import_optional("matplotlib", "matplotlib", "plots")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: str | Path) -> None:
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=130))


def of_run(folder: str | Path, out: str | Path | None = None) -> list[Path]:
    """Draws curves.png, for a pruned run layers.png, and gradients.png where they were recorded.

    Args:
        folder: experiments/<name>.
        out: folder for the pictures; None: visualization inside the run's.

    Returns:
        The pictures written.

    Raises:
        FileNotFoundError: the folder is not one of a run.
    """
    folder = user_path(folder)
    log = folder / "log"
    if not (log / "train.csv").is_file():
        raise FileNotFoundError(f"{folder} is not a run of `issp train`: it has no log/train.csv")
    out = user_path(out) if out else folder / "visualization"
    written = [out / "curves.png"]
    training = logging.read_csv(log / "train.csv")
    curves(training, written[0], title=folder.name)
    pruned, recorded = (_rows(log / name) for name in ("layers.csv", "gradients.csv"))
    if pruned:
        written.append(out / "layers.png")
        layers(pruned, written[-1])
    if recorded:
        written.append(out / "gradients.png")
        gradients(recorded, training, written[-1])
    return written


def _rows(path: Path) -> list[dict[str, Any]]:
    return logging.read_csv(path) if path.is_file() else []
