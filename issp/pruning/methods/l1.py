"""L1: one-shot magnitude pruning of the network that `attach` is given.

Source: docs/method.md, section 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from issp.pruning.methods.base import Method


@dataclass
class L1(Method):
    """Fixes the masks at once, by magnitude; the kept weights go on from their values."""

    name: ClassVar[str] = "l1"
    takes_shards: ClassVar[bool] = True
    fixes_masks: ClassVar[bool] = True
