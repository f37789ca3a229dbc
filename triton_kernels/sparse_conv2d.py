"""sparse_conv2d and its values' gradient: implicit GEMM over the kept positions, without im2col.

Forward. A program makes a tile of one image's output pixels for rows of one block. It walks the
block's entries in chunks and gathers, per entry, the input pixels that its tap sees: a warp's lanes
are neighbouring pixels, so that a gathered row is one or two lines. The border, the stride, the
padding and the zeros between the pixels of `upsample` are worked out once per program, as a word of
bits per pixel that says which taps see the input, so that a gathered element costs an AND, an
addition and a load. Programs of the same pixels and different blocks are neighbours: they share the
input in L2. Traffic per entry and tile: v weights, 4 bytes of position, PIXELS of input (L1 or L2).

Gradient of the values. A program takes a share of the pixels (a split) and chunks of a block's
entries; the splits' sums are added in order afterwards, so that the bits do not depend on the run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sparse import (
    GRAD_RUN,
    activated,
    added,
    block_entries,
    grad_sizes,
    index_of,
    multiplied,
    narrowed,
    nothing,
    partial_sums,
    positions,
    precision,
    run_of,
    shares,
    store,
    summed,
    tile_sizes,
    weights,
)

FAR: tl.constexpr = tl.constexpr(-(2**30))  # a row above every input, for pixels that do not exist


@triton.jit
def holds_input(u, size, UPSAMPLE: tl.constexpr):
    """Whether row (column) u of the upsampled input holds input."""
    if UPSAMPLE == 1:
        return (u >= 0) & (u < size)
    else:
        return (u >= 0) & (u < size * UPSAMPLE) & (u % UPSAMPLE == 0)


@triton.jit
def divided_up(u, UPSAMPLE: tl.constexpr):
    """ceil(u / UPSAMPLE): with d // UPSAMPLE added, the input row of u + d where that holds one."""
    return tl.where(u > 0, (u + (UPSAMPLE - 1)) // UPSAMPLE, -((0 - u) // UPSAMPLE))


@triton.jit
def tap_bits(
    first_y, first_x, height, width, KERNEL: tl.constexpr, DILATION: tl.constexpr,
    UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Per pixel a bit for each of at most 31 taps: does it see the input?"""
    along = tl.zeros_like(first_x)
    for kx in tl.static_range(KERNEL[1]):
        seen = holds_input(first_x + kx * DILATION[1], width, UPSAMPLE[1])
        along |= seen.to(tl.int32) << kx
    bits = tl.zeros_like(first_y)
    for ky in tl.static_range(KERNEL[0]):
        seen = holds_input(first_y + ky * DILATION[0], height, UPSAMPLE[0])
        bits |= tl.where(seen, along << (ky * KERNEL[1]), 0)
    return bits


@triton.jit
def pixels_of(
    pixel, pixels, out_width, height, width, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    PADDING: tl.constexpr, DILATION: tl.constexpr, UPSAMPLE: tl.constexpr,
):  # fmt: skip
    """Of output pixels: where tap 0 lies in a plane, the bits of the taps, tap 0's row and column.

    Of 32 taps and more there are no bits: rows and columns are compared instead.
    """
    first_y = tl.where(pixel < pixels, pixel // out_width * STRIDE[0] - PADDING[0], FAR)
    first_x = pixel % out_width * STRIDE[1] - PADDING[1]
    place = divided_up(first_y, UPSAMPLE[0]) * width + divided_up(first_x, UPSAMPLE[1])
    bits = first_y
    if KERNEL[0] * KERNEL[1] < 32:
        bits = tap_bits(first_y, first_x, height, width, KERNEL, DILATION, UPSAMPLE)
    return place, bits, first_y, first_x


@triton.jit
def taps_of(
    column, inside, plane, width, KERNEL: tl.constexpr, DILATION: tl.constexpr,
    UPSAMPLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of entries: what they add to a pixel's place, with the tap in 5 bits; their tap's offsets."""
    tap = column % (KERNEL[0] * KERNEL[1])
    dy, dx = tap // KERNEL[1] * DILATION[0], tap % KERNEL[1] * DILATION[1]
    channel = (column // (KERNEL[0] * KERNEL[1])).to(INDEX)
    offset = channel * plane + (dy // UPSAMPLE[0] * width + dx // UPSAMPLE[1])
    if KERNEL[0] * KERNEL[1] < 32:
        return once((offset << 5) | tl.where(inside, tap, 31)), dy, dx  # no pixel sees tap 31
    else:
        return once(offset << 5), once(tl.where(inside, dy, FAR)), once(dx)


@triton.jit
def once(value):
    """The same values, worked out by one thread each instead of by all that need them.

    The compiler repeats what it finds cheap rather than move it between threads: here, for every
    pixel, two divisions per entry. A gather it does not repeat.
    """
    return tl.gather(value, tl.arange(0, value.shape[0]), 0)


@triton.jit
def gathered(
    image, taps, seen_from, height, width, KERNEL: tl.constexpr, UPSAMPLE: tl.constexpr
):  # fmt: skip
    """The input [entries, pixels] that entries see: zero at the border and outside the weight."""
    packed, place = taps[0][:, None], seen_from[0][None, :]
    if KERNEL[0] * KERNEL[1] < 32:
        seen = ((seen_from[1][None, :] >> (packed & 31).to(tl.int32)) & 1) != 0
    else:
        seen = holds_input(seen_from[2][None, :] + taps[1][:, None], height, UPSAMPLE[0])
        u = seen_from[3][None, :] + taps[2][:, None]
        seen = seen & holds_input(u, width, UPSAMPLE[1])
    return tl.load((image + place) + (packed >> 5), mask=seen, other=0.0)


# One compilation for all values of the counts, which change no instruction that matters.
@triton.jit(
    do_not_specialize=[
        "entries", "length", "outputs", "image_size", "plane", "height", "width", "out_width",
        "tiles", "parts", "row_tiles",
    ]
)  # fmt: skip
def convolve(
    x, values, columns, starts, bias, residual, y, entries, length, outputs, image_size, plane,
    height, width, pixels, out_width, tiles, parts, row_tiles,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    UPSAMPLE: tl.constexpr, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr, PIXELS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of an image's pixels for rows of a block."""
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    n, block = (tile // tiles).to(tl.int64), part // row_tiles
    row = part % row_tiles * ROWS + tl.arange(0, ROWS)
    pixel = tile % tiles * PIXELS + tl.arange(0, PIXELS)
    seen_from = pixels_of(
        pixel, pixels, out_width, height, width, KERNEL, STRIDE, PADDING, DILATION, UPSAMPLE
    )
    image = x + n * image_size
    begin, end = block_entries(starts, block, entries)
    total = nothing(x, ROWS, PIXELS)
    for r in range(begin, end, RUN):
        run = run_of(total, RUN)
        for e in range(r, tl.minimum(r + RUN, end), CHUNK):
            entry = e + tl.arange(0, CHUNK)
            column, inside = positions(columns, entry, end, length)
            taps = taps_of(column, inside, plane, width, KERNEL, DILATION, UPSAMPLE, INDEX)
            w = weights(values, entry[None, :], end, row[:, None], V, INDEX)
            tile_x = gathered(image, taps, seen_from, height, width, KERNEL, UPSAMPLE)
            run = multiplied(w, tile_x, run, PRECISION)
        total = added(total, run, RUN)
    total = activated(total, bias, block * V + row[:, None], row[:, None] < V, ACTIVATION)
    first = (n * outputs + block * V) * pixels
    if residual is not None:
        residual += first
    place = row[:, None].to(INDEX) * pixels + pixel[None, :]
    store(total, y + first, residual, place, (row[:, None] < V) & (pixel[None, :] < pixels))


@triton.jit(
    do_not_specialize=[
        "entries", "length", "outputs", "image_size", "plane", "height", "width", "out_width",
        "tiles", "all_tiles", "parts", "row_tiles", "ways", "share",
    ]
)  # fmt: skip
def convolve_values_grad(
    x, grad, columns, starts, partial, entries, length, outputs, image_size, plane, height, width,
    pixels, out_width, tiles, all_tiles, parts, row_tiles, ways, share,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    PRECISION: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """One split's share of the pixels for some chunks of a block's entries."""
    way, part = tl.program_id(0) % ways, tl.program_id(0) // ways % parts
    split = tl.program_id(0) // ways // parts
    block = part // row_tiles
    row = part % row_tiles * ROWS + tl.arange(0, ROWS)
    first_tile = split * share
    begin, end = block_entries(starts, block, entries)
    for e in range(begin + way * CHUNK, end, ways * CHUNK):
        entry = e + tl.arange(0, CHUNK)
        column, inside = positions(columns, entry, end, length)
        taps = taps_of(column, inside, plane, width, KERNEL, DILATION, (1, 1), INDEX)
        total = nothing(x, CHUNK, ROWS)
        last = tl.minimum(first_tile + share, all_tiles)
        for r in range(first_tile, last, GRAD_RUN // PIXELS):
            run = nothing(x, CHUNK, ROWS)
            for tile in range(r, tl.minimum(r + GRAD_RUN // PIXELS, last)):
                n = (tile // tiles).to(tl.int64)
                pixel = tile % tiles * PIXELS + tl.arange(0, PIXELS)
                seen_from = pixels_of(
                    pixel, pixels, out_width, height, width, KERNEL, STRIDE, PADDING, DILATION,
                    (1, 1),
                )  # fmt: skip
                image = x + n * image_size
                tile_x = gathered(image, taps, seen_from, height, width, KERNEL, (1, 1))
                own = grad + (n * outputs + block * V) * pixels
                place = row[:, None].to(INDEX) * pixels + pixel[None, :]
                there = (row[:, None] < V) & (pixel[None, :] < pixels)
                g = tl.load(own + place, mask=there, other=0.0)
                run = multiplied(tile_x, tl.trans(g), run, PRECISION)
            total += run
        place = (split.to(tl.int64) * entries + entry[:, None]) * V + row[None, :]
        there = (entry[:, None] < end) & (row[None, :] < V)
        tl.store(partial + place, narrowed(total, partial.dtype.element_ty), mask=there)


def _pairs(geometry: Sequence[int]) -> list[tuple[int, int]]:
    """Height and width of each: kernel, stride, padding, dilation; upsample, size."""
    return list(zip(geometry[::2], geometry[1::2], strict=True))


def _image(x: Tensor, kernel: Sequence[int], size: Sequence[int], columns: int) -> dict:
    """Sizes that both kernels take, tiles of `columns` pixels per image included."""
    channels, height, width = x.shape[1:]
    return {
        "length": channels * kernel[0] * kernel[1], "image_size": channels * height * width,
        "plane": height * width, "height": height, "width": width, "pixels": size[0] * size[1],
        "out_width": size[1], "tiles": triton.cdiv(size[0] * size[1], columns),
    }  # fmt: skip


def _index(x: Tensor, v: int, size: Sequence[int], entries: int) -> tl.dtype:
    # Offsets into one image, with 5 bits for the tap, into a block's rows and into the values.
    return index_of(x.numel() // max(1, x.shape[0]) * 32, v * size[0] * size[1], entries * v)


def sparse_conv2d(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    transposed: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    geometry: Sequence[int],
    activation: str = "none",
    **tile: int,
) -> Tensor:
    """See `sparse_conv2d` in the schemas; `tile` overrides the sizes of a program's tile."""
    images, (entries, v), blocks = x.shape[0], values.shape, starts.numel() - 1
    kernel, stride, padding, dilation, upsample, size = _pairs(geometry)
    y = x.new_empty((images, blocks * v, *size))
    if y.numel() == 0:
        return y
    parts = blocks * triton.cdiv(v, min(triton.next_power_of_2(v), 64))
    epilogue = residual is not None or activation == "gelu"
    how = precision(x.dtype)
    sizes = tile_sizes(x.dtype, how, v, images, size[0] * size[1], parts, epilogue) | tile
    row_tiles = triton.cdiv(v, sizes["ROWS"])
    image = _image(x, kernel, size, sizes["PIXELS"])
    with torch.cuda.device_of(x):
        convolve[(images * image["tiles"] * blocks * row_tiles,)](
            x, values, columns, starts, bias, residual, y, entries=entries, outputs=blocks * v,
            parts=blocks * row_tiles, row_tiles=row_tiles, **image, KERNEL=kernel, STRIDE=stride,
            PADDING=padding, DILATION=dilation, UPSAMPLE=upsample, ACTIVATION=activation,
            PRECISION=how, V=v,
            INDEX=_index(x, v, size, entries), **sizes,
        )  # fmt: skip
    return y


def sparse_conv2d_values_grad(
    x: Tensor,
    grad: Tensor,
    columns: Tensor,
    starts: Tensor,
    v: int,
    geometry: Sequence[int],
    **tile: int,
) -> Tensor:
    """See `sparse_conv2d_values_grad` in the schemas; `tile` overrides sizes of a tile."""
    images, size, entries, blocks = x.shape[0], grad.shape[2:], columns.numel(), starts.numel() - 1
    kernel, stride, padding, dilation = _pairs(geometry)
    sizes = grad_sizes(x.dtype, v) | tile
    row_tiles, image = triton.cdiv(v, sizes["ROWS"]), _image(x, kernel, size, sizes["PIXELS"])
    all_tiles, dense = images * image["tiles"], blocks * v * image["length"]
    ways, splits, share = shares(entries, v, dense, blocks * row_tiles, all_tiles)
    partial = partial_sums(x, splits, entries, v)
    if entries == 0:
        return partial[0]
    with torch.cuda.device_of(x):
        convolve_values_grad[(ways * blocks * row_tiles * splits,)](
            x, grad, columns, starts, partial, entries=entries, outputs=blocks * v,
            all_tiles=all_tiles, parts=blocks * row_tiles, row_tiles=row_tiles, ways=ways,
            share=share, **image, KERNEL=kernel, STRIDE=stride, PADDING=padding,
            DILATION=dilation, PRECISION=precision(x.dtype), V=v,
            INDEX=_index(x, v, size, entries), **sizes,
        )  # fmt: skip
        return summed(partial, x)
