"""Comparison sheets: crops of images side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from issp.sr.plots import drawing


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


def comparison(sheets: Sequence[Sequence[Panel]], path: str | Path) -> None:
    """Rows of crops side by side, each with its title and note.

    Args:
        sheets: one sequence of panels per row, equally long.
        path: PNG to write.
    """
    across = len(sheets[0])
    figure = drawing.new_figure(2.6 * across, 3.05 * len(sheets))
    axes = figure.subplots(len(sheets), across, squeeze=False)
    for line, panels in zip(axes, sheets, strict=True):
        for axis, panel in zip(line, panels, strict=True):
            axis.imshow(panel.image, interpolation="nearest")
            axis.set_title(panel.title, fontsize=10, pad=4)
            axis.set_xlabel(panel.note, fontsize=9, labelpad=3)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    drawing.write(figure, path)


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
