"""soft_shrink_: select the k smallest |w| of every tensor, shrink them, refresh masks and flips.

Two launches for the whole model, steady state or not (kernels.md A4, design 4):

1. count   one program per tile. The previous threshold tau brackets the next one: right after a
           shrink the k-th magnitude is exactly fl(alpha tau), and one optimizer step moves it
           little. The program counts what lies below the bracket and appends what lies inside to
           the tensor's region of scratch; the last program of a tensor selects among these
           candidates (usually 1 to 5 % of n). If the bracket missed (no previous threshold, a jump
           of k, too many candidates for the region) it searches the whole tensor instead: slower,
           never different. scratch[0] counts that.
2. apply   one program per tile, in reverse order, since the tiles read last are still in the L2.

Traffic per float32 weight: count reads 4 bytes, apply reads 4 (out of L2 where it fits) and writes
4, the mask is 1/8 byte read and, where it changed, written. bracket=False replaces `count` by the
2 (16-bit), 4 (float32) or 8 (float64) launches of select.radix_pass; float64 always goes that way.

A candidate is one word: its key's distance from the bracket's lower end, and behind it the number
of its tile (or of a group of tiles, where the 31 bits do not suffice). The rank-th smallest *word*
then gives tau and the tile in which the last tie lies, so ties by lowest index cost no launch:
the last program scans that one tile. Candidates rather than fine histogram bins inside the bracket,
since bins would need another pass over the data to tell apart the keys (and the ties) of one bin.
Their order in scratch depends on the order of the programs; their set and the result do not.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .select import (
    bit_length,
    conclude,
    last_to_arrive,
    nth_equal,
    radix_search,
    search,
    select_words,
)
from .semantics import factor, infinity, key, narrow, selected, shrunk, widen
from .tables import (
    INTEGER,
    LAUNCH,
    TILE,
    halves,
    left,
    load_tile,
    locate,
    mask_start,
    name_of,
    overflowed,
    pointer,
    region,
    store_tile,
    tables,
)

# Three programs of `count` and four of `apply` share an SM, 48 and 64 KB of loads in flight; left
# alone, the compiler takes 92 and 82 registers, most of them for what is rare, and two fit.
COUNT_REGISTERS = 80
APPLY_REGISTERS = 64


@triton.jit
def bracket(previous, shrink, DTYPE: tl.constexpr):
    """Keys between which the new threshold is expected; low > high: no idea.

    3 % on either side of [alpha tau, tau]. With hard thresholding (alpha near 0) alpha tau says
    nothing: the pruned weights come back as large as a step of the optimizer, much like last time.
    """
    tau = widen(previous, DTYPE)
    gentle = shrink >= 0.5
    low = key(narrow(tau * tl.where(gentle, 0.97 * shrink, 0.5), DTYPE))
    high = key(narrow(tau * tl.where(gentle, 1.03, 2.0), DTYPE))
    known = key(previous) <= infinity(DTYPE)
    return tl.where(known, low, 1), tl.where(known, high, 0)


@triton.jit
def packing(low, high, tiles):
    """Of a candidate's word: bits behind the key's distance, and which bits of the tile they hold.

    As many bits of the tile's number as fit in 31 beside the distance; else its upper ones.
    """
    distance_bits = bit_length(high - low)
    tile_bits = bit_length((tiles - 1).to(tl.int32))
    room = tl.minimum(tl.maximum(31 - distance_bits, 0), tile_bits)
    return room, tile_bits - room, tl.minimum(distance_bits + room, 31)


@triton.jit
def among_candidates(source, n, words, inside, rank, low, high, tiles, TILE: tl.constexpr):
    """tau and cutoff of the rank-th smallest of the `inside` candidates."""
    room, drop, width = packing(low, high, tiles)
    # Keys that all equal `low` need not be stored: their number alone is what a word would tell.
    value = tl.cast(0, tl.int32)
    nth = rank
    equal = inside
    if low < high:
        value, nth, equal = select_words(words, inside, rank, width, TILE)
    tau = low + (value >> room)
    group = (value & ((1 << room) - 1)).to(tl.int64)
    if low == high:
        start = tl.cast(0, tl.int64)
        end = n
    else:
        start = (group << drop) * TILE
        end = ((group + 1) << drop) * TILE
    cutoff = end - 1
    if nth < equal:
        cutoff = nth_equal(source, n, start, tau, nth, TILE)
    return tau, cutoff


@triton.jit(do_not_specialize=["shrink_high", "shrink_low"])
def count(
    rows, tiles, k, thresholds, flips, scratch, found_inf, shrink_high, shrink_low,
    DTYPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Launch 1: counts, candidates, and in the last program of a tensor its threshold."""
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    wanted = tl.load(k + t)
    if (wanted < 0) | (wanted > n):
        return
    words, capacity = region(rows, t, scratch)
    counters = words.to(tl.pointer_type(tl.int64))  # arrivals, below, inside, tau, cutoff
    words += 16
    source = pointer(address, DTYPE, False)
    low, high = bracket(tl.load(thresholds + t), factor(shrink_high, shrink_low, DTYPE), DTYPE)
    if (low <= high) & (wanted > 0):
        # [TILE / 256, 256]: a thread owns a column, so that its counts run down its own registers
        # and only the 256 totals are scanned across threads. Four-byte loads (no alignment told)
        # keep the layout that the scattered stores need; 16-byte loads would cost three
        # conversions through shared memory, six times the tile itself.
        lane = tl.arange(0, 256)
        local = tl.arange(0, TILE // 256)[:, None] * 256 + lane[None, :]
        start = index * TILE
        keys = key(load_tile(source + start, local, left(n, start, TILE), TILE))
        inside = (keys >= low) & (keys <= high)
        below = tl.sum(tl.sum((keys < low).to(tl.int32), 0), 0)
        tl.atomic_add(counters + 1, below.to(tl.int64), sem="relaxed")
        upto = tl.cumsum(inside.to(tl.int32), 0)
        mine = tl.sum(inside.to(tl.int32), 0)
        first = tl.atomic_add(counters + 2, tl.sum(mine, 0).to(tl.int64), sem="relaxed")
        slot = upto + (tl.cumsum(mine, 0) - mine - 1)[None, :]
        space = tl.where(low < high, capacity, 0) - first
        space = tl.maximum(tl.minimum(space, TILE), 0).to(tl.int32)
        room, drop, _ = packing(low, high, programs)
        word = ((keys - low) << room) | (index >> drop).to(tl.int32)
        tl.store(words + first + slot, word, mask=inside & (slot < space))
    if last_to_arrive(counters, programs):
        below = tl.load(counters + 1, cache_modifier=".cg")
        inside = tl.load(counters + 2, cache_modifier=".cg")
        tl.debug_barrier()  # every warp has read them before one thread clears them
        tl.store(counters + 1, 0)
        tl.store(counters + 2, 0)
        rank = wanted - below
        fits = (inside <= capacity) | (low == high)
        tau = low * 0
        cutoff = n
        if (rank > 0) & (rank <= inside) & fits:
            tau, cutoff = among_candidates(
                source, n, words, inside, rank, low, high, programs, TILE
            )
        elif wanted > 0:
            tl.atomic_add(scratch, 1, sem="relaxed")
            tau, cutoff = search(source, n, wanted, DTYPE, TILE)
        tl.store(thresholds + t, tau.to(thresholds.dtype.element_ty))
        conclude(rows, t, scratch, flips, tau, cutoff)


@triton.jit(do_not_specialize=["shrink_high", "shrink_low"])
def apply(
    rows, tiles, k, masks, flips, scratch, found_inf, shrink_high, shrink_low,
    DTYPE: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Launch 2: shrinks what is selected, writes the mask words that change, counts the flips.

    The tile is [TILE / 32, 32]: a row is a mask word, its sum of bits stays within a few lanes.
    """
    if overflowed(found_inf):
        return
    t, address, n, index, _ = locate(rows, tiles, tl.num_programs(0) - 1 - tl.program_id(0))
    wanted = tl.load(k + t)
    if (wanted < 0) | (wanted > n):
        return
    words, _ = region(rows, t, scratch)
    verdict = words.to(tl.pointer_type(tl.int64))
    word = tl.arange(0, TILE // 32)
    bit = tl.arange(0, 32)[None, :]
    local = word[:, None] * 32 + bit
    start = index * TILE
    size = left(n, start, TILE)
    source = pointer(address, DTYPE, ALIGNED) + start
    bits = load_tile(source, local, size, TILE)
    keys = key(bits)
    tau = tl.where(wanted > 0, tl.load(verdict + 3), -1).to(keys.dtype)
    # Indices are compared within the tile: 32 bits are enough there.
    cutoff = tl.maximum(tl.minimum(tl.load(verdict + 4) - start, TILE), -1).to(tl.int32)
    chosen = selected(keys, tau, local, cutoff)
    new = shrunk(bits, factor(shrink_high, shrink_low, DTYPE), DTYPE)
    store_tile(source, local, size, tl.where(chosen, new, bits), TILE)

    valid = local < size
    packed = tl.sum(tl.where(valid & (chosen == 0), 1 << bit, 0), 1)
    first = index * (TILE // 32)
    line = masks + mask_start(rows, t) + first + word
    owned = word < ((n + 511) // 512) * 16 - first  # padding words of the tensor's last line too
    old = tl.load(line, mask=owned, other=0)
    was_kept = ((old[:, None] >> bit) & 1) != 0
    flipped = tl.sum((valid & (was_kept == chosen)).to(tl.int32), 1)
    tl.store(line, packed, mask=owned & (packed != old))
    tl.atomic_add(flips + t, tl.sum(flipped, 0).to(tl.int64), sem="relaxed")


def soft_shrink_(
    weights: list[Tensor],
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    bracket: bool = True,
    *,
    tile: int = TILE,
) -> None:
    """See `soft_shrink_` in the schemas. The first call of a run is quicker with bracket=False."""
    if scratch.data_ptr() % 8:
        raise ValueError("scratch does not start on 8 bytes: allocate it as a tensor of its own")
    dtype = weights[0].dtype
    found = tables(weights, tile)
    grid = (found.tiles.numel(),)
    options = {"DTYPE": name_of(dtype), "TILE": tile, **LAUNCH}
    factors = halves(shrink)
    with torch.cuda.device_of(k):
        if bracket and dtype != torch.float64:
            count[grid](
                found.rows, found.tiles, k, thresholds.view(INTEGER[dtype]), flips, scratch,
                found_inf, *factors, maxnreg=COUNT_REGISTERS, **options,
            )  # fmt: skip
        else:
            radix_search(found, k, thresholds, tile, flips, scratch, found_inf)
        apply[grid](
            found.rows, found.tiles, k, masks, flips, scratch, found_inf, *factors,
            ALIGNED=found.aligned, maxnreg=APPLY_REGISTERS, **options,
        )  # fmt: skip
