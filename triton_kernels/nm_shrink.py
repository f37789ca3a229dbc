"""N:M tensors of a call in one launch: whole groups per program, selected and shrunk in place.

A program takes GROUPS adjacent groups, in tiles [POSITIONS, GROUPS] of 1024 units: weights, or v
rows x c channels of them. m, v and c are read per tensor, so that one launch serves all patterns of
a model. A group of up to RANKED positions is one tile: every score is compared with every other of
its group. In a larger group a bisection over the range of scores finds the threshold (31 rounds for
float32, 15 for 16-bit weights, 63 for float64); ties are ranked by position.

Traffic per float32 weight: 4 bytes from and 4 to DRAM. A program reads its weights again, from
the L1 or L2 cache: once for the comparisons (or, in every round, the part of a group beyond one
tile), and again to shrink them, since a group of any size would not fit the registers. Every mask
bit that flips is one atomic; in training few bits flip: 1/8 byte of mask is read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .select import last_to_arrive
from .semantics import factor, key, shrunk, widen
from .tables import (
    INTEGER,
    group_tables,
    locate,
    mask_start,
    name_of,
    overflowed,
    pointer,
    region,
    split_f64,
)
from .target import registers

# Small, since score, rank, address and mask bit of every weight are in registers.
TILE = 1024
RANKED: tl.constexpr = tl.constexpr(32)


@triton.jit
def rows_sum(source, offsets, valid, v, columns, DTYPE: tl.constexpr):
    """|w| at `offsets`, summed over v rows in row order."""
    total = tl.abs(widen(tl.load(source + offsets, mask=valid, other=0), DTYPE))
    for row in range(1, v):
        below = tl.load(source + offsets + row * columns, mask=valid, other=0)
        total += tl.abs(widen(below, DTYPE))
    return total


@triton.jit
def score_at(source, offsets, valid, v, columns, c, inner, DTYPE: tl.constexpr):
    """Keys of the units that begin at `offsets`: of the weight, or of the sums of |w| over v rows
    of each channel, added in the order of the c channels."""
    score = key(tl.load(source + offsets, mask=valid, other=0))
    if v * c > 1:
        total = rows_sum(source, offsets, valid, v, columns, DTYPE)
        for channel in range(1, c):
            total += rows_sum(source, offsets + channel * inner, valid, v, columns, DTYPE)
        if DTYPE == "float64":
            score = tl.where(total != total, 0x7FFFFFFFFFFFFFFF, total.to(tl.int64, bitcast=True))
        else:
            score = tl.where(total != total, 0x7FFFFFFF, total.to(tl.int32, bitcast=True))
    return score


@triton.jit
def first_of(group, columns, inner, channels, v):
    """Element of the first row and channel of groups of `channels`, in their order in memory."""
    group_block = group // inner
    blocks_per_row = columns // (channels * inner)
    return (
        group_block // blocks_per_row * v * columns
        + group_block % blocks_per_row * channels * inner
        + group % inner
    )


@triton.jit
def cut_groups(
    source, first, valid, m, v, columns, c, inner, chosen, DTYPE: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """tau and end of every group: selected are scores < tau, and == tau before position end."""
    WIDE: tl.constexpr = DTYPE == "float64"
    SCORE: tl.constexpr = 63 if WIDE else 31
    KEY: tl.constexpr = SCORE if WIDE or DTYPE == "float32" else 15
    bits = tl.where(v * c == 1, KEY, SCORE)
    stride = c * inner
    base = tl.zeros_like(first).to(tl.int64 if WIDE else tl.int32)
    rank = tl.zeros_like(first).to(tl.int32) + chosen
    position = tl.arange(0, POSITIONS)[:, None]
    in_first_tile = valid & (position < m)
    first_scores = score_at(
        source, first + position.to(first.dtype) * stride, in_first_tile, v, columns, c, inner,
        DTYPE,
    )  # fmt: skip
    for round_index in range(bits):
        half = (base * 0 + 1) << (bits - 1 - round_index)
        count = tl.sum(
            (in_first_tile & (first_scores >= base) & (first_scores - base < half)).to(tl.int32), 0
        )[None, :]
        for start in range(POSITIONS, m, POSITIONS):
            in_group = valid & (start + position < m)
            offsets = first + (start + position).to(first.dtype) * stride
            distance = score_at(source, offsets, in_group, v, columns, c, inner, DTYPE) - base
            count += tl.sum((in_group & (distance >= 0) & (distance < half)).to(tl.int32), 0)[
                None, :
            ]
        above = count < rank
        base = tl.where(above, base + half, base)
        rank = tl.where(above, rank - count, rank)
    end = tl.zeros_like(rank)
    for start in range(0, m, POSITIONS):
        in_group = valid & (start + position < m)
        offsets = first + (start + position).to(first.dtype) * stride
        score = score_at(source, offsets, in_group, v, columns, c, inner, DTYPE)
        equal = (in_group & (score == base)).to(tl.int32)
        last = (equal == 1) & (tl.cumsum(equal, 0) == rank)
        end += tl.sum(tl.where(last, start + position + 1, 0), 0)[None, :]
        rank -= tl.sum(equal, 0)[None, :]
    return base, end


@triton.jit
def rank_groups(
    source, first, valid, m, v, columns, c, inner, chosen, DTYPE: tl.constexpr,
    POSITIONS: tl.constexpr,
):  # fmt: skip
    """Which units of a tile of complete groups are selected."""
    position = tl.arange(0, POSITIONS)[:, None]
    in_group = valid & (position < m)
    stride = c * inner
    offsets = first + position.to(first.dtype) * stride
    score = score_at(source, offsets, in_group, v, columns, c, inner, DTYPE)
    smaller = tl.zeros_like(score).to(tl.int32)
    for j in range(m):
        other = score_at(source, first + j * stride, valid, v, columns, c, inner, DTYPE)
        smaller += ((other < score) | ((other == score) & (j < position))).to(tl.int32)
    return in_group & (smaller < chosen)


@triton.jit
def flip_bits(words, offsets, valid, kept):
    """Sets the mask bits at `offsets` to `kept`; returns how many change in each column."""
    bit = (offsets & 31).to(tl.int32)
    old = (tl.load(words + (offsets >> 5), mask=valid, other=0) >> bit) & 1
    changed = valid & ((old == 1) != kept)
    one = tl.zeros_like(bit) + 1
    tl.atomic_xor(words + (offsets >> 5), one << bit, mask=changed, sem="relaxed")
    return tl.sum(changed.to(tl.int32), 0)


@triton.jit
def clear_padding(words, n):
    """Clears the mask bits behind a tensor's last element."""
    word = n // 32 + tl.arange(0, 16)
    rest = tl.maximum(n - word * 32, 0).to(tl.int32)
    owned = word < (n + 511) // 512 * 16
    tl.atomic_and(words + word, (tl.zeros_like(rest) + 1 << rest) - 1, mask=owned, sem="relaxed")


@triton.jit
def finalize_tensor(rows, t, programs, scratch, thresholds, flips, flipped, largest):
    """Adds up flips and threshold in scratch; the tensor's last program writes both results."""
    words, _ = region(rows, t, scratch)
    counters = words.to(tl.pointer_type(tl.int64))  # arrivals, flips, largest key
    tl.atomic_add(counters + 1, flipped.to(tl.int64), sem="relaxed")
    tl.atomic_max(counters + 2, largest.to(tl.int64), sem="relaxed")
    if last_to_arrive(counters, programs):
        total = tl.load(counters + 1, cache_modifier=".cg")
        threshold = tl.load(counters + 2, cache_modifier=".cg")
        tl.debug_barrier()  # every warp has read them before one thread clears them
        tl.store(counters + 1, 0)
        tl.store(counters + 2, 0)
        tl.store(flips + t, total)
        tl.store(thresholds + t, threshold.to(thresholds.dtype.element_ty))


@triton.jit(do_not_specialize=["target_offset", "shrink_high", "shrink_low"])
def shrink_groups(
    rows, tiles, patterns, k, thresholds, masks, flips, scratch, found_inf, target_offset,
    shrink_high, shrink_low, DTYPE: tl.constexpr, POSITIONS: tl.constexpr, GROUPS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """target_offset: bytes from the weights to the result, 0 in place."""
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    pattern = patterns + t.to(tl.int64) * 8
    n = n.to(INDEX)
    columns, inner = tl.load(pattern).to(INDEX), tl.load(pattern + 1).to(INDEX)
    m, v = tl.load(pattern + 2).to(tl.int32), tl.load(pattern + 3).to(tl.int32)
    chosen, c = tl.load(pattern + 4).to(tl.int32), tl.load(pattern + 6).to(tl.int32)
    if k is not None:
        wanted = tl.load(k + t)
        if (wanted != 0) & (wanted != (n // m).to(tl.int64) * chosen):
            return
        chosen = tl.where(wanted == 0, 0, chosen)
    source = pointer(address, DTYPE, False)
    target = pointer(address + target_offset, DTYPE, False)
    words = masks + mask_start(rows, t)
    group = index.to(INDEX) * GROUPS + tl.arange(0, GROUPS)[None, :]
    stride = c * inner
    valid = group < n // (m * c) // v
    first = first_of(group, columns, inner, m * c, v)
    position = tl.arange(0, POSITIONS)[:, None]
    LIMIT: tl.constexpr = POSITIONS if POSITIONS < RANKED else RANKED
    ranked = m <= LIMIT
    tau = tl.zeros([1, GROUPS], tl.int64 if DTYPE == "float64" else tl.int32)
    end = tl.zeros([1, GROUPS], tl.int32)
    pruned_by_rank = tl.zeros([POSITIONS, GROUPS], tl.int1)
    if ranked:
        pruned_by_rank = rank_groups(
            source, first, valid, m, v, columns, c, inner, chosen, DTYPE, POSITIONS
        )
    else:
        tau, end = cut_groups(
            source, first, valid, m, v, columns, c, inner, chosen, DTYPE, POSITIONS
        )
    tl.debug_barrier()  # every warp has read its groups before a weight is written
    shrink = factor(shrink_high, shrink_low, DTYPE)
    flipped = tl.zeros([GROUPS], tl.int32)
    largest = tl.zeros([POSITIONS, GROUPS], tau.dtype)
    for start in range(0, m, POSITIONS):
        in_group = valid & (start + position < m)
        offsets = first + (start + position).to(first.dtype) * stride
        pruned = pruned_by_rank
        if ranked == 0:
            score = score_at(source, offsets, in_group, v, columns, c, inner, DTYPE)
            pruned = in_group & ((score < tau) | ((score == tau) & (start + position < end)))
        for i in range(v * c):
            each = offsets + i // c * columns + i % c * inner
            bits = tl.load(source + each, mask=in_group, other=0)
            tl.store(
                target + each, tl.where(pruned, shrunk(bits, shrink, DTYPE), bits), mask=in_group
            )
            largest = tl.maximum(largest, tl.where(pruned, key(bits), 0).to(largest.dtype))
            flipped += flip_bits(words, each, in_group, pruned == 0)
    if index == 0:
        clear_padding(words, n)
    if flips is not None:
        total = tl.sum(flipped, 0)
        finalize_tensor(
            rows, t, programs, scratch, thresholds, flips, total, tl.max(tl.max(largest, 0), 0)
        )


def options(dtype: str, wide: bool = False) -> dict:
    """Launch options.

    128 registers let four programs share an SM, 96 spill; float64 and indices of 64 bits take 168.
    """
    most = 168 if wide or dtype == "float64" else 128
    return {"num_warps": 4, **registers(most), "enable_fp_fusion": False}


def grouping(weight: Tensor, n: int, m: int, v: int, c: int) -> tuple[int, ...]:
    """Columns of a row, distance of a group's channels, units of a group, rows of one, units
    selected, groups, channels of a unit.

    v == 0 is layout "flat": one row of all elements. m == 0: no pattern.
    """
    if m == 0:
        return (0,) * 8
    columns, inner = rows_of(weight) if v else (weight.numel(), 1)
    groups = weight.numel() // m // max(1, v)
    return columns, inner, m // c, max(1, v), (m - n) // c, groups, c, 0


def rows_of(weight: Tensor) -> tuple[int, int]:
    """Columns of a row of a weight [O, I, ...], and the distance of its channels."""
    columns = weight.numel() // weight.shape[0]
    return columns, columns // weight.shape[1]


def grouped(patterns: Sequence[int], count: int) -> list[int]:
    """Which of the first `count` tensors have an N:M pattern; `patterns` as in the schemas."""
    return [t for t in range(count) if patterns and patterns[4 * t + 1]]


def shrink_all(
    weights: list[Tensor],
    patterns: Sequence[int],
    k: Tensor | None,
    shrink: float,
    thresholds: Tensor | None,
    masks: Tensor,
    flips: Tensor | None,
    scratch: Tensor | None,
    found_inf: Tensor | None = None,
    out: Tensor | None = None,
    tile: int = TILE,
) -> None:
    """One launch over all weights that have a pattern.

    Args:
        weights: those that masks and scratch are laid out over.
        patterns: (n, m, v, c) of each, m == 0 where it has none.
        k, thresholds, flips, scratch: as in soft_shrink_; all None: every group is selected from,
            and only `out` and the masks, zero before, are written.
        out: where the only weight's result goes; None: in place.
        tile: weights of a tile.
    """
    chosen = grouped(patterns, len(weights))
    if not chosen:
        return
    groupings = [grouping(w, *patterns[4 * t : 4 * t + 4]) for t, w in enumerate(weights)]
    positions = min(128, max(4, *(triton.next_power_of_2(groupings[t][2]) for t in chosen)))
    groups = tile // positions
    table, pattern_table = group_tables(weights, groupings, chosen, groups)
    target_offset = 0 if out is None else out.data_ptr() - weights[0].data_ptr()
    dtype = weights[0].dtype
    bits = None if thresholds is None else thresholds.view(INTEGER[dtype])
    name, wide = name_of(dtype), max(w.numel() for w in weights) >= 2**31
    with torch.cuda.device_of(masks):
        shrink_groups[table.grid](
            table.rows, table.tiles, pattern_table, k, bits, masks, flips, scratch, found_inf,
            target_offset, *split_f64(shrink), DTYPE=name, POSITIONS=positions, GROUPS=groups,
            INDEX=tl.int64 if wide else tl.int32, **options(name, wide),
        )  # fmt: skip
