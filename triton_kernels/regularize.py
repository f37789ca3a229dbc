"""regularize_: ISS-R's g += factor * w wherever the packed mask has a 0 bit.

One launch for the whole model. Traffic per float32 weight: 4 bytes of gradient and 4 of weight
read and 4 of gradient written where the bit is 0, 1/8 byte of mask. The tile is the one of
apply_masks_.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .apply_masks import pruned_in_tile, tensor_pointer
from .semantics import narrow, widen
from .tables import TILE, launch, locate, name_of, tables


@triton.jit
def regularized(g, w, factor, DTYPE: tl.constexpr):
    """g + factor * w: the product rounded, then the sum, then once into 16 bits.

    A NaN result is the positive quiet one with an empty payload.
    """
    if DTYPE == "float64":
        nan: tl.constexpr = 0x7FF8000000000000
    elif DTYPE == "float32":
        nan: tl.constexpr = 0x7FC00000
    else:
        nan: tl.constexpr = 0x7E00 if DTYPE == "float16" else 0x7FC0
    total = widen(g, DTYPE) + factor * widen(w, DTYPE)
    return tl.where(total == total, narrow(total, DTYPE), nan).to(g.dtype)


@triton.jit
def regularize(rows, tiles, factors, masks, count, DTYPE: tl.constexpr, TILE: tl.constexpr):
    t, _, n, index, _ = locate(rows, tiles, tl.program_id(0))
    local, pruned = pruned_in_tile(rows, t, masks, n, index, TILE)
    start = index * TILE
    target = tensor_pointer(rows, t, DTYPE) + start + local
    g = tl.load(target, mask=pruned, other=0)
    w = tl.load(tensor_pointer(rows, t + count, DTYPE) + start + local, mask=pruned, other=0)
    tl.store(target, regularized(g, w, tl.load(factors + t), DTYPE), mask=pruned)


def regularize_(
    grads: list[Tensor], weights: list[Tensor], factors: Tensor, masks: Tensor, *, tile: int = TILE
) -> None:
    """See `regularize_` in the schemas."""
    with torch.cuda.device_of(masks):
        table = tables([*grads, *weights], tile, 1, range(len(grads)))
        dtype = name_of(grads[0].dtype)
        regularize[table.grid](
            *(table.rows, table.tiles, factors, masks, len(grads)),
            DTYPE=dtype, TILE=tile,
            **launch(dtype),
        )  # fmt: skip
