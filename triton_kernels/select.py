"""Exact selection by radix: the k-th smallest key and the last of its ties that is taken.

One digit is 8 bits: tl.histogram keeps 256 bins in registers (a warp's ballots cost one step per
32 bins) and adds nothing to shared memory but the sum over warps. All counts are integers and all
sums commute, so the result does not depend on the order of the programs.

Two traversals of a tensor:
    search       one program reads its tensor once per digit: for a tensor whose bracket missed.
                 Slow (by estimate 3 ms for 2.4 M weights), but no launch of its own, and rare.
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
    launch,
    left,
    load_tile,
    locate,
    name_of,
    overflowed,
    pointer,
    region,
)

WORK = 256 + 8  # int64 words of a tensor in radix_pass: bins, arrivals, prefix, rank


@triton.jit
def bit_length(x):
    """Bits of a non-negative int32, from a float's exponent; one too many just below a power of 2
    above 2**24, where the conversion rounds up."""
    exponent = x.to(tl.float32).to(tl.int32, bitcast=True) >> 23
    return tl.maximum(exponent - 126, 0)


@triton.jit
def pick(bins, rank):
    """The digit whose bin holds the rank-th element (from 1), its rank in there, the bin's size."""
    upto = tl.cumsum(bins, 0)
    before = upto < rank
    digit = tl.sum(before.to(tl.int32), 0)
    within = rank - tl.sum(tl.where(before, bins, 0), 0)
    size = tl.sum(tl.where(tl.arange(0, 256) == digit, bins, 0), 0)
    return digit, within, size


@triton.jit
def nth_equal(source, n, start, tau, nth, TILE: tl.constexpr):
    """Flat index of the nth element (from 1) at or behind `start` whose key is tau; it exists."""
    local = tl.arange(0, TILE)
    found = n
    while nth > 0:
        equal = (key(load_tile(source + start, local, left(n, start, TILE), TILE)) == tau).to(
            tl.int32
        )
        upto = tl.cumsum(equal, 0)
        here = tl.sum(equal, 0).to(tl.int64)
        if here >= nth:
            found = start + tl.sum((upto < nth).to(tl.int32), 0)
        nth -= here
        start += TILE
    return found


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
            keys = key(load_tile(source + start, local, left(n, start, TILE), TILE))
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
            # .cg: these words were written by other programs; an SM's own L1 may be stale.
            high = tl.load(words + start + local, mask=inside, cache_modifier=".cg") >> shift
            bins += tl.histogram(high & 255, 256, mask=inside & ((high >> 8) == value)).to(tl.int64)
        chosen, nth, equal = pick(bins, nth)
        value = (value << 8) | chosen
        shift -= 8
    return value, nth, equal


@triton.jit
def last_to_arrive(counter, programs):
    """True in the last of `programs` programs that come here, which then sees what all wrote.

    The counter is left at zero, ready for the next call. The barrier orders this program's writes
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
    rows, tiles, k, work, thresholds, flips, scratch, found_inf, shift,
    DTYPE: tl.constexpr, SPAN: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
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
    mine = work + t.to(tl.int64) * 264
    each = mine + tl.arange(0, 256)
    local = tl.arange(0, TILE)
    source = pointer(address, DTYPE, ALIGNED)
    start = index * (SPAN * TILE)
    prefix = tl.load(mine + 257)
    bins = tl.zeros([256], tl.int32)
    for at in range(start, tl.minimum(n, start + SPAN * TILE), TILE):
        high = key(load_tile(source + at, local, left(n, at, TILE), TILE)) >> shift
        bins += tl.histogram((high & 255).to(tl.int32), 256, mask=(high >> 8) == prefix)
    tl.atomic_add(each, bins.to(tl.int64), mask=bins > 0, sem="relaxed")
    if last_to_arrive(mine + 256, programs):
        # The first pass finds 0 and starts from k; later passes go on from the rank in the bin.
        left_over = tl.load(mine + 258)
        rank = tl.where(left_over == 0, count, left_over)
        digit, nth, equal = pick(tl.load(each, cache_modifier=".cg"), rank)
        prefix = (prefix << 8) | digit
        tl.store(each, tl.zeros([256], tl.int64))
        tl.store(mine + 257, prefix)
        tl.store(mine + 258, nth)
        if shift == 0:
            tau = tl.where(count == 0, 0, prefix).to(key(tl.load(source)).dtype)
            tl.store(thresholds + t, tau.to(thresholds.dtype.element_ty))
            if scratch is not None:
                cutoff = n
                if (nth < equal) & (count > 0):
                    cutoff = nth_equal(source, n, tl.cast(0, tl.int64), tau, nth, TILE)
                conclude(rows, t, scratch, flips, tau, cutoff)


@triton.jit
def conclude(rows, t, scratch, flips, tau, cutoff):
    """Leaves the verdict on tensor t where `apply` reads it, and the flips ready to be added."""
    words, _ = region(rows, t, scratch)
    verdict = words.to(tl.pointer_type(tl.int64))
    tl.store(verdict + 3, tau.to(tl.int64))
    tl.store(verdict + 4, cutoff)
    tl.store(flips + t, 0)


def radix_search(
    found: Tables,
    k: Tensor,
    thresholds: Tensor,
    tile: int,
    flips: Tensor | None = None,
    scratch: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """Writes thresholds[t] = |w| of rank k[t] for every tensor, by one launch per digit.

    Args:
        found: the tables of the weights.
        k: [T] int64 on the device.
        thresholds: [T] in the weights' dtype, written.
        tile: elements per tile of the tables.
        flips, scratch, found_inf: as in soft_shrink_, whose `apply` follows; else None.
    """
    work = torch.zeros(k.numel() * WORK, dtype=torch.int64, device=k.device)
    bits = thresholds.view(INTEGER[thresholds.dtype])
    dtype = name_of(thresholds.dtype)
    for shift in range(8 * (thresholds.element_size() - 1), -1, -8):
        radix_pass[found.grid](
            found.rows, found.tiles, k, work, bits, flips, scratch, found_inf, shift,
            DTYPE=dtype, SPAN=found.span, TILE=tile, ALIGNED=found.aligned,
            **launch(dtype, found.aligned),
        )  # fmt: skip
