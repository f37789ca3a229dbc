"""The order of a tensor's dimensions in memory: contiguous, channels_last or another one."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
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


def same_objects(left: Iterable[object], right: Iterable[object]) -> bool:
    """Whether two equally long sequences hold the very same objects."""
    return all(map(operator.is_, left, right))


class ContiguousViews:
    """Tensors as the ops take them, for every step: contiguous (channels_last is permuted).

    Views are kept as long as the permuted tensors lie where they lay. Copies come without.

    Args:
        orders: of each tensor, as `memory_order` gives it.
        flattened: which of the permuted tensors the op takes as [O, rest]; empty: none.
    """

    def __init__(self, orders: Sequence[list[int] | None], flattened: Sequence[bool] = ()) -> None:
        self._orders, self._flattened = orders, flattened
        self._permuted = [t for t, order in enumerate(orders) if order is not None]
        self._views: list[Tensor] = []
        self._pointers: list[int] = []

    def __reduce__(self) -> tuple[type[ContiguousViews], tuple[Any, ...]]:
        return ContiguousViews, (self._orders, self._flattened)

    def of(self, tensors: list[Tensor]) -> list[Tensor]:
        """The views of these tensors."""
        if not self._permuted:
            return tensors
        present = pointers([tensors[t] for t in self._permuted])
        if present != self._pointers:
            self._views = [self._view(t, tensors[t]) for t in self._permuted]
            self._pointers = present
        views = list(tensors)
        for t, view in zip(self._permuted, self._views, strict=True):
            views[t] = view
        return views

    @torch.no_grad()
    def _view(self, t: int, x: Tensor) -> Tensor:
        view = permuted(x, self._orders[t])
        return view.flatten(1) if t < len(self._flattened) and self._flattened[t] else view


def permuted(x: Tensor, order: list[int] | None) -> Tensor:
    """A view in another order of dimensions; None leaves the tensor as it is."""
    return x if order is None else x.permute(order)


def inverse(order: list[int]) -> list[int]:
    """The permutation that undoes `order`."""
    return sorted(range(len(order)), key=order.__getitem__)
