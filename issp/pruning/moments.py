"""What is masked together with the weights: the optimizer's moments of them, and their averages."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from issp.ops.validation.pruning import DTYPES
from issp.pruning.memory_order import ContiguousViews, permuted, pointers, same_objects


class MaskTargets:
    """The tensors that get the masks of some weights, checked before any of them is written.

    Args:
        weights: on one device.
        orders: of each weight, as `memory_order` gives it.

    Attributes:
        lists: lists of one tensor per weight, of the weights' device and memory orders and without
            overlaps: one call of the op masks them all. The first one holds the weights.
        irregular: (number of the weight, tensor) of all others.
    """

    def __init__(self, weights: list[Tensor], orders: Sequence[list[int] | None]) -> None:
        self.lists: list[list[Tensor]] = [weights]
        self.irregular: list[tuple[int, Tensor]] = []
        self._orders = orders
        self._views: ContiguousViews | None = None
        self._in_a_row: list[Tensor] = []

    def views(self) -> list[Tensor]:
        """The tensors of all lists as the op takes them, one list behind the other."""
        if self._views is None or len(self._in_a_row) != len(self._orders) * len(self.lists):
            self._in_a_row = self._tensors()
            self._views = ContiguousViews(list(self._orders) * len(self.lists))
        return self._views.of(self._in_a_row)

    def copy(self) -> MaskTargets:
        """The same tensors, for more to be added."""
        copied = MaskTargets(self.lists[0], self._orders)
        copied.lists, copied.irregular = list(self.lists), list(self.irregular)
        return copied

    def add(self, tensors: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Adds tensors by the number of their weight, at most one each.

        What lies in the very memory of a weight, or of a tensor that was added before, is masked
        with it.

        Returns:
            Those that cannot be masked: of another shape or dtype, not strided, or partly in the
            memory of a weight.
        """
        weights = self.lists[0]
        if len(tensors) == len(weights) and all(map(self._is_regular, tensors, tensors.values())):
            in_order = [tensors[t] for t in range(len(weights))]
            if not _overlap([*self._tensors(), *in_order]):
                self.lists.append(in_order)
                return {}
        known, rest = {_place(x) for x in self._tensors()}, {}
        for t, x in tensors.items():
            if not _is_maskable(x, weights[t]):
                rest[t] = x
            elif _place(x) not in known:
                if _overlap([weights[t], x]):
                    rest[t] = x
                else:
                    self.irregular.append((t, x))
        return rest

    def _is_regular(self, t: int, x: Tensor) -> bool:
        weight = self.lists[0][t]
        return (
            _is_maskable(x, weight)
            and x.device == weight.device
            and permuted(x, self._orders[t]).is_contiguous()
        )

    def _tensors(self) -> list[Tensor]:
        return [x for tensors in self.lists for x in tensors]


class OptimizerMoments:
    """Moments, momentum buffers and the like; looked up again when the state has changed."""

    def __init__(self) -> None:
        self._targets: MaskTargets | None = None
        self._states: _KnownStates | None = None
        self._pointers: list[list[int]] = []

    def __reduce__(self) -> tuple[type[OptimizerMoments], tuple[()]]:
        return OptimizerMoments, ()  # a copy looks its own optimizer's moments up

    def targets(
        self,
        optimizers: Sequence[Any],
        weights: list[Tensor],
        orders: Sequence[list[int] | None],
        exact: bool = True,
    ) -> MaskTargets:
        """The weights and their moments.

        Args:
            optimizers, weights, orders: as for `look_up`.
            exact: False: the tensors are compared, not where they lie; the op uses the memory that
                they have, and refuses what does not suit it.
        """
        targets = self._targets
        if (
            targets is None
            or self._states is None
            or not (weights is targets.lists[0] or same_objects(weights, targets.lists[0]))
            or not self._states.are_current(optimizers)
            or (exact and list(map(pointers, targets.lists)) != self._pointers)
        ):
            targets, _ = look_up(optimizers, weights, orders)
            self._states = _KnownStates(optimizers, weights)
            self._targets, self._pointers = targets, list(map(pointers, targets.lists))
        return targets


class _KnownStates:
    """What the states of optimizers hold for some weights; every step asks whether they still do.

    Args:
        optimizers, weights: as for `look_up`.
    """

    def __init__(self, optimizers: Sequence[Any], weights: Sequence[Tensor]) -> None:
        self._all = [list(opt.state.values()) for opt in optimizers]
        self._dicts = list(chain(*_states(optimizers, weights)))
        self._num_entries = sum(map(len, self._dicts))
        self._columns = [_Column(name, self._dicts) for name in dict.fromkeys(chain(*self._dicts))]

    def are_current(self, optimizers: Sequence[Any]) -> bool:
        """Whether the states hold the same dicts, and these the same tensors."""
        if len(optimizers) != len(self._all):
            return False
        for optimizer, known in zip(optimizers, self._all, strict=True):
            state = optimizer.state
            if len(state) != len(known) or not same_objects(state.values(), known):
                return False
        return sum(map(len, self._dicts)) == self._num_entries and all(
            column.is_current() for column in self._columns
        )


class _Column:
    """The entries of one name in the dicts that have it."""

    def __init__(self, name: str, dicts: Iterable[Mapping[str, Any]]) -> None:
        self._get = operator.itemgetter(name)
        self._dicts = [entries for entries in dicts if name in entries]
        self._entries = list(map(self._get, self._dicts))
        self._tensors = _without_numbers(self._entries)

    def is_current(self) -> bool:
        """Whether the dicts hold the same tensors; numbers may be others in every step."""
        try:
            if same_objects(map(self._get, self._dicts), self._entries):
                return True
            tensors = _without_numbers(map(self._get, self._dicts))
        except KeyError:
            return False
        return len(tensors) == len(self._tensors) and same_objects(tensors, self._tensors)


def _without_numbers(entries: Iterable[Any]) -> list[Any]:
    return [x for x in entries if x is None or isinstance(x, Tensor)]


def look_up(
    optimizers: Sequence[Any], weights: list[Tensor], orders: Sequence[list[int] | None]
) -> tuple[MaskTargets, dict[str, str]]:
    """What is masked of some weights, and what looks like a moment and cannot be masked.

    Args:
        optimizers: whose states are read: one that steps the weights, and wrappers around it.
        weights: on one device.
        orders: of each weight, as `memory_order` gives it.

    Returns:
        The targets; name in the state of what cannot be masked -> its kind, in a word.
    """
    by_name: dict[tuple[int, str], dict[int, Tensor]] = {}
    for number, dicts in enumerate(_states(optimizers, weights)):
        for t, (weight, values) in enumerate(zip(weights, dicts, strict=True)):
            for name, x in values.items():
                if isinstance(x, Tensor) and _looks_like_a_moment(x, weight):
                    by_name.setdefault((number, name), {})[t] = x
    targets, unmasked = MaskTargets(weights, orders), {}
    for (_, name), moments in by_name.items():
        for t, x in targets.add(moments).items():
            shape = "" if x.shape == weights[t].shape else f" of shape {tuple(x.shape)}"
            unmasked[name] = _kind(x) + shape
    return targets, unmasked


def _states(optimizers: Sequence[Any], weights: Sequence[Tensor]) -> list[list[Mapping[str, Any]]]:
    # `state` is a defaultdict: asking with [] would create entries and change its state_dict.
    return [[opt.state.get(w, {}) for w in weights] for opt in optimizers]


def _looks_like_a_moment(x: Tensor, weight: Tensor) -> bool:
    """Whether a tensor may hold a number for each weight, in codes or stacked with others too."""
    if x.numel() < 2 or x.dtype == torch.bool:
        return False
    is_coded = not _is_plain(x) or not x.is_floating_point()
    stacked = weight.shape in (x.shape[: weight.dim()], x.shape[-weight.dim() :])
    return is_coded or stacked or x.numel() == weight.numel()


def _is_maskable(x: Tensor, weight: Tensor) -> bool:
    return (
        _is_plain(x)
        and x.shape == weight.shape
        and x.dtype in DTYPES
        and not x.is_inference()
        and all(stride or size == 1 for stride, size in zip(x.stride(), x.shape, strict=True))
    )


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided


def _kind(x: Tensor) -> str:
    if type(x) not in (Tensor, nn.Parameter):
        return type(x).__name__
    return str(x.dtype if x.layout == torch.strided else x.layout).removeprefix("torch.")


def _place(x: Tensor) -> tuple[object, ...]:
    return x.device, x.data_ptr(), x.stride()


def _overlap(tensors: Iterable[Tensor]) -> bool:
    """Whether two of the tensors overlap in memory; gaps within a tensor count as its memory."""
    spans = []
    for x in tensors:
        last = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
        spans.append((str(x.device), x.data_ptr(), x.data_ptr() + (last + 1) * x.itemsize))
    spans.sort()
    return any(
        device == other and begin < end
        for (device, _, end), (other, begin, _) in zip(spans, spans[1:], strict=False)
    )
