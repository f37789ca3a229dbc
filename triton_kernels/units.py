"""Tensors whose weights are selected in units of v rows x c channels: scores, and the shrink.

Three steps: `score` writes a score per unit, soft_shrink_ selects among the scores as if they were
weights (soft_shrink.py), and `shrink_selected` reads a mask bit per unit. A lane holds a unit.

Traffic per float32 weight: two reads and a write, and 1/8 byte of mask read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .nm_shrink import (
    clear_padding,
    finalize_tensor,
    first_of,
    flip_bits,
    rows_of,
    score_at,
)
from .semantics import factor, key, shrunk
from .tables import (
    INTEGER,
    SCRATCH_HEADER,
    Tables,
    get_or_build,
    group_tables,
    locate,
    mask_start,
    mask_words,
    name_of,
    overflowed,
    pointer,
    region_words,
    split_f64,
    starts,
)

UNITS = 256  # of a program
LAUNCH = {"num_warps": 4, "enable_fp_fusion": False}


class Selection(NamedTuple):
    """The scores of a call's units, and the state of the selection among them."""

    scores: list[Tensor]
    thresholds: Tensor
    masks: Tensor
    flips: Tensor
    scratch: Tensor
    chosen: Tensor  # int64: which tensors of the call these are
    sizes: Tensor  # int64: weights of a unit
    table: Tables
    rows: Tensor  # int64 [T, 8]: columns, inner, start in masks, v, 0, units, c, start in scores


@triton.jit
def score(
    rows, tiles, patterns, scores, found_inf, DTYPE: tl.constexpr, UNITS: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Step 1: scores[start + unit] of every unit."""
    if overflowed(found_inf):
        return
    t, address, _, index, _ = locate(rows, tiles, tl.program_id(0))
    pattern = patterns + t.to(tl.int64) * 8
    columns, inner = tl.load(pattern).to(INDEX), tl.load(pattern + 1).to(INDEX)
    v, c = tl.load(pattern + 3).to(tl.int32), tl.load(pattern + 6).to(tl.int32)
    unit = index.to(INDEX) * UNITS + tl.arange(0, UNITS)
    valid = unit < tl.load(pattern + 5)
    first = first_of(unit, columns, inner, c, v)
    found = score_at(pointer(address, DTYPE, False), first, valid, v, columns, c, inner, DTYPE)
    tl.store(scores + tl.load(pattern + 7) + unit, found, mask=valid)


@triton.jit(do_not_specialize=["shrink_high", "shrink_low"])
def shrink_selected(
    rows, tiles, patterns, k, unit_masks, thresholds, masks, flips, scratch, found_inf,
    shrink_high, shrink_low, DTYPE: tl.constexpr, UNITS: tl.constexpr, INDEX: tl.constexpr,
):  # fmt: skip
    """Step 3: shrinks the units whose bit in unit_masks is 0, unless k is out of range."""
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    pattern = patterns + t.to(tl.int64) * 8
    columns, inner = tl.load(pattern).to(INDEX), tl.load(pattern + 1).to(INDEX)
    v, c = tl.load(pattern + 3).to(tl.int32), tl.load(pattern + 6).to(tl.int32)
    wanted = tl.load(k + t)
    if (wanted < 0) | (wanted > n) | (wanted % (v * c) != 0):
        return
    unit = index.to(INDEX) * UNITS + tl.arange(0, UNITS)
    valid = unit < tl.load(pattern + 5)
    unit_words = unit_masks + tl.load(pattern + 2)
    word = tl.load(unit_words + (unit >> 5), mask=valid, other=-1)
    pruned = valid & (((word >> (unit & 31).to(tl.int32)) & 1) == 0)
    first = first_of(unit, columns, inner, c, v)
    weights, words = pointer(address, DTYPE, False), masks + mask_start(rows, t)
    shrink = factor(shrink_high, shrink_low, DTYPE)
    flipped = tl.zeros([UNITS], tl.int32)
    largest = tl.zeros([UNITS], tl.int64 if DTYPE == "float64" else tl.int32)
    for i in range(v * c):
        each = first + i // c * columns + i % c * inner
        bits = tl.load(weights + each, mask=valid, other=0)
        tl.store(weights + each, shrunk(bits, shrink, DTYPE), mask=pruned)
        largest = tl.maximum(largest, tl.where(pruned, key(bits), 0).to(largest.dtype))
        flipped += flip_bits(words, each[None, :], valid[None, :], pruned[None, :] == 0)
    if index == 0:
        clear_padding(words, n.to(INDEX))
    total = tl.sum(flipped, 0)
    finalize_tensor(rows, t, programs, scratch, thresholds, flips, total, tl.max(largest, 0))


def in_units(patterns: Sequence[int], count: int) -> list[int]:
    """Which of the first `count` tensors are pruned in units; `patterns` as in the schemas."""
    if not patterns:
        return []
    rows = [patterns[4 * t : 4 * t + 4] for t in range(count)]
    return [t for t, (_, m, v, c) in enumerate(rows) if m == 0 and v * c > 1]


def selection_of(
    weights: Sequence[Tensor], patterns: Sequence[int], chosen: Sequence[int]
) -> Selection:
    """The selection of these weights, the same memory in every call: a graph may hold it.

    Args:
        weights: all of the call.
        patterns: as in the schemas.
        chosen: which of them are pruned in units.

    Raises:
        RuntimeError: a CUDA graph is being captured and no call has been made before.
    """
    device, dtype = weights[0].device, weights[0].dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    addresses = tuple((w.data_ptr(), w.numel()) for w in weights)
    cached = ("units", device, wide, addresses, tuple(patterns), tuple(chosen))

    def build() -> tuple:
        sizes = [patterns[4 * t + 2] * patterns[4 * t + 3] for t in chosen]
        counts = [weights[t].numel() // size for t, size in zip(chosen, sizes, strict=True)]
        # A score's address is a multiple of 16 bytes, as that of a weight.
        at = starts([-(-count // 4) * 4 for count in counts])
        buffer = torch.empty(at[-1] + counts[-1], dtype=wide, device=device)
        mask_starts = starts([mask_words(count) for count in counts])
        rows = [(0,) * 8 for _ in weights]
        for i, t in enumerate(chosen):
            columns, inner = rows_of(weights[t])
            v, c = patterns[4 * t + 2 : 4 * t + 4]
            rows[t] = (columns, inner, mask_starts[i], v, 0, counts[i], c, at[i])
        table, uploaded = group_tables(weights, rows, chosen, UNITS)
        return Selection(
            [buffer[start : start + count] for start, count in zip(at, counts, strict=True)],
            torch.full((len(chosen),), float("nan"), dtype=wide, device=device),
            torch.zeros(sum(map(mask_words, counts)), dtype=torch.int32, device=device),
            torch.zeros(len(chosen), dtype=torch.int64, device=device),
            torch.zeros(
                SCRATCH_HEADER + sum(map(region_words, counts)), dtype=torch.int32, device=device
            ),
            torch.tensor(chosen, dtype=torch.int64, device="cpu").to(device),
            torch.tensor(sizes, dtype=torch.int64, device="cpu").to(device),
            table,
            uploaded,
        )

    return Selection(*get_or_build(cached, device, build))


def launch_score(weights: Sequence[Tensor], by: Selection, found_inf: Tensor | None) -> None:
    """Step 1."""
    scores = by.scores[0].view(INTEGER[by.scores[0].dtype])
    with torch.cuda.device_of(by.masks):
        score[by.table.grid](
            by.table.rows, by.table.tiles, by.rows, scores, found_inf, **_constants(weights),
            **LAUNCH,
        )  # fmt: skip


def ranks(k: Tensor, by: Selection) -> Tensor:
    """How many units are selected; -1, which selects nothing, where k is out of range."""
    own = k[by.chosen]
    return torch.where(own % by.sizes == 0, own // by.sizes, -1)


def launch_shrink(
    weights: Sequence[Tensor], by: Selection, k: Tensor, shrink: float, thresholds: Tensor,
    masks: Tensor, flips: Tensor, scratch: Tensor, found_inf: Tensor | None,
) -> None:  # fmt: skip
    """Step 3."""
    with torch.cuda.device_of(masks):
        shrink_selected[by.table.grid](
            by.table.rows, by.table.tiles, by.rows, k, by.masks,
            thresholds.view(INTEGER[thresholds.dtype]), masks, flips, scratch, found_inf,
            *split_f64(shrink), **_constants(weights), **LAUNCH,
        )  # fmt: skip


def _constants(weights: Sequence[Tensor]) -> dict:
    wide = max(w.numel() for w in weights) >= 2**31
    index = tl.int64 if wide else tl.int32
    return {"DTYPE": name_of(weights[0].dtype), "UNITS": UNITS, "INDEX": index}
