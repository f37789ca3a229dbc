"""Visual comparison: an image with a box, and what several models make of the box.

Source: figures 3 to 12 of the supplement (docs/method.md, section 7).
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from issp.sr import metrics
from issp.sr.plots import drawing

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; the last two are outside

# Of Urban100 at x4, in pixels of the original; from the names of the authors' files. For img_012
# they give two. The images of two of the ten figures are not named.
PAPER_BOXES: dict[str, Box] = {
    "img_072": (387, 204, 503, 264),
    "img_055": (761, 574, 1002, 695),
    "img_061": (843, 206, 1003, 286),
    "img_012": (540, 608, 633, 751),
    "img_012b": (858, 699, 968, 754),
    "img_032": (754, 565, 894, 633),
    "img_044": (489, 458, 629, 526),
    "img_010": (229, 639, 373, 712),
    "img_023": (788, 350, 952, 432),
}
_LEAST = 8  # pixels of a side of a box

# Inches.
_CROP_WIDTH, _CROP_HEIGHT = 1.9, 2.6  # a crop fits in
_CELL, _GAP, _MARGIN = 1.3, 0.12, 0.1  # least width of a crop with its text; distances
_LINE, _BELOW, _NOTE = 0.15, 0.25, 0.3  # height of a line of a name, of a score, of the note
_WHOLE_WIDTH, _WHOLE_HEIGHT = 6.0, 2.5  # largest width and usual height of the whole image


@dataclass(frozen=True)
class Crop:
    """What one model makes of the box.

    Attributes:
        name: of the model.
        image: [h, w, 3] uint8, the box alone.
        box_psnr: in dB, inside the box, without a border.
        psnr: in dB, of the whole image without its border.
    """

    name: str
    image: np.ndarray
    box_psnr: float
    psnr: float


def check_box(box: Box, hr: np.ndarray, name: str) -> None:
    """Refuses a box that does not lie inside an image.

    Args:
        box: to check.
        hr: [H, W, 3], cut to a multiple of the scale.
        name: of the image.
    """
    height, width = hr.shape[:2]
    left, top, right, bottom = box
    text = ",".join(map(str, box))
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"the box {text} does not lie in {name}, which is {width} x {height} pixels: left and "
            "top come first, and count from 0"
        )
    if min(right - left, bottom - top) < _LEAST:
        raise ValueError(f"the box {text} is smaller than {_LEAST} x {_LEAST} pixels: widen it")


def score_crop(
    name: str, sr: np.ndarray, hr: np.ndarray, box: Box, border: int, y_channel: bool = True
) -> Crop:
    """Cuts the box out of a result and scores both.

    Args:
        name: of the model.
        sr, hr: [H, W, 3] uint8, the result and the original.
        box: to cut out.
        border: pixels that the score of the whole image leaves out at each side.
        y_channel: see `issp.metrics.psnr`.
    """
    left, top, right, bottom = box
    window = np.s_[top:bottom, left:right]
    inside = metrics.psnr(sr[window], hr[window], 0, y_channel)
    return Crop(name, sr[window].copy(), inside, metrics.psnr(sr, hr, border, y_channel))


def draw_crops(
    title: str, hr: np.ndarray, box: Box, crops: Sequence[Crop], path: str | Path, note: str
) -> None:
    """The original with its box, then the box in the original and in each result.

    Args:
        title: name of the image.
        hr: [H, W, 3] uint8, the original.
        box: inside of it.
        crops: of the same box, in their order.
        path: PNG, PDF or SVG to write.
        note: how PSNR was taken.
    """
    left, upper, right, lower = box
    panels = [("original (HR)", "PSNR: box / image", hr[upper:lower, left:right])]
    panels += [(c.name, f"{_db(c.box_psnr)} / {_db(c.psnr)} dB", c.image) for c in crops]
    across = -(-len(panels) // _lines(len(panels)))
    width, height = _fit(right - left, lower - upper, _CROP_WIDTH, _CROP_HEIGHT)
    cell = max(width, _CELL) + _GAP
    names = [drawing.plain(textwrap.fill(name, int(13 * cell))) for name, _, _ in panels]
    above = _GAP + _LINE * max(1 + name.count("\n") for name in names)
    line = above + height + _BELOW
    needed = _lines(len(panels)) * line
    around = _GAP + _LINE + _BELOW
    whole = _fit(hr.shape[1], hr.shape[0], _WHOLE_WIDTH, max(needed - around, _WHOLE_HEIGHT))
    total = max(needed, whole[1] + around) + _NOTE + _MARGIN
    beside = 2 * _MARGIN + whole[0] + _GAP
    sheet = _Sheet(beside + across * cell + _MARGIN, total)
    top = total - _NOTE - _MARGIN
    axis = sheet.add(hr, _MARGIN, top, *whole, around - _BELOW)
    _mark_box(axis, box)
    axis.set_title(drawing.plain(title), fontsize=9, pad=3)
    axis.set_xlabel(f"box {left},{upper},{right},{lower}", fontsize=8, labelpad=2)
    for i, (name, (_, score, image)) in enumerate(zip(names, panels, strict=True)):
        x = beside + i % across * cell + (cell - width) / 2
        axis = sheet.add(image, x, top - i // across * line, width, height, above)
        axis.set_title(name, fontsize=8, pad=3)
        axis.set_xlabel(score, fontsize=8, labelpad=2)
    sheet.figure.supxlabel(note, fontsize=8)
    drawing.write(sheet.figure, path)


class _Sheet:
    """A figure whose images stand at places in inches.

    Args:
        width, height: of the figure.
    """

    def __init__(self, width: float, height: float) -> None:
        self.figure = drawing.new_figure(width, height)
        self.figure.set_layout_engine("none")
        self._size = width, height

    def add(
        self, image: np.ndarray, x: float, top: float, width: float, height: float, above: float
    ) -> Any:
        """Axes with an image.

        Args:
            image: [h, w, 3] uint8.
            x, width, height: of the image.
            top: upper end of its text, from the note at the bottom of the figure.
            above: height of that text.
        """
        y = _NOTE + top - above - height
        across, up = self._size
        axis = self.figure.add_axes((x / across, y / up, width / across, height / up))
        axis.imshow(image, interpolation="nearest")
        axis.set(xticks=[], yticks=[])
        return axis


def _fit(width: int, height: int, most_width: float, most_height: float) -> tuple[float, float]:
    """The largest size in inches of an image with this many pixels."""
    scale = min(most_width / width, most_height / height)
    return width * scale, height * scale


def _lines(panels: int) -> int:
    """Lines of crops beside the whole image: two, as in the paper, or more for many."""
    return 1 if panels <= 2 else max(2, math.ceil(panels / 5))


def _db(psnr: float) -> str:
    return f"{psnr:.2f}" if math.isfinite(psnr) else "inf"


def _mark_box(axis: Any, box: Box) -> None:
    from matplotlib.patches import Rectangle

    left, top, right, bottom = box
    # Light inside dark: seen on any ground, without colour too.
    for color, width in (("black", 3.5), ("yellow", 1.5)):
        corner, size = (left - 0.5, top - 0.5), (right - left, bottom - top)
        axis.add_patch(Rectangle(corner, *size, fill=False, edgecolor=color, linewidth=width))


def parse_box(text: str) -> Box:
    """The box that "x1,y1,x2,y2" means."""
    match = re.fullmatch(r"(-?\d+),(-?\d+),(-?\d+),(-?\d+)", text.replace(" ", ""))
    if match is None:
        raise ValueError(f"the box {text!r} must be four whole numbers: x1,y1,x2,y2")
    left, top, right, bottom = map(int, match.groups())
    return left, top, right, bottom


def paper_image(figure: str, names: Sequence[str]) -> int:
    """Which image of Urban100 a figure shows.

    Args:
        figure: a name of `PAPER_BOXES`.
        names: of the images, such as img_072, img_072_SRF_4 or img_072_SRF_4_HR.

    Raises:
        ValueError: none of them, or several.
    """
    image = figure.rstrip("b")
    found = [i for i, name in enumerate(names) if re.match(rf"{image}(?!\d)", name)]
    if len(found) != 1:
        which = "none" if not found else " and ".join(names[i] for i in found)
        raise ValueError(f"{figure} needs one image {image} of Urban100; the folder has {which}")
    return found[0]
