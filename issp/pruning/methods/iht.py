"""IHT: iterative hard thresholding, the limit alpha = 0 of ISS-P.

The unimportant weights become zero after every step, until a gradient moves them again.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

from issp.pruning.methods.shrinkage import Shrinkage

NAME = "iht"


def create(shrink: float) -> Shrinkage:
    """IHT; `shrink` is not used."""
    return Shrinkage(NAME, 0.0)
