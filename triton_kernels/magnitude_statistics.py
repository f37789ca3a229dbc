"""magnitude_statistics: norm, variance, mean and deviation of |x| per tensor, in two launches.

1. parts  a program per tile: the tile's mean, then the deviations from it, all from registers; 24
          bytes to memory.
2. merge  a program per tensor: the tensor's mean, then every tile's deviations and its mean's
          distance from the tensor's: all terms positive, so nothing cancels however large the mean.

Traffic: one read, and 24 bytes per tile of 2048 written and read again. Sums run in float64, in an
order that the compiled kernel fixes: the same bits in every run. A tile's mean is kept as a guess
and a rest, as in csrc/statistics.h: one float64 is too coarse where the deviations are a millionth.
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
MERGE_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def parts(rows, tiles, sums, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    _, address, n, index, _ = locate(rows, tiles, program)
    local = tl.arange(0, TILE)
    size = elements_in_tile(n, index * TILE, TILE)
    source = pointer(address, DTYPE, ALIGNED) + index * TILE
    bits = load_tile(source, local, size, TILE)
    magnitudes = widen(key(bits).to(bits.dtype), DTYPE).to(tl.float64)
    inside = local < size
    n = size.to(tl.float64)
    guess = tl.sum(tl.where(inside, magnitudes, 0.0), 0) / n
    guess = tl.where(guess <= LARGEST, guess, 0.0)
    deviations = tl.where(inside, magnitudes - guess, 0.0)
    rest = tl.sum(deviations, 0)
    squares = tl.sum(deviations * deviations, 0) - rest * rest / n
    tile_sums = sums + program.to(tl.int64) * 3
    tl.store(tile_sums, guess)
    tl.store(tile_sums + 1, rest)
    tl.store(tile_sums + 2, tl.where(squares < 0, 0.0, squares))


@triton.jit
def from_pivot(part, inside, size, pivot):
    """A tile's mean minus the pivot, which is the same for all tiles of a tensor."""
    guess = tl.load(part, mask=inside, other=0.0)
    return (guess - pivot) + tl.load(part + 1, mask=inside, other=0.0) / size


@triton.jit
def merge(rows, sums, statistics, TILE: tl.constexpr, CHUNK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + t * 8 + 1)
    tile_sums = sums + tl.load(rows + t * 8 + 2) * 3
    programs = tl.load(rows + t * 8 + 3)
    lane = tl.arange(0, CHUNK).to(tl.int64)
    pivot = tl.load(tile_sums)
    lane_sums = tl.zeros([CHUNK], tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        tile = start + lane
        size = tl.minimum(tl.maximum(n - tile * TILE, 1), TILE).to(tl.float64)
        deviations = from_pivot(tile_sums + tile * 3, tile < programs, size, pivot)
        total += tl.where(tile < programs, size * deviations, 0.0)
        guess = tl.load(tile_sums + tile * 3, mask=tile < programs, other=0.0)
        lane_sums += size * guess + tl.load(tile_sums + tile * 3 + 1, tile < programs, 0.0)
    mean = tl.sum(total, 0) / n.to(tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        tile = start + lane
        size = tl.minimum(tl.maximum(n - tile * TILE, 1), TILE).to(tl.float64)
        deviations = from_pivot(tile_sums + tile * 3, tile < programs, size, pivot) - mean
        squares = tl.load(tile_sums + tile * 3 + 2, mask=tile < programs, other=0.0)
        total += tl.where(tile < programs, squares + size * deviations * deviations, 0.0)
    squares = tl.sum(total, 0)
    variance = squares / (n - 1).to(tl.float64)
    mean = tl.sum(lane_sums, 0) / n.to(tl.float64)
    # an infinite element makes the deviations NaN, but the norm is infinite
    norm = tl.where(mean > LARGEST, mean, tl.sqrt(squares + n.to(tl.float64) * mean * mean))
    tl.store(statistics + t * 4, norm)
    tl.store(statistics + t * 4 + 1, variance)
    tl.store(statistics + t * 4 + 2, mean)
    tl.store(statistics + t * 4 + 3, tl.sqrt(variance))


def magnitude_statistics(tensors: list[Tensor], *, tile: int = TILE) -> Tensor:
    """See `magnitude_statistics` in the schemas."""
    table = tables(tensors, tile, 1)
    dtype = name_of(tensors[0].dtype)
    sums = tensors[0].new_empty((table.grid[0], 3), dtype=torch.float64)
    statistics = tensors[0].new_empty((len(tensors), 4), dtype=torch.float64)
    with torch.cuda.device_of(statistics):
        parts[table.grid](
            *(table.rows, table.tiles, sums),
            DTYPE=dtype, ALIGNED=table.aligned, TILE=tile,
            **launch(dtype, table.aligned),
        )  # fmt: skip
        merge[(len(tensors),)](table.rows, sums, statistics, TILE=tile, CHUNK=CHUNK, **MERGE_LAUNCH)
    return statistics
