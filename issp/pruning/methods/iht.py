"""IHT: iterative hard thresholding, the limit alpha = 0 of ISS-P.

The unimportant weights become zero after every step, until a gradient moves them again.

Source: docs/method.md, section 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from issp.pruning.methods.base import Method


@dataclass
class IHT(Method):
    """Writes zeros into the unimportant weights after every step."""

    name: ClassVar[str] = "iht"
    takes_shards: ClassVar[bool] = True

    @property
    def factor(self) -> float:
        return 0.0
