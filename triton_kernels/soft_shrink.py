"""soft_shrink_: select the k smallest |w| of every tensor, shrink them, refresh masks and flips.

Two launches for the whole model, steady state or not, and one for its N:M tensors (nm_shrink.py):

1. count   a program per tile, or per 8 tiles of a large model. The previous threshold tau brackets
           the next one: right after a shrink the k-th magnitude is exactly fl(alpha tau), and one
           optimizer step moves it little. The program counts the keys below the bracket and
           appends those inside it to the tensor's region of scratch; the last program of a
           tensor selects among these candidates (by estimate 1 to 5 % of n). If the bracket
           missed (no previous threshold, a jump of k, too many candidates for the region) it
           searches the whole tensor: slower, with the same result. scratch[0] counts these misses.
2. apply   the same programs in reverse order, since the tiles read last are still in L2.

Traffic per float32 weight: count reads 4 bytes, apply reads 4 (out of L2 where it fits) and writes
4, the mask is 1/8 byte read and, where it changed, written. bracket=False replaces `count` by the
2 (16-bit), 4 (float32) or 8 (float64) launches of select.radix_pass; float64 always uses those.

A candidate is one word: its key's distance from the bracket's lower end, followed by the number
of its tile (or of a group of tiles, where the 31 bits do not suffice). The rank-th smallest *word*
then gives tau and the tile in which the last tie lies, so ties by lowest index cost no launch:
the last program scans that one tile. Candidates rather than fine histogram bins inside the bracket,
since bins would need another pass over the data to tell apart the keys (and the ties) of one bin.
Their order in scratch depends on the order of the programs; their set and the result do not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nm_shrink import TILE as GROUP_TILE
from .nm_shrink import grouped, shrink_all
from .select import (
    bit_length,
    last_to_arrive,
    nth_equal,
    radix_search,
    search,
    select_words,
    store_threshold,
)
from .semantics import factor, infinity, key, narrow, selected, shrunk, widen
from .tables import (
    INTEGER,
    RECENT,
    TILE,
    elements_in_tile,
    launch,
    load_tile,
    locate,
    mask_start,
    name_of,
    overflowed,
    pointer,
    region,
    split_f64,
    store_tile,
    tables,
)
from .units import in_units, launch_score, launch_shrink, ranks, selection_of

# Along which axis of count's tile a thread counts: the one that Triton gives scattered stores. The
# other is as correct but passes the tile through shared memory.
AXIS = 0 if RECENT else 1


@triton.jit
def bracket(previous, shrink, DTYPE: tl.constexpr):
    """Keys between which the new threshold is expected; low > high: unknown.

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

    The upper bits of the tile's number, as many as fit in 31 bits together with the distance.
    """
    distance_bits = bit_length(high - low)
    tile_bits = bit_length((tiles - 1).to(tl.int32))
    kept_tile_bits = tl.minimum(tl.maximum(31 - distance_bits, 0), tile_bits)
    return (
        kept_tile_bits,
        tile_bits - kept_tile_bits,
        tl.minimum(distance_bits + kept_tile_bits, 31),
    )


@triton.jit
def resolve_candidates(
    source, n, words, inside, rank, low, high, programs, NUM_TILES: tl.constexpr, TILE: tl.constexpr
):
    """tau and cutoff of the rank-th smallest of the `inside` candidates."""
    kept_tile_bits, dropped_tile_bits, width = packing(low, high, programs)
    # Keys that all equal `low` need not be stored: their number is all the information of a word.
    value = tl.cast(0, tl.int32)
    nth = rank
    equal = inside
    if low < high:
        value, nth, equal = select_words(words, inside, rank, width, TILE)
    tau = low + (value >> kept_tile_bits)
    group = (value & ((1 << kept_tile_bits) - 1)).to(tl.int64)
    if low == high:
        start = tl.cast(0, tl.int64)
        end = n
    else:
        start = (group << dropped_tile_bits) * (NUM_TILES * TILE)
        end = ((group + 1) << dropped_tile_bits) * (NUM_TILES * TILE)
    cutoff = end - 1
    if nth < equal:
        cutoff = nth_equal(source, n, start, tau, nth, TILE)
    return tau, cutoff


@triton.jit
def count_tiles(
    rows, t, source, n, index, programs, wanted, thresholds, flips, scratch, shrink,
    DTYPE: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Counts, candidates, and in the last program of a tensor its threshold."""
    words, capacity = region(rows, t, scratch)
    counters = words.to(tl.pointer_type(tl.int64))  # arrivals, below, inside, tau, cutoff
    words += 16
    low, high = bracket(tl.load(thresholds + t), shrink, DTYPE)
    if (low <= high) & (wanted > 0):
        # [TILE / 256, 256], or its transpose: a thread has a column, so that its counts stay in
        # its registers and only the 256 totals are scanned across threads. Four-byte loads (the
        # compiler is not told the alignment) keep the layout that the scattered stores need;
        # 16-byte loads would cost three conversions through shared memory, six times the tile.
        lane = tl.arange(0, 256)
        row = tl.arange(0, TILE // 256)
        local = tl.expand_dims(row * 256, 1 - AXIS) + tl.expand_dims(lane, AXIS)
        kept_tile_bits, dropped_tile_bits, _ = packing(low, high, programs)
        number = (index >> dropped_tile_bits).to(tl.int32)
        max_candidates = tl.where(low < high, capacity, 0)
        start = index * (NUM_TILES * TILE)
        end = tl.minimum(n, start + NUM_TILES * TILE)
        below = tl.zeros([256], tl.int32)
        next_tile = load_tile(source + start, local, elements_in_tile(end, start, TILE), TILE)
        for at in range(start, end, TILE):
            # The next tile is loaded while the atomic reserves slots for this one.
            keys = key(next_tile)
            next_tile = load_tile(
                source + at + TILE, local, elements_in_tile(end, at + TILE, TILE), TILE
            )
            inside = (keys >= low) & (keys <= high)
            tally = tl.sum(tl.where(keys < low, 1 << 16, inside.to(tl.int32)), AXIS)
            below += tally >> 16
            local_inside = tally & 0xFFFF
            upto = tl.cumsum(local_inside, 0)
            first = tl.atomic_add(counters + 2, tl.max(upto, 0).to(tl.int64), sem="relaxed")
            slot = tl.cumsum(inside.to(tl.int32), AXIS) + tl.expand_dims(
                upto - local_inside - 1, AXIS
            )
            limit = tl.maximum(tl.minimum(max_candidates - first, TILE), 0).to(tl.int32)
            word = ((keys - low) << kept_tile_bits) | number
            tl.store(words + first + slot, word, mask=inside & (slot < limit))
        tl.atomic_add(counters + 1, tl.sum(below, 0).to(tl.int64), sem="relaxed")
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
            tau, cutoff = resolve_candidates(
                source, n, words, inside, rank, low, high, programs, NUM_TILES, TILE
            )
        elif wanted > 0:
            tl.atomic_add(scratch, 1, sem="relaxed")
            tau, cutoff = search(source, n, wanted, DTYPE, TILE)
        tl.store(thresholds + t, tau.to(thresholds.dtype.element_ty))
        store_threshold(rows, t, scratch, flips, tau, cutoff)


@triton.jit(do_not_specialize=["shrink_high", "shrink_low"])
def count(
    rows, tiles, k, thresholds, flips, scratch, found_inf, shrink_high, shrink_low,
    DTYPE: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr, AXIS: tl.constexpr,
):  # fmt: skip
    """Launch 1."""
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    wanted = tl.load(k + t)
    if (wanted < 0) | (wanted > n):
        return
    source = pointer(address, DTYPE, False)
    shrink = factor(shrink_high, shrink_low, DTYPE)
    count_tiles(
        rows, t, source, n, index, programs, wanted, thresholds, flips, scratch, shrink,
        DTYPE, NUM_TILES, TILE, AXIS,
    )  # fmt: skip


@triton.jit
def bit_count(words):
    """Number of 1 bits of every int32: sums of 2, 4, 8 neighbours, then of the four bytes."""
    x = words.to(tl.uint32, bitcast=True)
    x -= (x >> 1) & 0x55555555
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    x += x >> 8
    x += x >> 16
    return (x & 0x3F).to(tl.int32)


@triton.jit(do_not_specialize=["shrink_high", "shrink_low"])
def apply(
    rows, tiles, k, masks, flips, scratch, found_inf, shrink_high, shrink_low,
    DTYPE: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr, ALIGNED: tl.constexpr,
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
    header = words.to(tl.pointer_type(tl.int64))
    tau = tl.load(header + 3)
    tau = tl.where(wanted > 0, tau, -1)
    last = tl.load(header + 4)
    shrink = factor(shrink_high, shrink_low, DTYPE)
    source = pointer(address, DTYPE, ALIGNED)
    word = tl.arange(0, TILE // 32)
    bit = tl.arange(0, 32)[None, :]
    local = word[:, None] * 32 + bit
    word_ptrs = masks + mask_start(rows, t) + word
    mask_words = (n + 511) // 512 * 16  # with the padding words of the tensor's last line
    start = index * (NUM_TILES * TILE)
    flipped = tl.zeros([TILE // 32], tl.int32)
    for at in range(start, tl.minimum(n, start + NUM_TILES * TILE), TILE):
        size = elements_in_tile(n, at, TILE)
        bits = load_tile(source + at, local, size, TILE)
        owned = word < elements_in_tile(mask_words, at // 32, TILE // 32)
        old_words = tl.load(word_ptrs + at // 32, mask=owned, other=0)
        keys = key(bits)
        # Indices are compared within the tile: 32 bits are enough there.
        cutoff = tl.maximum(tl.minimum(last - at, TILE), -1).to(tl.int32)
        chosen = selected(keys, tau.to(keys.dtype), local, cutoff)
        new = tl.where(chosen, shrunk(bits, shrink, DTYPE), bits)
        store_tile(source + at, local, size, new, TILE)
        new_words = tl.sum(tl.where((local < size) & (chosen == 0), 1 << bit, 0), 1)
        # A shift by 32 is undefined, hence the bound 31; a full word is judged by itself.
        num_valid = tl.maximum(size - word * 32, 0)
        valid_bits = tl.where(num_valid >= 32, -1, (1 << tl.minimum(num_valid, 31)) - 1)
        flipped += bit_count((new_words ^ old_words) & valid_bits)
        tl.store(word_ptrs + at // 32, new_words, mask=owned & (new_words != old_words))
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
    patterns: Sequence[int] = (),
    *,
    tile: int = TILE,
    tiles_per_program: int | None = None,
) -> None:
    """See `soft_shrink_` in the schemas. The first call of a run is quicker with bracket=False."""
    dtype = weights[0].dtype
    state = (k, shrink, thresholds, masks, flips, scratch, found_inf)
    apart = shrink_apart(weights, patterns, *state, bracket, tile)
    if len(apart) == len(weights):
        return
    rest = [t for t in range(len(weights)) if t not in apart] if apart else None
    table = tables(weights, tile, tiles_per_program, rest)
    name = name_of(dtype)
    options = {
        "DTYPE": name,
        "NUM_TILES": table.tiles_per_program,
        "TILE": tile,
        **launch(name, table.aligned),
    }
    factors = split_f64(shrink)
    with torch.cuda.device_of(k):
        if bracket and dtype != torch.float64:
            count[table.grid](
                table.rows, table.tiles, k, thresholds.view(INTEGER[dtype]), flips, scratch,
                found_inf, *factors, AXIS=AXIS, **options,
            )  # fmt: skip
        else:
            radix_search(table, k, thresholds, tile, flips, scratch, found_inf)
        apply[table.grid](
            table.rows, table.tiles, k, masks, flips, scratch, found_inf, *factors,
            ALIGNED=table.aligned, **options,
        )  # fmt: skip


def patterned(patterns: Sequence[int], count: int) -> set[int]:
    """Which of the first `count` tensors `shrink_apart` prunes."""
    return {*grouped(patterns, count), *in_units(patterns, count)}


def shrink_apart(
    weights: list[Tensor], patterns: Sequence[int], k: Tensor, shrink: float, thresholds: Tensor,
    masks: Tensor, flips: Tensor, scratch: Tensor, found_inf: Tensor | None, bracket: bool,
    tile: int,
) -> set[int]:  # fmt: skip
    """Prunes the weights that have an N:M pattern or units; returns which they are."""
    state = (thresholds, masks, flips, scratch, found_inf)
    shrink_all(weights, patterns, k, shrink, *state, tile=min(tile, GROUP_TILE))
    units = in_units(patterns, len(weights))
    if units:
        by = selection_of(weights, patterns, units)
        launch_score(weights, by, found_inf)
        # A factor of 1 selects and changes no score that matters.
        soft_shrink_(
            by.scores, ranks(k, by), 1.0, by.thresholds, by.masks, by.flips, by.scratch,
            found_inf, bracket, tile=tile,
        )  # fmt: skip
        launch_shrink(weights, by, k, shrink, *state)
    return patterned(patterns, len(weights))
