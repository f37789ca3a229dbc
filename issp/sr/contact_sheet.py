"""A contact sheet: the busiest place of upscaled pictures beside other ways to enlarge it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch import nn

from issp.sr import data, metrics, plots
from issp.sr.evaluate import super_resolve
from issp.sr.plots import Panel

MOST_ROWS = 12  # pictures on a sheet
_SIDE = 48  # input pixels of a crop
_LOOKED_AT = 512  # pixels of the larger side in which the place is sought
_WHOLE = 360  # pixels of the larger side of a whole picture
_CONTEXT = 64  # most input pixels around a crop that another network gets


class ContactSheet:
    """Rows of panels: whole picture, input, bicubic, another network if there is one, result.

    Args:
        scale: of the results.
        name: of the network that makes them.
        others: name -> network of the same scale.
    """

    def __init__(self, scale: int, name: str, others: dict[str, nn.Module]) -> None:
        self._scale, self._name, self._others = scale, name, others
        self._rows: list[list[Panel]] = []

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, name: str, rgb: np.ndarray, result: np.ndarray) -> None:
        """A row for a picture, unless there are `MOST_ROWS`.

        Args:
            name: of the picture.
            rgb, result: [H, W, 3] and [H * scale, W * scale, 3] uint8.
        """
        if len(self._rows) == MOST_ROWS:
            return
        scale = self._scale
        (top, left), side = _busiest_place(rgb)
        crop = rgb[top : top + side, left : left + side]
        rows, cols = (slice(i * scale, (i + side) * scale) for i in (top, left))
        own = result[rows, cols].copy()
        box = top, left, side
        ways = {"bicubic": _around(rgb, box, 8, 1, lambda x: data.imresize(x, scale))}
        for other, network in self._others.items():
            ways[other] = _by_network(network, rgb, box)
        panels = [
            Panel(plots.plain(name), _reduced(result), f"{result.shape[1]} x {result.shape[0]}"),
            Panel("input", crop, f"{side} pixels from {left},{top}"),
        ]
        panels += [
            Panel(plots.plain(way), image, _apart(image, own)) for way, image in ways.items()
        ]
        self._rows.append([*panels, Panel(plots.plain(self._name), own, "the result")])

    def write(self, path: Path) -> None:
        """Writes the sheet as PNG."""
        plots.comparison(self._rows, path)


def _busiest_place(rgb: np.ndarray) -> tuple[tuple[int, int], int]:
    """Top left corner and side of the crop with the most detail."""
    height, width = rgb.shape[:2]
    side = min(_SIDE, height, width)
    step = max(1, -(-max(height, width) // _LOOKED_AT))
    top, left = plots.busiest(rgb[::step, ::step], max(1, side // step), 1)
    return (min(step * top, height - side), min(step * left, width - side)), side


def _by_network(network: nn.Module, rgb: np.ndarray, box: tuple[int, int, int]) -> np.ndarray:
    radius = getattr(network, "receptive_radius", None)
    context = _CONTEXT if radius is None else min(radius, _CONTEXT)
    multiple = getattr(network, "pad_multiple", 1)
    return _around(rgb, box, context, multiple, lambda x: super_resolve(network, x))


def _around(
    rgb: np.ndarray,
    box: tuple[int, int, int],
    context: int,
    multiple: int,
    enlarge: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """A box (top, left, side) of an enlarged picture, of which only its surroundings are computed.

    Args:
        context: input pixels around the box that are computed as well.
        multiple: of which the first one's coordinates are multiples.
        enlarge: [h, w, 3] uint8 to a multiple of its size.
    """
    *corner, side = box
    first = [max(0, i - context) // multiple * multiple for i in corner]
    rows, cols = (slice(f, i + side + context) for f, i in zip(first, corner, strict=True))
    part = np.ascontiguousarray(rgb[rows, cols])
    large = enlarge(part)
    scale = large.shape[0] // part.shape[0]
    rows, cols = (
        slice((i - f) * scale, (i - f + side) * scale) for f, i in zip(first, corner, strict=True)
    )
    return large[rows, cols].copy()


def _reduced(image: np.ndarray) -> np.ndarray:
    step = max(1, -(-max(image.shape[:2]) // _WHOLE))
    return image[::step, ::step].copy()


def _apart(image: np.ndarray, own: np.ndarray) -> str:
    """How far a way is from the result."""
    most = int(np.abs(image.astype(np.int16) - own).max())
    if not most:
        return "equal to the result"
    decibels = metrics.psnr(image, own, 0, y_channel=False)
    return f"up to {most} levels apart, {decibels:.1f} dB"
