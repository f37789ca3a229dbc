"""Super-resolving images of any size: padding, cropping back, tiles."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


def upscale(
    model: nn.Module, x: Tensor, tile: int | None = None, tile_overlap: int | None = None
) -> Tensor:
    """Super-resolve images of any size in evaluation mode and without gradients.

    The image is extended at the bottom and on the right to the next multiple of
    `model.pad_multiple`, in the mode `model.pad_mode`, and the result is cropped back
    (docs/method.md, section 6): SwinIR mirrors without repeating the edge, CAT mirrors with the
    edge repeated, EDSR needs no padding. A model without these attributes gets no padding either.

    Args:
        model: the network; its training mode is restored afterwards.
        x: [N, C, H, W] float images in 0..1.
        tile: side of the square tiles in which larger images are processed, to bound memory;
            a multiple of `model.pad_multiple`. None: the image at once.
        tile_overlap: pixels which neighbouring tiles share, a multiple of `model.pad_multiple`;
            each keeps its half. Default: 32, or less if the tile is smaller.

    Returns:
        [N, C, H * scale, W * scale], not clamped.

    Raises:
        ValueError: not a batch of non-empty images, or a tile size that does not fit.
    """
    if x.ndim != 4 or 0 in x.shape:
        raise ValueError(f"images must be [N, C, H, W] and not empty, got shape {tuple(x.shape)}")
    network = getattr(model, "module", model)
    multiple = getattr(network, "pad_multiple", 1)
    overlap = _checked_overlap(tile, tile_overlap, multiple)
    height, width = x.shape[-2:]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            padded = pad(x, multiple, getattr(network, "pad_mode", None))
            if tile is None or max(padded.shape[-2:]) <= tile:
                y = model(padded)
            else:
                y = _upscale_tiles(model, padded, tile, overlap)
    finally:
        for module, training in modes:
            module.training = training
    scale = y.shape[-1] // padded.shape[-1]
    return y[..., : height * scale, : width * scale]


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


def _checked_overlap(tile: int | None, overlap: int | None, multiple: int) -> int:
    if tile is None:
        if overlap is not None:
            raise ValueError(f"tile_overlap {overlap} needs a tile size: pass tile too")
        return 0
    if tile < 1 or tile % multiple:
        raise ValueError(f"tile must be a positive multiple of {multiple}, got {tile}")
    if overlap is None:
        overlap = min(32, tile // 2) // multiple * multiple
    if not 0 <= overlap < tile or overlap % multiple:
        raise ValueError(
            f"tile_overlap must be a multiple of {multiple} below the tile size {tile}, "
            f"got {overlap}"
        )
    return overlap


class TileSpan(NamedTuple):
    """A tile along one axis, in pixels: start..end is read, first..last of it is kept."""

    start: int
    end: int
    first: int
    last: int


def tile_spans(length: int, tile: int, overlap: int) -> list[TileSpan]:
    """Tiles along one axis whose kept parts follow one another without gap or overlap."""
    starts = list(range(0, max(length - overlap, 1), tile - overlap))
    cuts = [0] + [start + overlap // 2 for start in starts[1:]] + [length]
    return [
        TileSpan(start, min(start + tile, length), cuts[i], cuts[i + 1])
        for i, start in enumerate(starts)
    ]


def _upscale_tiles(model: nn.Module, x: Tensor, tile: int, overlap: int) -> Tensor:
    height, width = x.shape[-2:]
    out = None
    for rows in tile_spans(height, tile, overlap):
        for cols in tile_spans(width, tile, overlap):
            y = model(x[..., rows.start : rows.end, cols.start : cols.end])
            scale = y.shape[-1] // (cols.end - cols.start)
            if out is None:
                out = y.new_empty(*y.shape[:2], height * scale, width * scale)
            kept = y[..., _kept(rows, rows.start, scale), _kept(cols, cols.start, scale)]
            out[..., _kept(rows, 0, scale), _kept(cols, 0, scale)] = kept
    return out


def _kept(span: TileSpan, origin: int, scale: int) -> slice:
    """The kept part in output pixels, counted from `origin` (in input pixels)."""
    return slice((span.first - origin) * scale, (span.last - origin) * scale)
