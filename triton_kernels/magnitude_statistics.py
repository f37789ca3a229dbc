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
from .tables import TILE, launch, left, load_tile, locate, name_of, pointer, tables

CHUNK = 512  # tiles that merge adds at a time
LARGEST = tl.constexpr(1.7976931348623157e308)  # of the finite float64
MERGE_LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def parts(rows, tiles, sums, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    program = tl.program_id(0)
    _, address, n, index, _ = locate(rows, tiles, program)
    local = tl.arange(0, TILE)
    size = left(n, index * TILE, TILE)
    source = pointer(address, DTYPE, ALIGNED) + index * TILE
    bits = load_tile(source, local, size, TILE)
    magnitudes = widen(key(bits).to(bits.dtype), DTYPE).to(tl.float64)
    inside = local < size
    n = size.to(tl.float64)
    guess = tl.sum(tl.where(inside, magnitudes, 0.0), 0) / n
    guess = tl.where(guess <= LARGEST, guess, 0.0)
    apart = tl.where(inside, magnitudes - guess, 0.0)
    rest = tl.sum(apart, 0)
    squares = tl.sum(apart * apart, 0) - rest * rest / n
    record = sums + program.to(tl.int64) * 3
    tl.store(record, guess)
    tl.store(record + 1, rest)
    tl.store(record + 2, tl.where(squares < 0, 0.0, squares))


@triton.jit
def from_pivot(part, inside, size, pivot):
    """Where a tile's mean lies, seen from a pivot that all tiles of a tensor share."""
    guess = tl.load(part, mask=inside, other=0.0)
    return (guess - pivot) + tl.load(part + 1, mask=inside, other=0.0) / size


@triton.jit
def merge(rows, sums, statistics, TILE: tl.constexpr, CHUNK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + t * 8 + 1)
    own = sums + tl.load(rows + t * 8 + 2) * 3
    programs = tl.load(rows + t * 8 + 3)
    lanes = tl.arange(0, CHUNK).to(tl.int64)
    pivot = tl.load(own)
    sums_of_tiles = tl.zeros([CHUNK], tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        place = start + lanes
        size = tl.minimum(tl.maximum(n - place * TILE, 1), TILE).to(tl.float64)
        apart = from_pivot(own + place * 3, place < programs, size, pivot)
        total += tl.where(place < programs, size * apart, 0.0)
        guess = tl.load(own + place * 3, mask=place < programs, other=0.0)
        sums_of_tiles += size * guess + tl.load(own + place * 3 + 1, place < programs, 0.0)
    mean = tl.sum(total, 0) / n.to(tl.float64)
    total = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        place = start + lanes
        size = tl.minimum(tl.maximum(n - place * TILE, 1), TILE).to(tl.float64)
        apart = from_pivot(own + place * 3, place < programs, size, pivot) - mean
        squares = tl.load(own + place * 3 + 2, mask=place < programs, other=0.0)
        total += tl.where(place < programs, squares + size * apart * apart, 0.0)
    squares = tl.sum(total, 0)
    variance = squares / (n - 1).to(tl.float64)
    mean = tl.sum(sums_of_tiles, 0) / n.to(tl.float64)
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
    found = tensors[0].new_empty((len(tensors), 4), dtype=torch.float64)
    with torch.cuda.device_of(found):
        parts[table.grid](
            *(table.rows, table.tiles, sums),
            DTYPE=dtype, ALIGNED=table.aligned, TILE=tile,
            **launch(dtype, table.aligned),
        )  # fmt: skip
        merge[(len(tensors),)](table.rows, sums, found, TILE=tile, CHUNK=CHUNK, **MERGE_LAUNCH)
    return found
