"""The pruning methods: what happens to the unimportant weights after every optimizer step.

A method is one small object with `factor`; the pruner asks it once per step. Selection, masks,
counting and the freeze are the same for all and stand in pruner.py and groups.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Shrinkage:
    """Multiplies the unimportant weights by a constant after every optimizer step.

    Args:
        name: name of the method.
        factor: 0..1; ISS-P shrinks in proportion to the magnitude, IHT is the limit 0.

    Source: ISS-P, figure 1: S(w) = w where |w| >= tau, alpha * w elsewhere.
    """

    name: str
    factor: float


METHODS: dict[str, Callable[[float], Shrinkage]] = {
    "iss-p": lambda shrink: Shrinkage("iss-p", shrink),
    "iht": lambda shrink: Shrinkage("iht", 0.0),
}
PLANNED = ("iss-r", "l1", "scratch", "srp", "assl", "sls")


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
