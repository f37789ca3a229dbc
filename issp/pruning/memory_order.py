"""The order of a tensor's dimensions in memory: contiguous, channels_last or another one."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation that makes a tensor contiguous: None if it is, empty if there is none."""
    if x.is_contiguous():
        return None
    order = by_stride(x)
    return order if x.permute(order).is_contiguous() else []


def by_stride(x: Tensor) -> list[int]:
    """The dimensions from the largest stride to the smallest; equal strides keep their order."""
    return sorted(range(x.dim()), key=x.stride().__getitem__, reverse=True)


def pointers(tensors: Iterable[Tensor]) -> list[int]:
    """Where the tensors lie: equal lists mean that nothing has moved."""
    return list(map(Tensor.data_ptr, tensors))


def permuted(x: Tensor, order: list[int] | None) -> Tensor:
    """A view in another order of dimensions; None leaves the tensor as it is."""
    return x if order is None else x.permute(order)


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return sorted(range(len(order)), key=order.__getitem__)
