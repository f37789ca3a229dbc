"""magnitude_statistics: norm, variance, mean and deviation of |x| per tensor, in two launches.

1. parts  a program per tile: the tile's sum, then the squared deviations from the tile's own mean,
          both from registers, 16 bytes to memory.
2. merge  a program per tensor: the tensor's mean from the sums, then every tile's deviations and
          its mean's distance from the tensor's: all terms positive, so nothing cancels however
          large the mean is.

Traffic: one read, and 16 bytes per tile of 2048 written and read again. Sums run in float64, in an
order that the compiled kernel fixes: the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .semantics import key, widen
from .tables import TILE, launch, left, load_tile, locate, name_of, pointer, tables

CHUNK = 512  # tiles that merge adds at a time
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
    total = tl.sum(tl.where(local < size, magnitudes, 0.0), 0)
    apart = magnitudes - total / size.to(tl.float64)
    squares = tl.sum(tl.where(local < size, apart * apart, 0.0), 0)
    record = sums + program.to(tl.int64) * 2
    tl.store(record, total)
    tl.store(record + 1, squares)


@triton.jit
def merge(rows, sums, statistics, TILE: tl.constexpr, CHUNK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + t * 8 + 1)
    own = sums + tl.load(rows + t * 8 + 2) * 2
    programs = tl.load(rows + t * 8 + 3)
    lanes = tl.arange(0, CHUNK)
    totals = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        place = start + lanes
        totals += tl.load(own + place * 2, mask=place < programs, other=0.0)
    total = tl.sum(totals, 0)
    mean = total / n.to(tl.float64)
    squares = tl.zeros([CHUNK], tl.float64)
    for start in range(0, programs, CHUNK):
        place = start + lanes
        inside = place < programs
        size = tl.where(inside, tl.minimum(n - place.to(tl.int64) * TILE, TILE), 1).to(tl.float64)
        apart = tl.load(own + place * 2, mask=inside, other=0.0) / size - mean
        own_squares = tl.load(own + place * 2 + 1, mask=inside, other=0.0)
        squares += tl.where(inside, own_squares + size * apart * apart, 0.0)
    deviations = tl.sum(squares, 0)
    variance = deviations / (n - 1).to(tl.float64)
    # an infinite element makes the deviations NaN, but the norm is infinite
    infinite = total > 1.7976931348623157e308
    norm = tl.where(infinite, total, tl.sqrt(deviations + mean * total))
    tl.store(statistics + t * 4, norm)
    tl.store(statistics + t * 4 + 1, variance)
    tl.store(statistics + t * 4 + 2, mean)
    tl.store(statistics + t * 4 + 3, tl.sqrt(variance))


def magnitude_statistics(tensors: list[Tensor], *, tile: int = TILE) -> Tensor:
    """See `magnitude_statistics` in the schemas."""
    table = tables(tensors, tile, 1)
    dtype = name_of(tensors[0].dtype)
    sums = tensors[0].new_empty((table.grid[0], 2), dtype=torch.float64)
    found = tensors[0].new_empty((len(tensors), 4), dtype=torch.float64)
    with torch.cuda.device_of(found):
        parts[table.grid](
            *(table.rows, table.tiles, sums),
            DTYPE=dtype, ALIGNED=table.aligned, TILE=tile,
            **launch(dtype, table.aligned),
        )  # fmt: skip
        merge[(len(tensors),)](table.rows, sums, found, TILE=tile, CHUNK=CHUNK, **MERGE_LAUNCH)
    return found
