"""nm_prune: keeps the n largest of every m, returns the pruned copy and the packed mask.

One launch (v = 1): a program takes 1024 elements in memory order, so that its mask words are whole,
and ranks every element against the m of its group; those loads hit L1 or L2, DRAM sees one read and
one write of the weights and one write of the mask. With v > 1 a launch before it sums |w| over the
v rows of a pattern into a buffer of one score per column, which the ranking then reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .semantics import factor, key, shrunk, widen
from .tables import INTEGER, halves, load_tile, mask_words, name_of, store_tile

# Small, since every element holds its own rank, group and position in registers.
TILE = 1024
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def sum_rows(weight, scores, columns, v, total, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """scores[o, c] = key of the sum of |w[o v + r, c]| over r in row order; NaN ranks largest."""
    index = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    valid = index < total
    source = weight + index // columns * v * columns + index % columns
    value = tl.abs(widen(tl.load(source, mask=valid, other=0), DTYPE))
    for row in range(1, v):
        next_row = tl.load(source + row * columns.to(tl.int64), mask=valid, other=0)
        value += tl.abs(widen(next_row, DTYPE))
    if DTYPE == "float64":
        bits = tl.where(value != value, 0x7FFFFFFFFFFFFFFF, value.to(tl.int64, bitcast=True))
    else:
        bits = tl.where(value != value, 0x7FFFFFFF, value.to(tl.int32, bitcast=True))
    tl.store(scores + index, bits, mask=valid)


@triton.jit(do_not_specialize=["shrink_high", "shrink_low"])
def rank_groups(
    weight, scores, out, masks, numel, columns, inner, n, m, v, shrink_high, shrink_low,
    DTYPE: tl.constexpr, INDEX: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """weight [O, columns]; a group is m elements of a row, `inner` apart; v rows share scores."""
    word = tl.arange(0, TILE // 32)
    bit = tl.arange(0, 32)[None, :]
    local = word[:, None] * 32 + bit
    start = tl.program_id(0).to(tl.int64) * TILE
    size = tl.minimum(numel - start, TILE).to(tl.int32)
    valid = local < size
    bits = load_tile(weight + start, local, size, TILE)
    index = (start + local).to(INDEX)
    column = index % columns
    position = column // inner % m
    own = (index // columns // v) * columns + column
    group = scores + own - position * inner
    score = key(tl.load(scores + own, mask=valid, other=0))
    smaller = tl.zeros([TILE // 32, 32], tl.int32)
    for j in range(m):
        other = key(tl.load(group + j * inner, mask=valid, other=0))
        smaller += ((other < score) | ((other == score) & (j < position))).to(tl.int32)
    chosen = smaller < m - n
    new = shrunk(bits, factor(shrink_high, shrink_low, DTYPE), DTYPE)
    store_tile(out + start, local, size, tl.where(chosen, new, bits), TILE)
    packed = tl.sum(tl.where(valid & (chosen == 0), 1 << bit, 0), 1)
    first = start // 32
    tl.store(masks + first + word, packed, mask=word < ((numel + 511) // 512) * 16 - first)


def nm_prune(
    weight: Tensor,
    n: int,
    m: int,
    v: int,
    layout: str,
    shrink: float = 0.0,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """See `nm_prune` in the schemas."""
    numel = weight.numel()
    columns, inner = numel, 1
    if layout == "channels":
        columns, inner = numel // weight.shape[0], numel // (weight.shape[0] * weight.shape[1])
    out = torch.empty_like(weight)
    masks = torch.empty(mask_words(numel), dtype=torch.int32, device=weight.device)
    bits = weight.view(INTEGER[weight.dtype])
    dtype = name_of(weight.dtype)
    with torch.cuda.device_of(weight):
        scores = bits
        if v > 1:
            total = numel // v
            wide = torch.int64 if weight.dtype == torch.float64 else torch.int32
            scores = torch.empty(total, dtype=wide, device=weight.device)
            sum_rows[(-(-total // tile),)](
                bits, scores, columns, v, total, DTYPE=dtype, TILE=tile, **LAUNCH
            )
        rank_groups[(-(-numel // tile),)](
            bits, scores, out.view(bits.dtype), masks, numel, columns, inner, n, m, v,
            *halves(shrink), DTYPE=dtype, INDEX=tl.int64 if numel >= 2**31 else tl.int32,
            TILE=tile, **LAUNCH,
        )  # fmt: skip
    return out, masks
