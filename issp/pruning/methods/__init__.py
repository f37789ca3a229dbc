"""The pruning methods: what happens to the unimportant weights after every optimizer step.

Each method is one file with a `NAME` and a `create`. The pruner reads the factor once per step.
Selection, masks, counting and the freeze are the same for all methods (buckets.py, pruner.py).
"""

from __future__ import annotations

from collections.abc import Callable

from issp.pruning.methods import iht, iss_p
from issp.pruning.methods.shrinkage import Shrinkage

METHODS: dict[str, Callable[[float], Shrinkage]] = {m.NAME: m.create for m in (iss_p, iht)}
PLANNED = ("iss-r", "l1", "scratch", "srp", "assl", "sls")

__all__ = ["METHODS", "PLANNED", "Shrinkage", "create"]


def create(name: str, shrink: float) -> Shrinkage:
    """The method called `name`.

    Args:
        name: "iss-p" or "iht".
        shrink: factor alpha of ISS-P in 0..1; IHT does not use it.

    Raises:
        ValueError: unknown or not yet available method, or a factor outside 0..1.
    """
    available = ", ".join(METHODS)
    if name in PLANNED:
        raise ValueError(f'method "{name}" is not available in this version: use {available}')
    if name not in METHODS:
        raise ValueError(f'there is no method "{name}": use {available}')
    if not 0.0 <= shrink <= 1.0:
        raise ValueError(f"shrink is {shrink}: it must lie in 0..1 (0 is hard thresholding)")
    return METHODS[name](shrink)
