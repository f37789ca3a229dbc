"""Dense training: nothing is pruned, which every comparison needs as its upper end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from issp.pruning.methods.base import Method


@dataclass
class Dense(Method):
    """Prunes nothing; the stages, schedules and records are those of the other methods."""

    name: ClassVar[str] = "dense"
    takes_shards: ClassVar[bool] = True
    ranks: ClassVar[bool] = False
    prunes: ClassVar[bool] = False
