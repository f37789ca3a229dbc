"""The geometry of a convolution: named where people read, one flat list in the ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

Pair = tuple[int, int]


class Geometry(NamedTuple):
    """Height and width of each part; their order and meaning: issp/ops/schemas/sparse.py.

    `size` is None where the shape of a gradient says it.
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

    @property
    def output_size(self) -> Pair:
        """`size`.

        Raises:
            ValueError: the geometry has none.
        """
        if self.size is None:
            raise ValueError("the geometry has no output size: pass 12 numbers")
        return self.size

    def for_conv2d(self) -> tuple[int, ...]:
        """The `geometry` of `sparse_conv2d`."""
        return (*self.for_values_grad(), *self.upsample, *self.output_size)

    def for_values_grad(self) -> tuple[int, ...]:
        """The `geometry` of `sparse_conv2d_values_grad`."""
        return (*self.kernel, *self.stride, *self.padding, *self.dilation)
