"""sparse_conv2d and its values' gradient: implicit GEMM over the kept positions, without im2col.

Forward. A program makes a tile of one image's output pixels for rows of one block. It walks the
block's entries in chunks and gathers, per entry, the input pixels that its tap sees: a warp's lanes
are neighbouring pixels, so that a gathered row is one or two cache lines. The border, the stride,
the padding and the zeros between the pixels of `upsample` are computed once per program, as a word
of bits per pixel that says which taps see the input, so that a gathered element costs an AND, an
addition and a load. Programs of the same pixels and different blocks run next to each other, so
that the input comes from L2. Traffic per entry and tile: v weights, 4 bytes of position, PIXELS of
input (L1 or L2).

Gradient of the values. A program takes a range of the pixels (a split) and chunks of a block's
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
    partial_sums,
    positions,
    precision,
    run_of,
    split_tiles,
    store,
    summed,
    tile_sizes,
    weights,
    zeros,
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
    row_bits = tl.zeros_like(first_x)
    for kx in tl.static_range(KERNEL[1]):
        seen = holds_input(first_x + kx * DILATION[1], width, UPSAMPLE[1])
        row_bits |= seen.to(tl.int32) << kx
    bits = tl.zeros_like(first_y)
    for ky in tl.static_range(KERNEL[0]):
        seen = holds_input(first_y + ky * DILATION[0], height, UPSAMPLE[0])
        bits |= tl.where(seen, row_bits << (ky * KERNEL[1]), 0)
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
    offset = divided_up(first_y, UPSAMPLE[0]) * width + divided_up(first_x, UPSAMPLE[1])
    bits = first_y
    if KERNEL[0] * KERNEL[1] < 32:
        bits = tap_bits(first_y, first_x, height, width, KERNEL, DILATION, UPSAMPLE)
    return offset, bits, first_y, first_x


@triton.jit
def taps_of(
    column, inside, plane, width, KERNEL: tl.constexpr, DILATION: tl.constexpr,
    UPSAMPLE: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Of entries: the offset they add to a pixel's, with the tap in 5 bits; their tap's offsets."""
    tap = column % (KERNEL[0] * KERNEL[1])
    dy, dx = tap // KERNEL[1] * DILATION[0], tap % KERNEL[1] * DILATION[1]
    channel = (column // (KERNEL[0] * KERNEL[1])).to(INDEX)
    offset = channel * plane + (dy // UPSAMPLE[0] * width + dx // UPSAMPLE[1])
    if KERNEL[0] * KERNEL[1] < 32:
        # No pixel sees tap 31.
        return materialize((offset << 5) | tl.where(inside, tap, 31)), dy, dx
    else:
        return materialize(offset << 5), materialize(tl.where(inside, dy, FAR)), materialize(dx)


@triton.jit
def materialize(value):
    """The same values, each computed by one thread instead of by all threads that need it.

    The compiler repeats cheap computations rather than move their results between threads: without
    this function, two divisions per entry for every pixel. It does not repeat a gather.
    """
    return tl.gather(value, tl.arange(0, value.shape[0]), 0)


@triton.jit
def gathered(
    image, taps, origins, height, width, KERNEL: tl.constexpr, UPSAMPLE: tl.constexpr
):  # fmt: skip
    """The input [entries, pixels] that entries see: zero at the border and outside the weight."""
    tap_offset, pixel_offset = taps[0][:, None], origins[0][None, :]
    if KERNEL[0] * KERNEL[1] < 32:
        seen = ((origins[1][None, :] >> (tap_offset & 31).to(tl.int32)) & 1) != 0
    else:
        seen = holds_input(origins[2][None, :] + taps[1][:, None], height, UPSAMPLE[0])
        u = origins[3][None, :] + taps[2][:, None]
        seen = seen & holds_input(u, width, UPSAMPLE[1])
    return tl.load((image + pixel_offset) + (tap_offset >> 5), mask=seen, other=0.0)


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
    origins = pixels_of(
        pixel, pixels, out_width, height, width, KERNEL, STRIDE, PADDING, DILATION, UPSAMPLE
    )
    image = x + n * image_size
    begin, end = block_entries(starts, block, entries)
    total = zeros(x, ROWS, PIXELS)
    for r in range(begin, end, RUN):
        run = run_of(total, RUN)
        for e in range(r, tl.minimum(r + RUN, end), CHUNK):
            entry = e + tl.arange(0, CHUNK)
            column, inside = positions(columns, entry, end, length)
            taps = taps_of(column, inside, plane, width, KERNEL, DILATION, UPSAMPLE, INDEX)
            w = weights(values, entry[None, :], end, row[:, None], V, INDEX)
            tile_x = gathered(image, taps, origins, height, width, KERNEL, UPSAMPLE)
            run = multiplied(w, tile_x, run, PRECISION)
        total = added(total, run, RUN)
    total = activated(total, bias, block * V + row[:, None], row[:, None] < V, ACTIVATION)
    first = (n * outputs + block * V) * pixels
    if residual is not None:
        residual += first
    offset = row[:, None].to(INDEX) * pixels + pixel[None, :]
    store(total, y + first, residual, offset, (row[:, None] < V) & (pixel[None, :] < pixels))


@triton.jit(
    do_not_specialize=[
        "entries", "length", "outputs", "image_size", "plane", "height", "width", "out_width",
        "tiles", "all_tiles", "parts", "row_tiles", "programs", "tiles_per_split",
    ]
)  # fmt: skip
def convolve_values_grad(
    x, grad, columns, starts, partial, entries, length, outputs, image_size, plane, height, width,
    pixels, out_width, tiles, all_tiles, parts, row_tiles, programs, tiles_per_split,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr,
    PRECISION: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, CHUNK: tl.constexpr,
    PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The pixels of one split for some chunks of a block's entries."""
    program, part = tl.program_id(0) % programs, tl.program_id(0) // programs % parts
    split = tl.program_id(0) // programs // parts
    block = part // row_tiles
    row = part % row_tiles * ROWS + tl.arange(0, ROWS)
    first_tile = split * tiles_per_split
    begin, end = block_entries(starts, block, entries)
    for e in range(begin + program * CHUNK, end, programs * CHUNK):
        entry = e + tl.arange(0, CHUNK)
        column, inside = positions(columns, entry, end, length)
        taps = taps_of(column, inside, plane, width, KERNEL, DILATION, (1, 1), INDEX)
        total = zeros(x, CHUNK, ROWS)
        last = tl.minimum(first_tile + tiles_per_split, all_tiles)
        for r in range(first_tile, last, GRAD_RUN // PIXELS):
            run = zeros(x, CHUNK, ROWS)
            for tile in range(r, tl.minimum(r + GRAD_RUN // PIXELS, last)):
                n = (tile // tiles).to(tl.int64)
                pixel = tile % tiles * PIXELS + tl.arange(0, PIXELS)
                origins = pixels_of(
                    pixel, pixels, out_width, height, width, KERNEL, STRIDE, PADDING, DILATION,
                    (1, 1),
                )  # fmt: skip
                image = x + n * image_size
                tile_x = gathered(image, taps, origins, height, width, KERNEL, (1, 1))
                grad_image = grad + (n * outputs + block * V) * pixels
                offset = row[:, None].to(INDEX) * pixels + pixel[None, :]
                exists = (row[:, None] < V) & (pixel[None, :] < pixels)
                g = tl.load(grad_image + offset, mask=exists, other=0.0)
                run = multiplied(tile_x, tl.trans(g), run, PRECISION)
            total += run
        offset = (split.to(tl.int64) * entries + entry[:, None]) * V + row[None, :]
        exists = (entry[:, None] < end) & (row[None, :] < V)
        tl.store(partial + offset, narrowed(total, partial.dtype.element_ty), mask=exists)


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
    input_precision = precision(x.dtype)
    sizes = (
        tile_sizes(x.dtype, input_precision, v, images, size[0] * size[1], parts, epilogue) | tile
    )
    row_tiles = triton.cdiv(v, sizes["ROWS"])
    image = _image(x, kernel, size, sizes["PIXELS"])
    with torch.cuda.device_of(x):
        convolve[(images * image["tiles"] * blocks * row_tiles,)](
            x, values, columns, starts, bias, residual, y, entries=entries, outputs=blocks * v,
            parts=blocks * row_tiles, row_tiles=row_tiles, **image, KERNEL=kernel, STRIDE=stride,
            PADDING=padding, DILATION=dilation, UPSAMPLE=upsample, ACTIVATION=activation,
            PRECISION=input_precision, V=v,
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
    programs, splits, tiles_per_split = split_tiles(
        entries, v, dense, blocks * row_tiles, all_tiles
    )
    partial = partial_sums(x, splits, entries, v)
    if entries == 0:
        return partial[0]
    with torch.cuda.device_of(x):
        convolve_values_grad[(programs * blocks * row_tiles * splits,)](
            x, grad, columns, starts, partial, entries=entries, outputs=blocks * v,
            all_tiles=all_tiles, parts=blocks * row_tiles, row_tiles=row_tiles, programs=programs,
            tiles_per_split=tiles_per_split, **image, KERNEL=kernel, STRIDE=stride, PADDING=padding,
            DILATION=dilation, PRECISION=precision(x.dtype), V=v,
            INDEX=_index(x, v, size, entries), **sizes,
        )  # fmt: skip
        return summed(partial, x)
