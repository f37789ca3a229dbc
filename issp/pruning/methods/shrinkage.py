"""What all pruning methods have in common: a factor for the unimportant weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shrinkage:
    """Multiplies the unimportant weights by a constant after every optimizer step.

    Args:
        name: name of the method, as `issp.attach` takes it.
        factor: what the unimportant weights are multiplied by, 0..1.
    """

    name: str
    factor: float
