"""apply_masks_: writes +0 wherever the packed mask has a 0 bit.

One launch for weights, moments and moving average together when their elements have one size, else
one for each size. Traffic: 1/8 byte read per weight and launch and a write of the pruned ones; the
tensors are not read. The tile is [TILE / 32, 32]: a row is a mask word, and a warp writes 32
neighbours with one instruction (the compiler is not told the alignment: it would split wider
stores into strided ones, since each lane has its own predicate).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import TILE, elements_in_tile, launch, locate, mask_start, name_of, pointer, tables


@triton.jit
def pruned_in_tile(rows, t, masks, n, index, TILE: tl.constexpr):
    """Of a tile [TILE / 32, 32]: offset of each element, and whether it exists and is pruned."""
    word = tl.arange(0, TILE // 32)
    bit = tl.arange(0, 32)[None, :]
    local = word[:, None] * 32 + bit
    first = index * (TILE // 32)
    owned = word < ((n + 511) // 512) * 16 - first
    mask_word = tl.load(masks + mask_start(rows, t) + first + word, mask=owned, other=0)
    pruned = ((mask_word[:, None] >> bit) & 1) == 0
    return local, pruned & (local < elements_in_tile(n, index * TILE, TILE))


@triton.jit
def tensor_pointer(rows, t, DTYPE: tl.constexpr):
    """The address of tensor t of the call, also of a tensor without programs."""
    return pointer(tl.load(rows + t.to(tl.int64) * 8), DTYPE, False)


@triton.jit
def apply_masks(
    rows, tiles, masks, count, DTYPE: tl.constexpr, SETS: tl.constexpr, SIZES: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """SIZES: bit s is set when tensor t + s * count has elements of DTYPE's size."""
    t, _, n, index, _ = locate(rows, tiles, tl.program_id(0))
    local, pruned = pruned_in_tile(rows, t, masks, n, index, TILE)
    for s in tl.static_range(SETS):
        if (SIZES >> s) & 1:
            target = tensor_pointer(rows, t + s * count, DTYPE) + index * TILE + local
            tl.store(target, tl.zeros([TILE // 32, 32], target.dtype.element_ty), mask=pruned)


def apply_masks_(tensors: list[Tensor], masks: Tensor, sets: int = 1, *, tile: int = TILE) -> None:
    """See `apply_masks_` in the schemas."""
    count = len(tensors) // sets
    # Weights by element size and by which of their tensors have it: one group, as a rule.
    groups: dict[tuple[int, int], list[int]] = {}
    for t in range(count):
        sizes = [x.element_size() for x in tensors[t::count]]
        for size in set(sizes):
            set_bits = sum(1 << s for s, other in enumerate(sizes) if other == size)
            groups.setdefault((size, set_bits), []).append(t)
    with torch.cuda.device_of(masks):
        for (size, set_bits), weights in groups.items():
            table = tables(tensors, tile, 1, weights)
            dtype = next(name_of(x.dtype) for x in tensors if x.element_size() == size)
            apply_masks[table.grid](
                *(table.rows, table.tiles, masks, count),
                DTYPE=dtype, SETS=sets, SIZES=set_bits, TILE=tile,
                **launch(dtype),
            )  # fmt: skip
