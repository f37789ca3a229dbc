"""sparse_matmul and its values' gradient, on rows of x as they lie in memory.

Forward. A program makes a tile of rows of x for rows of one block: it gathers the kept elements of
its rows chunk by chunk, a warp's lanes on the kept positions of a few rows, which are near each
other in memory. Programs of the same rows of x and different blocks run next to each other, so
that the rows come from L2. Traffic per entry and tile: v weights, 4 bytes of position, PIXELS
elements of x (L1 or L2).

Gradient of the values. A program takes a range of the rows of x (a split) and chunks of a block's
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


@triton.jit
def gathered_rows(x, item, items, column, inside, length, INDEX: tl.constexpr):
    """Elements [items, entries] of x; zero behind the last row and outside the weight."""
    offset = item[:, None].to(INDEX) * length + column[None, :]
    return tl.load(x + offset, mask=(item[:, None] < items) & inside[None, :], other=0.0)


# One compilation for all values of the counts, which change no instruction that matters.
@triton.jit(do_not_specialize=["entries", "length", "items", "parts", "row_tiles"])
def multiply(
    x, values, columns, starts, bias, residual, y, entries, length, outputs, items, parts,
    row_tiles, ACTIVATION: tl.constexpr, PRECISION: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, RUN: tl.constexpr, PIXELS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """A tile of rows of x for rows of a block."""
    part, tile = tl.program_id(0) % parts, tl.program_id(0) // parts
    block = part // row_tiles
    row = part % row_tiles * ROWS + tl.arange(0, ROWS)
    item = tile * PIXELS + tl.arange(0, PIXELS)
    begin, end = block_entries(starts, block, entries)
    total = zeros(x, PIXELS, ROWS)
    for r in range(begin, end, RUN):
        run = run_of(total, RUN)
        for e in range(r, tl.minimum(r + RUN, end), CHUNK):
            entry = e + tl.arange(0, CHUNK)
            column, inside = positions(columns, entry, end, length)
            w = weights(values, entry[:, None], end, row[None, :], V, INDEX)
            tile_x = gathered_rows(x, item, items, column, inside, length, INDEX)
            run = multiplied(tile_x, w, run, PRECISION)
        total = added(total, run, RUN)
    total = activated(total, bias, block * V + row[None, :], row[None, :] < V, ACTIVATION)
    offset = item[:, None].to(INDEX) * outputs + (block * V + row[None, :])
    store(total, y, residual, offset, (item[:, None] < items) & (row[None, :] < V))


@triton.jit(
    do_not_specialize=[
        "entries", "length", "items", "all_tiles", "parts", "row_tiles", "programs",
        "tiles_per_split",
    ]
)  # fmt: skip
def multiply_values_grad(
    x, grad, columns, starts, partial, entries, length, outputs, items, all_tiles, parts,
    row_tiles, programs, tiles_per_split, PRECISION: tl.constexpr, V: tl.constexpr,
    ROWS: tl.constexpr, CHUNK: tl.constexpr, PIXELS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """The rows of x of one split for some chunks of a block's entries."""
    program, part = tl.program_id(0) % programs, tl.program_id(0) // programs % parts
    split = tl.program_id(0) // programs // parts
    block = part // row_tiles
    row = part % row_tiles * ROWS + tl.arange(0, ROWS)
    first_tile = split * tiles_per_split
    begin, end = block_entries(starts, block, entries)
    for e in range(begin + program * CHUNK, end, programs * CHUNK):
        entry = e + tl.arange(0, CHUNK)
        column, inside = positions(columns, entry, end, length)
        total = zeros(x, CHUNK, ROWS)
        last = tl.minimum(first_tile + tiles_per_split, all_tiles)
        for r in range(first_tile, last, GRAD_RUN // PIXELS):
            run = zeros(x, CHUNK, ROWS)
            for tile in range(r, tl.minimum(r + GRAD_RUN // PIXELS, last)):
                item = tile * PIXELS + tl.arange(0, PIXELS)
                tile_x = gathered_rows(x, item, items, column, inside, length, INDEX)
                offset = item[:, None].to(INDEX) * outputs + (block * V + row[None, :])
                exists = (item[:, None] < items) & (row[None, :] < V)
                g = tl.load(grad + offset, mask=exists, other=0.0)
                run = multiplied(tl.trans(tile_x), g, run, PRECISION)
            total += run
        offset = (split.to(tl.int64) * entries + entry[:, None]) * V + row[None, :]
        exists = (entry[:, None] < end) & (row[None, :] < V)
        tl.store(partial + offset, narrowed(total, partial.dtype.element_ty), mask=exists)


def sparse_matmul(
    x: Tensor,
    values: Tensor,
    columns: Tensor,
    starts: Tensor,
    transposed: Sequence[Tensor],
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str = "none",
    **tile: int,
) -> Tensor:
    """See `sparse_matmul` in the schemas; `tile` overrides the sizes of a program's tile."""
    (entries, v), blocks = values.shape, starts.numel() - 1
    y = x.new_empty((*x.shape[:-1], blocks * v))
    if y.numel() == 0:
        return y
    items = y.numel() // (blocks * v)
    parts = blocks * triton.cdiv(v, min(triton.next_power_of_2(v), 64))
    epilogue = residual is not None or activation == "gelu"
    input_precision = precision(x.dtype)
    sizes = tile_sizes(x.dtype, input_precision, v, 1, items, parts, epilogue) | tile
    row_tiles = triton.cdiv(v, sizes["ROWS"])
    with torch.cuda.device_of(x):
        multiply[(triton.cdiv(items, sizes["PIXELS"]) * blocks * row_tiles,)](
            x, values, columns, starts, bias, residual, y, entries, x.shape[-1], blocks * v, items,
            blocks * row_tiles, row_tiles, ACTIVATION=activation, PRECISION=input_precision, V=v,
            INDEX=index_of(x.numel(), y.numel(), entries * v), **sizes,
        )  # fmt: skip
    return y


def sparse_matmul_values_grad(
    x: Tensor, grad: Tensor, columns: Tensor, starts: Tensor, v: int, **tile: int
) -> Tensor:
    """See `sparse_matmul_values_grad` in the schemas; `tile` overrides sizes of a tile."""
    length, entries, blocks = x.shape[-1], columns.numel(), starts.numel() - 1
    items = grad.numel() // (blocks * v)
    sizes = grad_sizes(x.dtype, v) | tile
    row_tiles, all_tiles = triton.cdiv(v, sizes["ROWS"]), triton.cdiv(items, sizes["PIXELS"])
    programs, splits, tiles_per_split = split_tiles(
        entries, v, blocks * v * length, blocks * row_tiles, all_tiles
    )
    partial = partial_sums(x, splits, entries, v)
    if entries == 0:
        return partial[0]
    with torch.cuda.device_of(x):
        multiply_values_grad[(programs * blocks * row_tiles * splits,)](
            x, grad, columns, starts, partial, entries, length, blocks * v, items, all_tiles,
            blocks * row_tiles, row_tiles, programs, tiles_per_split, PRECISION=precision(x.dtype),
            V=v, INDEX=index_of(x.numel(), grad.numel(), entries * v), **sizes,
        )  # fmt: skip
        return summed(partial, x)
