"""Exact selection by radix: the k-th smallest key and the last of its ties that is taken.

One digit is 8 bits: tl.histogram keeps 256 bins in registers (a warp's ballots cost one step per
32 bins) and adds nothing to shared memory but the sum over warps. All counts are integers and all
sums commute, so the result does not depend on the order of the programs.

Two traversals of a tensor:
    search       one program reads its tensor once per digit: for a tensor whose bracket missed.
                 Slow (by estimate 3 ms for 2.4 M weights), but no additional launch, and rare.
    radix_pass   one launch per digit over all tiles of all tensors: 2 launches for 16-bit weights,
                 4 for float32, 8 for float64, each reading the weights once. For the calls that
                 are known to need it: bracket=False and magnitude_threshold.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .semantics import key
from .tables import (
    INTEGER,
    Tables,
    elements_in_tile,
    launch,
    load_tile,
    locate,
    name_of,
    overflowed,
    pointer,
    region,
)

RADIX_STATE_WORDS = 256 + 8  # int64 words of a tensor in radix_pass: bins, arrivals, prefix, rank


@triton.jit
def bit_length(x):
    """Bits of a non-negative int32, from a float's exponent; one too many just below a power of 2
    above 2**24, where the conversion rounds up."""
    exponent = x.to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return tl.maximum(exponent - 126, 0)


@triton.jit
def pick(bins, rank):
    """The digit whose bin holds the rank-th element (from 1), its rank in it, the bin's size."""
    upto = tl.cumsum(bins, 0)
    before = upto < rank
    digit = tl.sum(before.to(tl.int32), 0)
    rank_in_bin = rank - tl.sum(tl.where(before, bins, 0), 0)
    size = tl.sum(tl.where(tl.arange(0, 256) == digit, bins, 0), 0)
    return digit, rank_in_bin, size


@triton.jit
def nth_equal(source, n, start, tau, nth, TILE: tl.constexpr):
    """Flat index of the nth element (from 1) at or behind `start` whose key is tau; it exists."""
    local = tl.arange(0, TILE)
    position = n
    while nth > 0:
        equal = (
            key(load_tile(source + start, local, elements_in_tile(n, start, TILE), TILE)) == tau
        ).to(tl.int32)
        upto = tl.cumsum(equal, 0)
        num_equal = tl.sum(equal, 0).to(tl.int64)
        if num_equal >= nth:
            position = start + tl.sum((upto < nth).to(tl.int32), 0)
        nth -= num_equal
        start += TILE
    return position


@triton.jit
def search(source, n, rank, DTYPE: tl.constexpr, TILE: tl.constexpr):
    """tau and cutoff of the `rank` smallest keys of a whole tensor, by one program."""
    local = tl.arange(0, TILE)
    DIGITS: tl.constexpr = 8 if DTYPE == "float64" else (4 if DTYPE == "float32" else 2)
    tau = key(tl.load(source)) * 0
    nth = rank
    equal = rank
    for digit in range(DIGITS):
        shift = (DIGITS - 1 - digit) * 8
        bins = tl.zeros([256], tl.int64)
        for start in range(tl.cast(0, tl.int64), n, TILE):
            keys = key(load_tile(source + start, local, elements_in_tile(n, start, TILE), TILE))
            high = keys >> shift
            bins += tl.histogram((high & 255).to(tl.int32), 256, mask=(high >> 8) == tau).to(
                tl.int64
            )
        chosen, nth, equal = pick(bins, nth)
        tau = (tau << 8) | chosen.to(tau.dtype)
    cutoff = n
    if nth < equal:
        cutoff = nth_equal(source, n, tl.cast(0, tl.int64), tau, nth, TILE)
    return tau, cutoff


@triton.jit
def select_words(words, count, rank, width, CHUNK: tl.constexpr):
    """The rank-th smallest of `count` words of `width` bits (at most 31), its rank among its
    equals (from 1) and their number."""
    local = tl.arange(0, CHUNK)
    value = tl.cast(0, tl.int32)
    nth = rank
    equal = rank
    shift = tl.maximum((width - 1) // 8, 0) * 8
    while shift >= 0:
        bins = tl.zeros([256], tl.int64)
        for start in range(tl.cast(0, tl.int64), count, CHUNK):
            inside = local < count - start
            # .cg: these words were written by other programs; the L1 of this SM may be stale.
            high = tl.load(words + start + local, mask=inside, cache_modifier=".cg") >> shift
            bins += tl.histogram(high & 255, 256, mask=inside & ((high >> 8) == value)).to(tl.int64)
        chosen, nth, equal = pick(bins, nth)
        value = (value << 8) | chosen
        shift -= 8
    return value, nth, equal


@triton.jit
def last_to_arrive(counter, programs):
    """True in the last of `programs` programs to call this, which then sees the writes of all.

    The counter is reset to zero for the next call. The barrier orders this program's writes
    before the release of its arrival.
    """
    tl.debug_barrier()
    arrived = tl.atomic_add(counter, 1, sem="acq_rel")
    last = arrived == programs - 1
    if last:
        tl.store(counter, 0)
    return last


@triton.jit(do_not_specialize=["shift"])
def radix_pass(
    rows, tiles, k, radix_state, thresholds, flips, scratch, found_inf, shift,
    DTYPE: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One digit of the search, a program per tile; the last program of a tensor picks the digit.

    Behind the last digit (shift 0) it writes the threshold and, if scratch is given, what
    soft_shrink's `apply` needs. Traffic: one read of the weights, 256 atomics at most per tile.
    """
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    count = tl.load(k + t)
    if (count < 0) | (count > n):
        return
    state = radix_state + t.to(tl.int64) * 264
    bin_ptrs = state + tl.arange(0, 256)
    local = tl.arange(0, TILE)
    source = pointer(address, DTYPE, ALIGNED)
    start = index * (NUM_TILES * TILE)
    prefix = tl.load(state + 257)
    bins = tl.zeros([256], tl.int32)
    for at in range(start, tl.minimum(n, start + NUM_TILES * TILE), TILE):
        high = key(load_tile(source + at, local, elements_in_tile(n, at, TILE), TILE)) >> shift
        bins += tl.histogram((high & 255).to(tl.int32), 256, mask=(high >> 8) == prefix)
    tl.atomic_add(bin_ptrs, bins.to(tl.int64), mask=bins > 0, sem="relaxed")
    if last_to_arrive(state + 256, programs):
        # The first pass finds 0 and starts from k; later passes go on from the rank in the bin.
        previous_rank = tl.load(state + 258)
        rank = tl.where(previous_rank == 0, count, previous_rank)
        digit, nth, equal = pick(tl.load(bin_ptrs, cache_modifier=".cg"), rank)
        prefix = (prefix << 8) | digit
        tl.store(bin_ptrs, tl.zeros([256], tl.int64))
        tl.store(state + 257, prefix)
        tl.store(state + 258, nth)
        if shift == 0:
            tau = tl.where(count == 0, 0, prefix).to(key(tl.load(source)).dtype)
            tl.store(thresholds + t, tau.to(thresholds.dtype.element_ty))
            if scratch is not None:
                cutoff = n
                if (nth < equal) & (count > 0):
                    cutoff = nth_equal(source, n, tl.cast(0, tl.int64), tau, nth, TILE)
                store_threshold(rows, t, scratch, flips, tau, cutoff)


@triton.jit
def store_threshold(rows, t, scratch, flips, tau, cutoff):
    """Stores tau and cutoff of tensor t for `apply`, and clears its flips."""
    words, _ = region(rows, t, scratch)
    header = words.to(tl.pointer_type(tl.int64))
    tl.store(header + 3, tau.to(tl.int64))
    tl.store(header + 4, cutoff)
    tl.store(flips + t, 0)


def radix_search(
    table: Tables,
    k: Tensor,
    thresholds: Tensor,
    tile: int,
    flips: Tensor | None = None,
    scratch: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Writes thresholds[t] = |w| of rank k[t] for every tensor, by one launch per digit.

    Args:
        table: the tables of the weights.
        k: [T] int64 on the device.
        thresholds: [T] in the weights' dtype, written.
        tile: elements per tile of the tables.
        flips, scratch, found_inf: as in soft_shrink_, whose `apply` follows; else None.
    """
    radix_state = torch.zeros(k.numel() * RADIX_STATE_WORDS, dtype=torch.int64, device=k.device)
    bits = thresholds.view(INTEGER[thresholds.dtype])
    dtype = name_of(thresholds.dtype)
    for shift in range(8 * (thresholds.element_size() - 1), -1, -8):
        radix_pass[table.grid](
            table.rows, table.tiles, k, radix_state, bits, flips, scratch, found_inf, shift,
            DTYPE=dtype, NUM_TILES=table.tiles_per_program, TILE=tile, ALIGNED=table.aligned,
            **launch(dtype, table.aligned),
        )  # fmt: skip
