"""magnitude_threshold: the exact k-th smallest |w| of every tensor of a model.

One launch per 8 bits of the key (2 for 16-bit weights, 4 for float32, 8 for float64) for all
tensors together, each reading the weights once: select.radix_pass.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .select import radix_search
from .tables import TILE, tables


def magnitude_threshold(weights: list[Tensor], k: list[int], *, tile: int = TILE) -> Tensor:
    """See `magnitude_threshold` in the schemas."""
    ranks = torch.tensor(k, dtype=torch.int64, device="cpu").to(weights[0].device)
    thresholds = torch.empty(len(weights), dtype=weights[0].dtype, device=weights[0].device)
    with torch.cuda.device_of(ranks):
        radix_search(tables(weights, tile), ranks, thresholds, tile)
    return thresholds
