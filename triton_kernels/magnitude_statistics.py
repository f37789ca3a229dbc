"""magnitude_statistics: norm, variance, mean and deviation of |x| per tensor, in two launches.

1. parts  a program per tile: the tile's mean, then the deviations from it, all from registers; 32
          bytes to memory.
2. merge  a program per tensor: the tensor's mean, then every tile's deviations and its mean's
          distance from the tensor's: all terms positive, so nothing cancels however large the mean.

Traffic: one read, and 32 bytes per tile of 2048 written and read again. Sums run in float64, in an
order that the compiled kernel fixes: the same bits in every run. A tile's mean is kept as a guess
and a rest, as in csrc/statistics.h: one float64 is too coarse where the deviations are a millionth.
Its scale keeps the squares of float64 in range; the merged tensor has the smallest of its tiles.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .semantics import key, widen
from .tables import TILE, elements_in_tile, launch, load_tile, locate, name_of, pointer, tables

CHUNK = 512  # tiles that merge adds at a time
LARGEST = tl.constexpr(1.7976931348623157e308)  # of the finite float64
# Magnitudes of float64 beyond LARGE or below SMALL have squares outside its range.
LARGE, SHRINKING = tl.constexpr(2.0**400), tl.constexpr(2.0**-700)
SMALL, GROWING = tl.constexpr(2.0**-400), tl.constexpr(2.0**700)
MERGE_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def parts(rows, tiles, sums, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    _, address, n, index, _ = locate(rows, tiles, program)
    local = tl.arange(0, TILE)
    size = elements_in_tile(n, index * TILE, TILE)
    source = pointer(address, DTYPE, ALIGNED) + index * TILE
    bits = load_tile(source, local, size, TILE)
    inside = local < size
    magnitudes = widen(key(bits).to(bits.dtype), DTYPE).to(tl.float64)
    scale = tl.sum(tl.where(local == 0, 1.0, 0.0), 0).to(tl.float64)
    if DTYPE == "float64":
        largest = tl.max(tl.where(inside, key(bits), 0), 0).to(tl.float64, bitcast=True)
        scale = tl.where(largest > LARGE, SHRINKING, tl.where(largest < SMALL, GROWING, scale))
        magnitudes *= scale
    n = size.to(tl.float64)
    first = tl.sum(tl.where(local == 0, magnitudes, 0.0), 0)
    guess = first + tl.sum(tl.where(inside, magnitudes - first, 0.0), 0) / n
    guess = tl.where(guess <= LARGEST, guess, 0.0)
    deviations = tl.where(inside, magnitudes - guess, 0.0)
    rest = tl.sum(deviations, 0)
    squares = tl.sum(deviations * deviations, 0) - rest * rest / n
    tile_sums = sums + program.to(tl.int64) * 4
    tl.store(tile_sums, guess)
    tl.store(tile_sums + 1, rest)
    tl.store(tile_sums + 2, tl.where(squares < 0, 0.0, squares))
    tl.store(tile_sums + 3, scale)


@triton.jit
def load_part(tile_sums, tile, programs, scale):
    """Guess, rest and squares of tiles, at the tensor's scale."""
    inside = tile < programs
    part = tile_sums + tile * 4
    by = scale / tl.load(part + 3, mask=inside, other=1.0)
    guess = tl.load(part, mask=inside, other=0.0) * by
    rest = tl.load(part + 1, mask=inside, other=0.0) * by
    squares = tl.load(part + 2, mask=inside, other=0.0) * by * by
    return guess, rest, squares


@triton.jit
def merge(rows, sums, statistics, TILE: tl.constexpr, CHUNK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + t * 8 + 1)
    tile_sums = sums + tl.load(rows + t * 8 + 2) * 4
    programs = tl.load(rows + t * 8 + 3)
    lane = tl.arange(0, CHUNK).to(tl.int64)
    scales = tl.load(tile_sums + 3) + tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        own = tl.load(tile_sums + (start + lane) * 4 + 3, start + lane < programs, GROWING)
        scales = tl.minimum(scales, own)
    scale = tl.min(scales, 0)
    # The means of tiles are taken relative to the pivot, which is near all of them.
    pivot, _rest, _count = load_part(tile_sums, tl.cast(0, tl.int64), programs, scale)
    lane_sums = tl.zeros([CHUNK], tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        tile = start + lane
        size = tl.minimum(tl.maximum(n - tile * TILE, 1), TILE).to(tl.float64)
        guess, rest, _ = load_part(tile_sums, tile, programs, scale)
        total += tl.where(tile < programs, size * ((guess - pivot) + rest / size), 0.0)
        lane_sums += size * guess + rest
    mean = tl.sum(total, 0) / n.to(tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        tile = start + lane
        size = tl.minimum(tl.maximum(n - tile * TILE, 1), TILE).to(tl.float64)
        guess, rest, squares = load_part(tile_sums, tile, programs, scale)
        apart = (guess - pivot) + rest / size - mean
        total += tl.where(tile < programs, squares + size * apart * apart, 0.0)
    squares = tl.sum(total, 0)
    variance = squares / (n - 1).to(tl.float64)
    mean = tl.sum(lane_sums, 0) / n.to(tl.float64)
    unit = 1.0 / scale
    # an infinite element makes the deviations NaN, but the norm is infinite
    norm = tl.where(mean > LARGEST, mean, tl.sqrt(squares + n.to(tl.float64) * mean * mean))
    tl.store(statistics + t * 4, norm * unit)
    tl.store(statistics + t * 4 + 1, variance * unit * unit)
    tl.store(statistics + t * 4 + 2, mean * unit)
    tl.store(statistics + t * 4 + 3, tl.sqrt(variance) * unit)


def magnitude_statistics(tensors: list[Tensor], *, tile: int = TILE) -> Tensor:
    """See `magnitude_statistics` in the schemas."""
    table = tables(tensors, tile, 1)
    dtype = name_of(tensors[0].dtype)
    sums = tensors[0].new_empty((table.grid[0], 4), dtype=torch.float64)
    statistics = tensors[0].new_empty((len(tensors), 4), dtype=torch.float64)
    with torch.cuda.device_of(statistics):
        parts[table.grid](
            *(table.rows, table.tiles, sums),
            DTYPE=dtype, ALIGNED=table.aligned, TILE=tile,
            **launch(dtype, table.aligned),
        )  # fmt: skip
        merge[(len(tensors),)](table.rows, sums, statistics, TILE=tile, CHUNK=CHUNK, **MERGE_LAUNCH)
    return statistics
