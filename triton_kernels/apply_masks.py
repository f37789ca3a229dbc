"""apply_masks_: writes +0 wherever the packed mask has a 0 bit.

One launch for each element size among the tensors (one for a model of one dtype, float16 and
bfloat16 together). Traffic: 1/8 byte read per element and a write of the pruned ones; the tensors
are not read. The tile is [TILE / 32, 32]: a row is a mask word, and a warp writes 32 neighbours
with one instruction (no alignment is told: wider stores would fall apart into strided ones, since
each lane has its own predicate).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tables import TILE, launch, left, locate, mask_start, name_of, pointer, tables


@triton.jit
def apply_masks(rows, tiles, masks, DTYPE: tl.constexpr, TILE: tl.constexpr):
    t, address, n, index, _ = locate(rows, tiles, tl.program_id(0))
    word = tl.arange(0, TILE // 32)
    bit = tl.arange(0, 32)[None, :]
    local = word[:, None] * 32 + bit
    start = index * TILE
    valid = local < left(n, start, TILE)
    first = index * (TILE // 32)
    owned = word < ((n + 511) // 512) * 16 - first
    packed = tl.load(masks + mask_start(rows, t) + first + word, mask=owned, other=0)
    target = pointer(address, DTYPE, False) + start + local
    pruned = ((packed[:, None] >> bit) & 1) == 0
    tl.store(target, tl.zeros([TILE // 32, 32], target.dtype.element_ty), mask=valid & pruned)


def apply_masks_(tensors: list[Tensor], masks: Tensor, *, tile: int = TILE) -> None:
    """See `apply_masks_` in the schemas."""
    by_size: dict[int, list[int]] = {}
    for t, x in enumerate(tensors):
        by_size.setdefault(x.element_size(), []).append(t)
    with torch.cuda.device_of(masks):
        for same in by_size.values():
            found = tables(tensors, tile, 1, same)
            dtype = name_of(tensors[same[0]].dtype)
            apply_masks[found.grid](
                found.rows, found.tiles, masks, DTYPE=dtype, TILE=tile,
                **launch(dtype),
            )  # fmt: skip
