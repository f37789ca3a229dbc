"""A layer whose mask is fixed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from issp.nn.selection import Layer
from issp.ops.keep import Keep


@dataclass(frozen=True)
class MaskedLayer:
    """A layer and its fixed mask.

    Args:
        layer: the layer.
        mask: bool in the weight's shape, True = kept.
        dense: why it cannot train its kept weights alone, or "".
    """

    layer: Layer
    mask: Tensor
    dense: str = ""

    @property
    def name(self) -> str:
        """That of the layer."""
        return self.layer.name

    @property
    def target(self) -> float | Keep:
        """That of the layer."""
        return self.layer.target
