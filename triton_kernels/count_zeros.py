"""count_zeros: exact zeros of either sign, one launch for each element size among the tensors.

Traffic: one read. A program adds its count with one atomic; integers add up to the same in any
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .semantics import key
from .tables import TILE, elements_in_tile, launch, load_tile, locate, name_of, pointer, tables


@triton.jit
def zeros(rows, tiles, counts, DTYPE: tl.constexpr, ALIGNED: tl.constexpr, TILE: tl.constexpr):
    t, address, n, index, _ = locate(rows, tiles, tl.program_id(0))
    start = index * TILE
    source = pointer(address, DTYPE, ALIGNED) + start
    bits = load_tile(source, tl.arange(0, TILE), elements_in_tile(n, start, TILE), TILE)
    count = tl.sum((key(bits) == 0).to(tl.int32), 0)
    if count > 0:
        tl.atomic_add(counts + t, count.to(tl.int64), sem="relaxed")


def count_zeros(tensors: list[Tensor], *, tile: int = TILE) -> Tensor:
    """See `count_zeros` in the schemas."""
    by_size: dict[int, list[int]] = {}
    for t, x in enumerate(tensors):
        by_size.setdefault(x.element_size(), []).append(t)
    counts = torch.zeros(len(tensors), dtype=torch.int64, device=tensors[0].device)
    with torch.cuda.device_of(counts):
        for members in by_size.values():
            table = tables(tensors, tile, 1, members)
            dtype = name_of(tensors[members[0]].dtype)
            zeros[table.grid](
                *(table.rows, table.tiles, counts),
                DTYPE=dtype, ALIGNED=table.aligned, TILE=tile,
                **launch(dtype, table.aligned),
            )  # fmt: skip
    return counts
