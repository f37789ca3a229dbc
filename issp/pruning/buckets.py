"""The weights of one optimizer, device and dtype: one `ShrinkState`, one op call per step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from issp import ops
from issp.nn.selection import Layer
from issp.ops import ShrinkState, reference
from issp.ops.keep import Keep
from issp.ops.schemas import mask_layout, mask_words


@dataclass(frozen=True)
class Record:
    """What is known of one layer, free of its group: to regroup, to save, to load.

    Args:
        shape: of the weight.
        k: how many weights are selected.
        threshold: 0-dim tensor in the weight's dtype; NaN before the first selection.
        flips: mask bits that the latest step changed.
        packed: int32 words of the mask in the order of the weight's indices, whatever its memory
            order, as in `issp.ops.schemas`.
    """

    shape: tuple[int, ...]
    k: int
    threshold: Tensor
    flips: int
    packed: Tensor


class Group:
    """Weights that share an optimizer, a device and a dtype, unstructured and N:M ones alike.

    Args:
        layers: their order is the order of the state.
        index: number of the optimizer whose steps drive them.
        part: number of the parameter group that has them all, where that matters.

    Raises:
        ValueError: a weight that no permutation of its dimensions makes contiguous, or an N:M one
            in an order other than contiguous and channels_last.
    """

    def __init__(self, layers: Sequence[Layer], index: int, part: int | None = None) -> None:
        self.layers = list(layers)
        self.index = index
        self.part = part
        self._stores = [layer.module._parameters for layer in layers]
        self._orders = [_memory_order(layer) for layer in layers]
        self._patterns = [x.target if isinstance(x.target, Keep) else None for x in layers]
        self._folds = [_folds(x, order) for x, order in zip(layers, self._orders, strict=True)]
        self._plain = not any(self._orders)
        weights = self.parameters()
        self._shapes = [tuple(w.shape) for w in weights]
        self._pointers = _pointers(weights)
        self._sizes = [(layer.target, w.numel()) for layer, w in zip(layers, weights, strict=True)]
        self.k = [0] * len(weights)
        views = self.views(weights)
        self._view_shapes = [v.shape for v in views]
        self.state = ShrinkState(self.folded(views), self.k, self._patterns)
        starts, _ = mask_layout(self.state.numels)
        self._spans = [
            (s, s + mask_words(n)) for s, n in zip(starts, self.state.numels, strict=True)
        ]
        self._moments = _Moments()

    def parameters(self) -> list[Tensor]:
        """The weights as they are now; never cached, since loading and `to` replace them."""
        return [store["weight"] for store in self._stores]

    def _words(self, t: int) -> Tensor:
        begin, end = self._spans[t]
        return self.state.packed[begin:end]

    def views(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors as the ops want them: contiguous (channels_last is permuted, not copied)."""
        if self._plain:
            return tensors
        with torch.no_grad():
            return [
                t if order is None else t.permute(order)
                for t, order in zip(tensors, self._orders, strict=True)
            ]

    def folded(self, views: list[Tensor]) -> list[Tensor]:
        """Views of the weights as the selection wants them.

        An N:M pattern groups input channels, dimension 1 of [O, I, ...]. In a channels_last weight,
        [O, kh, kw, I] in memory, m of them lie side by side: [O, kh * kw * I] has the same groups.
        """
        if not any(self._folds):
            return views
        with torch.no_grad():
            return [v.flatten(1) if fold else v for v, fold in zip(views, self._folds, strict=True)]

    def moved(self) -> bool:
        """Whether a weight has other memory than at the last call."""
        return _pointers(self.parameters()) != self._pointers

    def fits(self) -> bool:
        """Whether the state still suits the weights; if so, their new memory is accepted."""
        weights = self.parameters()
        first, home = weights[0].dtype, self.state.k.device
        if any(w.device != home or w.dtype != first for w in weights):
            return False
        views = self.views(weights)
        if first != self.state.thresholds.dtype or [v.shape for v in views] != self._view_shapes:
            return False
        if not all(v.is_contiguous() for v in views):
            return False
        self._pointers = _pointers(weights)
        return True

    def set_ratio(self, ratio: float, final: float) -> None:
        """Sets how many weights are selected; the device is written only when a number changes.

        Args:
            ratio: what the schedule says now.
            final: what it says at the end; a layer's own target is scaled by ratio / final.
        """
        counts = {size: _count(*size, ratio, final) for size in set(self._sizes)}
        k = [counts[size] for size in self._sizes]
        if k != self.k:
            self.state.set_k(k)
            self.k = k

    def shrink(self, factor: float, found_inf: Tensor | None = None) -> None:
        """Selects anew and shrinks; the device skips it where `found_inf` is not 0."""
        home = self.state.k.device
        if found_inf is not None and found_inf.device != home:
            found_inf = found_inf.to(home, non_blocking=True)
        weights = self.folded(self.views(self.parameters()))
        ops.soft_shrink_(weights, self.state, factor, found_inf)

    def mask(
        self, optimizer: torch.optim.Optimizer | None = None, average: list[Tensor] | None = None
    ) -> None:
        """Writes zeros where the mask says pruned: weights, moments and average in one call.

        Args:
            optimizer: of whose state every tensor of a weight's shape is masked.
            average: one tensor per weight.
        """
        sets, odd = [self.parameters()], []
        if optimizer is not None:
            self._moments.refresh(optimizer, sets[0], self.state.k.device, self._orders)
            sets += self._moments.complete()
            odd += self._moments.odd
        if average is not None:
            if self._regular(average):
                sets.append(average)
            else:
                odd += enumerate(average)
        ops.apply_masks_([view for tensors in sets for view in self.views(tensors)], self.state)
        if odd:
            self.mask_each(odd)

    def _regular(self, tensors: list[Tensor]) -> bool:
        home = self.state.k.device
        return all(
            t.device == home and v.is_contiguous()
            for t, v in zip(tensors, self.views(tensors), strict=True)
        )

    @torch.no_grad()
    def mask_each(self, tensors: Sequence[tuple[int, Tensor]]) -> None:
        """Masks single tensors of any device and memory order: (number of the layer, tensor)."""
        kept = self.masks()
        for t, tensor in tensors:
            tensor.masked_fill_(~kept[t].to(tensor.device), 0)

    def masks(self) -> list[Tensor]:
        """Bool masks in the weights' shapes, True = kept."""
        return [
            mask if order is None else mask.view(shape).permute(_inverse(order))
            for mask, order, shape in zip(
                self.state.masks(), self._orders, self._view_shapes, strict=True
            )
        ]

    def chosen(self) -> list[bool]:
        """Per layer, whether a selection has ever been made."""
        return (~self.state.thresholds.isnan()).tolist()

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """Fixes given masks as if a step had selected them: bool in the weights' shapes."""
        self.state.set_masks(self.folded([v.contiguous() for v in self.views(list(masks))]))
        self.state.thresholds.zero_()
        self._set_k([int((~mask).sum()) for mask in masks])

    def records(self) -> dict[str, Record]:
        """Copies of everything, by layer name."""
        flips, thresholds = self.state.flips.tolist(), self.state.thresholds.clone()
        records = {}
        for t, layer in enumerate(self.layers):
            packed = self._words(t).clone()
            if self._orders[t] is not None:
                kept = reference.unpack(packed, self.state.numels[t]).view(self._view_shapes[t])
                packed = reference.pack(kept.permute(_inverse(self._orders[t])).flatten())
            records[layer.name] = Record(
                self._shapes[t], self.k[t], thresholds[t], flips[t], packed
            )
        return records

    def restore(self, records: Mapping[str, Record]) -> None:
        """Takes over the records of its layers; a layer without one stays as it is.

        Raises:
            ValueError: a weight has another shape than its record.
        """
        mine = [(t, layer, records.get(layer.name)) for t, layer in enumerate(self.layers)]
        for t, layer, record in mine:
            if record is not None and self._shapes[t] != record.shape:
                raise ValueError(
                    f"{layer.name}: the mask has shape {record.shape} but the weight "
                    f"{self._shapes[t]}: attach anew"
                )
        for t, _, record in mine:
            if record is None:
                continue
            packed = record.packed.to(self.state.k.device)
            if self._orders[t] is not None:
                kept = reference.unpack(packed, self.state.numels[t]).view(self._shapes[t])
                packed = reference.pack(kept.permute(self._orders[t]).flatten())
            self._words(t).copy_(packed)
            self.state.thresholds[t] = record.threshold
            self.state.flips[t] = record.flips
            self.k[t] = record.k
        self._set_k(self.k)

    def _set_k(self, k: list[int]) -> None:
        """Takes over counts; masks from elsewhere may prune any number of an N:M weight."""
        self.k = [
            keep.pruned(numel) if keep is not None and count else count
            for count, keep, numel in zip(k, self._patterns, self.state.numels, strict=True)
        ]
        self.state.set_k(self.k)


@dataclass
class Turn:
    """The pruner's work of one optimizer step, for the optimizer to do what it can of it.

    Args:
        index: number of the optimizer.
        groups: those that its steps drive.
        factor: what the selected weights are multiplied by.
        frozen: whether the masks are fixed: then they are applied instead.
        done: the groups whose work is done; the others are left to the pruner's hook.
    """

    index: int
    groups: list[Group]
    factor: float
    frozen: bool
    done: list[Group] = field(default_factory=list)

    def within(self, part: int) -> Group | None:
        """The group of a parameter group, if it has one."""
        for group in self.groups:
            if group.part == part:
                return group
        return None

    def left(self) -> list[Group]:
        """The groups whose work is not done."""
        return [group for group in self.groups if group not in self.done]


class _Moments:
    """The optimizer's tensors per weight, found again only when its state was replaced or grew."""

    def __init__(self) -> None:
        self._source: object = None
        self._signature: tuple[int, int] = (-1, -1)
        self._dicts: list[dict] = []
        self._keys: list[str] = []
        self.odd: list[tuple[int, Tensor]] = []

    def __getstate__(self) -> dict:
        return {"odd": []}

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def refresh(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: list[Tensor],
        home: torch.device,
        orders: list[list[int] | None],
    ) -> None:
        state = optimizer.state
        if self._source is state and self._signature == (len(state), self._entries()):
            return
        # `state` is a defaultdict: asking with [] would create entries and change its state_dict.
        self._dicts = [state.get(p, {}) for p in parameters]
        found: dict[str, list[tuple[int, Tensor]]] = {}
        unset = False
        for t, (parameter, values) in enumerate(zip(parameters, self._dicts, strict=True)):
            for key, value in values.items():
                unset |= value is None
                if (
                    isinstance(value, Tensor)
                    and value.shape == parameter.shape
                    and value.is_floating_point()
                    and value.dim() > 0
                ):
                    found.setdefault(key, []).append((t, value))
        self._keys, self.odd = [], []
        for key, values in found.items():
            if len(values) == len(parameters) and all(
                v.device == home
                and (v if orders[t] is None else v.permute(orders[t])).is_contiguous()
                for t, v in values
            ):
                self._keys.append(key)
            else:
                self.odd += values
        # An entry that is still None becomes a tensor without changing any length.
        self._source = None if unset or self.odd else state
        self._signature = (len(state), self._entries())

    def _entries(self) -> int:
        return sum(map(len, self._dicts))

    def complete(self) -> list[list[Tensor]]:
        """One list per kind of moment, in the order of the weights."""
        return [[values[key] for values in self._dicts] for key in self._keys]


def _count(target: float | Keep, numel: int, ratio: float, final: float) -> int:
    if isinstance(target, Keep):
        # A pattern has no stages in between: it holds as soon as anything is pruned.
        return target.pruned(numel) if ratio > 0 else 0
    # Not target * (ratio / final) throughout: its rounding error could cost or add one weight.
    return ops.num_pruned(numel, ratio if target == final else target * (ratio / final))


def _folds(layer: Layer, order: list[int] | None) -> bool:
    """Whether an N:M weight is channels_last, where the selection reads it as [O, kh * kw * I]."""
    keep = layer.target
    if order is None or not isinstance(keep, Keep) or keep.layout == "flat" or order[:2] == [0, 1]:
        return False
    if order[0] != 0 or order[-1] != 1:
        raise ValueError(
            f"{layer.name}: its weight is neither contiguous nor channels_last in memory, so that "
            "an N:M pattern finds no groups of input channels: replace it by weight.contiguous()"
        )
    return True


def _pointers(tensors: list[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def _memory_order(layer: Layer) -> list[int] | None:
    order = memory_order(layer.weight)
    if order == []:
        raise ValueError(
            f"{layer.name}: its weight is a view with gaps or overlaps in memory: replace it by "
            "weight.contiguous() or exclude the layer"
        )
    return order


def memory_order(x: Tensor) -> list[int] | None:
    """The permutation that makes a tensor contiguous: None if it is, empty if there is none."""
    if x.is_contiguous():
        return None
    order = sorted(range(x.dim()), key=lambda d: -x.stride(d))
    return order if x.permute(order).is_contiguous() else []


def _inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)
