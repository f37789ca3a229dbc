"""The geometry of a convolution: named where people read, one flat list in the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Height and width of all that the ops are told; their order and meaning: schemas_products.py.

    `size` is none where a gradient's shape says it.
    """

    kernel: Pair
    stride: Pair
    padding: Pair
    dilation: Pair
    upsample: Pair = (1, 1)
    size: Pair | None = None

    @classmethod
    def of(cls, numbers: Sequence[int]) -> Geometry:
        """From the 12 numbers of `sparse_conv2d` or the 8 of `sparse_conv2d_values_grad`."""
        return cls(*zip(numbers[::2], numbers[1::2], strict=True))

    def for_product(self) -> tuple[int, ...]:
        """The `geometry` of `sparse_conv2d`."""
        return (
            *(*self.kernel, *self.stride, *self.padding, *self.dilation),
            *(*self.upsample, *self.size),
        )

    def for_gradient(self) -> tuple[int, ...]:
        """The `geometry` of `sparse_conv2d_values_grad`."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)
