"""nm_prune: keeps the n largest of every m, returns the pruned copy and the packed mask.

One launch, that of the fused step's N:M tensors (nm_shrink.py), which writes elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .nm_shrink import TILE, shrink_all
from .tables import mask_words


def nm_prune(
    weight: Tensor,
    n: int,
    m: int,
    v: int,
    layout: str,
    shrink: float = 0.0,
    c: int = 1,
    *,
    tile: int = TILE,
) -> tuple[Tensor, Tensor]:
    """See `nm_prune` in the schemas."""
    out = torch.empty_like(weight)
    masks = torch.zeros(mask_words(weight.numel()), dtype=torch.int32, device=weight.device)
    pattern = (n, m, 0 if layout == "flat" else v, c)
    shrink_all([weight], pattern, None, shrink, None, masks, None, None, out=out, tile=tile)
    return out, masks
