"""Schedule-free optimizers: further iterates of a weight, which it is interpolated from.

They train at y, evaluate at x, and keep a third point z. Two of the three are stored, and `eval()`
and `train()` move the weight from one to another. Shrinking the weight alone would leave z as it
was, and x, computed from both, would not shrink. All iterates of a selected weight are
therefore multiplied by the same factor. Masks need nothing of the kind: the iterates are masked as
moments are, and zeros in two of the points are zeros in the third.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

_KEYS = ("x", "z")


def iterates(optimizers: Sequence[Any], weights: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(number of the weight, a further iterate of it) in the states of schedule-free optimizers."""
    for optimizer in optimizers:
        if any("ScheduleFree" in cls.__name__ for cls in type(optimizer).__mro__):
            for t, weight in enumerate(weights):
                values = optimizer.state.get(weight, {})
                for key in _KEYS:
                    if isinstance(x := values.get(key), Tensor) and x.shape == weight.shape:
                        yield t, x


@torch.no_grad()
def shrink(x: Tensor, kept: Tensor, factor: float, found_inf: Tensor | None) -> None:
    """Multiplies what is not kept by the factor, unless AMP skips the step."""
    factors = torch.full_like(x, factor).masked_fill_(kept, 1.0)
    if found_inf is not None:
        factors = torch.where(found_inf.to(x.device) != 0, 1.0, factors)
    x.mul_(factors)
