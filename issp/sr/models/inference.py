"""Super-resolving images of any size: padding, cropping back, tiles."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from issp.sr.models.tiling import TileSpan, Tiling, fitting_tiling, fixed_tiling, tile_spans


class Part(NamedTuple):
    """A part of a result, of which there are `total`.

    Attributes:
        rows, cols: where it belongs in the result.
        pixels: [N, C, rows, cols], not clamped, on the network's device.
        scale: output size over input size.
    """

    rows: slice
    cols: slice
    pixels: Tensor
    scale: int
    total: int


def upscale(
    model: nn.Module,
    x: Tensor,
    tile: int | str | None = None,
    tile_overlap: int | None = None,
) -> Tensor:
    """Super-resolve images of any size in evaluation mode and without gradients.

    The image is extended at the bottom and on the right to the next multiple of
    `model.pad_multiple`, in the mode `model.pad_mode`, and the result is cropped back
    (docs/method.md, section 6): SwinIR mirrors without repeating the edge, CAT mirrors with the
    edge repeated, EDSR needs no padding. A model without these attributes gets no padding either.

    Args:
        model: the network; its training mode is restored afterwards.
        x: [N, C, H, W] float images in 0..1.
        tile: largest side of the tiles in which larger images are processed, to bound memory;
            a multiple of `model.pad_multiple`. All tiles of an image have one size. "auto": a size
            that the network and the memory suit. None: the image at once.
        tile_overlap: pixels which neighbouring tiles share at least, a multiple of
            `model.pad_multiple`; each keeps its half. Default: twice `model.receptive_radius`,
            which makes the seams exact; 32 or less if there is none or that is more than half of
            the tile.

    Returns:
        [N, C, H * scale, W * scale], not clamped.

    Raises:
        ValueError: not a batch of non-empty images, or a tile size that does not fit.
    """
    _check_images(x)
    if tile == "auto" and tile_overlap is None:
        with _evaluation_mode(model):
            tiling = fitting_tiling(model, x.shape[1])
    elif isinstance(tile, str):
        raise ValueError(f"tile must be a size, None, or 'auto' without an overlap, got {tile!r}")
    else:
        tiling = fixed_tiling(model, tile, tile_overlap)
    result = None
    for part in upscale_parts(model, x, tiling):
        if part.total == 1:
            return part.pixels
        if result is None:
            size = [side * part.scale for side in x.shape[-2:]]
            result = part.pixels.new_empty(*part.pixels.shape[:2], *size)
        result[..., part.rows, part.cols] = part.pixels
    assert result is not None  # an image has at least one part
    return result


def upscale_parts(
    model: nn.Module, x: Tensor, tiling: Tiling, white: float = 1.0
) -> Iterator[Part]:
    """As `upscale`, tile by tile: neither the whole result nor the image in floats is in memory.

    Args:
        model: the network; it is in evaluation mode until the last part has been taken.
        x: [N, C, H, W] in 0..white; may be on another device and of another dtype than the network.
        tiling: see `issp.sr.models.tiling`.
        white: what the image is divided by, in float32.
    """
    _check_images(x)
    network = getattr(model, "module", model)
    multiple = getattr(network, "pad_multiple", 1)
    height, width = x.shape[-2:]
    x = pad(x, multiple, getattr(network, "pad_mode", None))
    tile = tiling.tile or max(x.shape[-2:])
    # Whole vectors in each row: sparse layers take 15 % longer on a width of 288 than on 256.
    all_rows, all_cols = (
        tile_spans(length, tile, tiling.overlap, multiple, align)
        for length, align in zip(x.shape[-2:], (1, 64), strict=True)
    )
    like = next(model.parameters(), x)
    with _evaluation_mode(model):
        for rows in all_rows:
            for cols in all_cols:
                tile_x = x[..., rows.start : rows.end, cols.start : cols.end]
                if white != 1:
                    tile_x = tile_x.contiguous().float() / white
                with torch.no_grad():
                    y = model(tile_x.to(like.device, like.dtype))
                scale = y.shape[-1] // tile_x.shape[-1]
                yield Part(
                    _kept(rows, 0, height, scale),
                    _kept(cols, 0, width, scale),
                    y[
                        ...,
                        _kept(rows, rows.start, height, scale),
                        _kept(cols, cols.start, width, scale),
                    ],
                    scale,
                    len(all_rows) * len(all_cols),
                )


def _check_images(x: Tensor) -> None:
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"images must be [N, C, H, W] and not empty, got shape {tuple(x.shape)}")


def _kept(span: TileSpan, origin: int, size: int, scale: int) -> slice:
    """The kept part in output pixels, counted from `origin` (in input pixels), without padding."""
    return slice((span.first - origin) * scale, (min(span.last, size) - origin) * scale)


@contextlib.contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def pad(x: Tensor, multiple: int, mode: str | None) -> Tensor:
    """Extend images at the bottom and on the right to the next multiple of a size.

    Args:
        x: [N, C, H, W].
        multiple: what H and W must divide by; images that already do are returned as they are.
        mode: "reflect" (edge not repeated) or "symmetric" (edge repeated). Images smaller than the
            padding are mirrored again and again.

    Raises:
        ValueError: any other mode.
    """
    if multiple == 1:
        return x
    if mode not in ("reflect", "symmetric"):
        raise ValueError(f"pad mode must be 'reflect' or 'symmetric', got {mode!r}")
    for dim in (2, 3):
        size = x.shape[dim]
        padded = -(-size // multiple) * multiple
        if padded != size:
            x = x.index_select(dim, _mirrored(size, padded, mode, x.device))
    return x


def _mirrored(size: int, padded: int, mode: str, device) -> Tensor:
    """Indices 0..size-1, then back and forth, `padded` of them."""
    index = torch.arange(padded, device=device)
    if mode == "symmetric":
        index = index % (2 * size)
        return torch.minimum(index, 2 * size - 1 - index)
    if size == 1:
        return torch.zeros_like(index)
    index = index % (2 * size - 2)
    return torch.minimum(index, 2 * size - 2 - index)
