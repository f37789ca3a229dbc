"""The optimizer's tensors of a list of weights: what is masked together with the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from issp.pruning.memory_order import permuted


class OptimizerMoments:
    """Moments, momentum buffers and the like; looked up again when the state was replaced or grew.

    A moment is a floating-point tensor of its weight's shape.

    Attributes:
        irregular: (number of the weight, moment) of all moments that `complete` leaves out: those
            on another device, in another memory order, or of a kind that some weights lack.
    """

    def __init__(self) -> None:
        self._source: object = None
        self._signature: tuple[int, int] = (-1, -1)
        self._dicts: list[dict[str, Any]] = []
        self._keys: list[str] = []
        self.irregular: list[tuple[int, Tensor]] = []

    def __reduce__(self) -> tuple[type[OptimizerMoments], tuple[()]]:
        return OptimizerMoments, ()  # a copy looks its own optimizer's moments up

    def refresh(
        self,
        optimizer: Optimizer,
        weights: list[Tensor],
        device: torch.device,
        orders: list[list[int] | None],
    ) -> None:
        """Looks the moments up again if the optimizer's state has changed.

        The weights are on one device; `orders` are those that `memory_order` gives for them.
        """
        state = optimizer.state
        if self._source is state and self._signature == (len(state), self._num_entries()):
            return
        # `state` is a defaultdict: asking with [] would create entries and change its state_dict.
        self._dicts = [state.get(w, {}) for w in weights]
        by_key: dict[str, list[tuple[int, Tensor]]] = {}
        has_unset = False
        for t, (weight, values) in enumerate(zip(weights, self._dicts, strict=True)):
            for key, value in values.items():
                has_unset |= value is None
                if _is_moment(value, weight):
                    by_key.setdefault(key, []).append((t, value))
        self._keys, self.irregular = [], []
        for key, moments in by_key.items():
            if len(moments) == len(weights) and all(
                m.device == device and permuted(m, orders[t]).is_contiguous() for t, m in moments
            ):
                self._keys.append(key)
            else:
                self.irregular += moments
        # An entry that is still None becomes a tensor without changing any length.
        self._source = None if has_unset or self.irregular else state
        self._signature = (len(state), self._num_entries())

    def complete(self) -> list[list[Tensor]]:
        """One list per kind of moment, in the order of the weights."""
        return [[values[key] for values in self._dicts] for key in self._keys]

    def _num_entries(self) -> int:
        return sum(map(len, self._dicts))


def _is_moment(value: object, weight: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == weight.shape
        and value.is_floating_point()
        and value.dim() > 0
    )
