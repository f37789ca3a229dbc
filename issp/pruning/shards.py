"""Buckets of weights that `fully_shard` (FSDP2) has distributed: every rank works on its rows.

In each step the ranks find out together how many of the selected weights each of them has
(shard_selection.py). The rest is the work of a `WeightBucket` of the local shards: shrinking,
masks, masked moments. What concerns whole weights is reduced or gathered when it is asked for, by
calls that all ranks must make.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from issp.nn.selection import Layer
from issp.nn.sharding import is_sharded, local, local_like, sum_over_shards
from issp.ops import reference
from issp.ops.keep import Keep
from issp.pruning.buckets import LayerSize, WeightBucket, with_patterns
from issp.pruning.iterates import iterates, shrink
from issp.pruning.moments import MaskTargets
from issp.pruning.shard_selection import Span, count_selected
from issp.pruning.state import LayerState


class _Shard(Layer):
    """The rows of a layer's weight that this rank has."""

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        return local(super().weight)


class _LocalBucket(WeightBucket):
    """A bucket of shards, none of them empty."""

    def current_weights(self) -> list[Tensor]:
        return list(map(local, super().current_weights()))


class _LocalStates:
    """The state of an optimizer with shards in the place of DTensors."""

    def __init__(self, optimizer: Any, weights: Sequence[Tensor]) -> None:
        self.state: dict[Tensor, dict[str, Any]] = {}
        for weight in weights:
            entries = optimizer.state.get(weight, {})
            self.state[local(weight)] = {
                name: local_like(x, weight) if isinstance(x, Tensor) else x
                for name, x in entries.items()
            }


class ShardedBucket(WeightBucket):
    """A bucket of DTensors that are sharded along their rows over one mesh.

    It overrides all that the pruner calls. What fused optimizers call besides is never reached:
    they leave DTensors to torch.

    Args:
        layers: their order is the order of the state.
        optimizer: number of the optimizer whose steps prune them.

    Attributes:
        mesh: the ranks.

    Raises:
        ValueError: an N:M pattern whose groups would be on several ranks.
    """

    is_one_call = False

    def __init__(self, layers: Sequence[Layer], optimizer: int) -> None:
        self.layers, self.optimizer, self.param_group = list(layers), optimizer, None
        self._parameter_dicts = [layer.module._parameters for layer in layers]
        self.version = 0
        self.weights = self.current_weights()
        first: Any = self.weights[0]
        self.mesh, self._placements = first.device_mesh, first.placements
        self._group = self.mesh.get_group()
        self._kinds = self._kinds_of(self.weights)
        self._shapes = [tuple(w.shape) for w in self.weights]
        self._row_numels = [torch.Size(shape[1:]).numel() for shape in self._shapes]
        # DTensor splits the rows as torch.chunk does.
        self._chunks = [-(-shape[0] // self.mesh.size()) for shape in self._shapes]
        self._spans = [self._span(t) for t in range(len(self.layers))]
        self._patterns = [x.target if isinstance(x.target, Keep) else None for x in layers]
        self._check_patterns()
        self.k = [0] * len(self.layers)
        self._device = first.device
        self._local_k = torch.zeros(len(self.layers), dtype=torch.int64, device=self._device)
        # Numbers of the layers whose shard here is not empty, and of those that are ranked jointly.
        self._present = [t for t, w in enumerate(self.weights) if local(w).numel()]
        self._joint = [t for t, keep in enumerate(self._patterns) if keep is None]
        self._local = self._local_bucket()

    def _span(self, t: int) -> Span:
        """The elements of weight `t` that this rank has."""
        numel = self.weights[t].numel()
        start = min(self.mesh.get_local_rank() * self._chunks[t] * self._row_numels[t], numel)
        return Span(start, start + local(self.weights[t]).numel(), numel)

    def _local_bucket(self) -> WeightBucket | None:
        if not self._present:
            return None
        layers = [self.layers[t] for t in self._present]
        shards = [_Shard(x.name, x.module, x.target, x.aliases, x.dense) for x in layers]
        return _LocalBucket(shards, self.optimizer)

    def _check_patterns(self) -> None:
        for layer, keep, shape, rows in zip(
            self.layers, self._patterns, self._shapes, self._chunks, strict=True
        ):
            if layer.unit is not None:
                raise ValueError(
                    f"{layer.name} is sharded, and units are not ranked over shards: use a Keep "
                    "with v and c, or DistributedDataParallel"
                )
            # The rows of the last rank are the rest: they divide if the whole does.
            if keep is not None and not keep.divides((rows, *shape[1:])):
                raise ValueError(
                    f"{layer.name}: its {shape[0]} rows are sharded by {rows}, which cuts groups "
                    f"of the pattern {keep.name}: choose a pattern that divides the shards, or "
                    "exclude the layer"
                )

    def _present_of(self, values: Sequence[Any]) -> list[Any]:
        return [values[t] for t in self._present]

    def _sum(self, values: Tensor) -> Tensor:
        torch.distributed.all_reduce(values, group=self._group)
        return values

    def _kinds_of(self, weights: Sequence[Any]) -> list[tuple[Any, ...]]:
        return [(getattr(w, "device_mesh", None), w.shape, w.dtype, w.device.type) for w in weights]

    def refresh(self, exact: bool = True) -> bool:
        """See `WeightBucket`; always exact, so that all ranks come to the same answer.

        Raises:
            ValueError: a weight is no DTensor any more.
        """
        weights = self.current_weights()
        for layer, weight in zip(self.layers, weights, strict=True):
            if not is_sharded(weight):
                raise ValueError(
                    f"{layer.name} is not sharded any more (a forward pass was interrupted, or it "
                    "was replaced): run the model once, or call reattach(opt, model)"
                )
        # What all ranks see alike.
        if self._kinds_of(weights) != self._kinds:
            return False
        if any(a is not b for a, b in zip(weights, self.weights, strict=True)):
            self.weights = [layer.weight for layer in self.layers]
            self.version += 1
        return self._local is None or self._local.refresh()

    def set_ratio(self, ratio: float, final: float) -> None:
        """See `WeightBucket`; the counts are those of the whole weights."""
        layers = zip(self.layers, self.weights, strict=True)
        self._set_k([LayerSize.of(x, w).selected(ratio, final) for x, w in layers])

    def _set_k(self, k: list[int]) -> None:
        k = with_patterns(k, self._patterns, [w.numel() for w in self.weights])
        if k == self.k:
            return
        self.k = k
        # Groups of a pattern lie within a shard; the counts of all others follow in each step.
        numels = [local(w).numel() for w in self.weights]
        self._local_k.copy_(
            torch.tensor(with_patterns(k, self._patterns, numels), dtype=torch.int64, device="cpu")
        )

    @torch.no_grad()
    def shrink(self, factor: float, found_inf: Tensor | None = None) -> None:
        """Selects anew over all shards and shrinks the own ones; all ranks must call it."""
        joint = [t for t in self._joint if self.k[t]]
        if joint:
            shards = [local(self.weights[t]) for t in joint]
            spans = [self._spans[t] for t in joint]
            k = [self.k[t] for t in joint]
            self._local_k[joint] = count_selected(shards, spans, k, self._group)
        if self._local is not None:
            self._local.state.k.copy_(self._local_k[self._present])
            self._local.shrink(factor, found_inf)
            torch.autograd.graph.increment_version(self.weights)

    def shrink_iterates(
        self, optimizers: Sequence[Any], factor: float, found_inf: Tensor | None
    ) -> None:
        """See `WeightBucket`; of the shards of this rank."""
        masks = self._local_masks()
        for t, x in iterates(optimizers, self.weights):
            shrink(local(x), masks[t], factor, found_inf)

    def clear_flips(self) -> None:
        """See `WeightBucket`."""
        if self._local is not None:
            self._local.clear_flips()

    def regularize(self, lambdas: Sequence[float] | Sequence[Tensor], scale: Tensor | None) -> None:
        """Methods with a penalty are refused when they are attached."""
        raise NotImplementedError("penalties of sharded weights")

    def _local_states(self, optimizers: Sequence[Any]) -> list[_LocalStates]:
        weights = self._present_of(self.weights)
        return [_LocalStates(optimizer, weights) for optimizer in optimizers]

    def mask_targets(
        self, optimizers: Sequence[Any], averages: list[Tensor] | None = None, exact: bool = True
    ) -> MaskTargets:
        """See `WeightBucket`; the targets are shards."""
        shards = None if averages is None else self._local_averages(averages)
        if self._local is None:
            return MaskTargets([], [])
        return self._local.mask_targets(self._local_states(optimizers), shards, exact)

    def check_averages(self, averages: list[Tensor]) -> None:
        """Raises ValueError for an average that cannot be masked."""
        shards = self._local_averages(averages)
        if self._local is not None:
            self._local.check_averages(shards)

    def _local_averages(self, averages: list[Tensor]) -> list[Tensor]:
        for layer, weight, average in zip(self.layers, self.weights, averages, strict=True):
            if not is_sharded(average) or is_sharded(local_like(average, weight)):
                raise ValueError(
                    f"ema: the average of {layer.name} is not distributed as its weight is: "
                    "average the sharded parameters, or a copy of the model that is sharded alike"
                )
        return [local(average) for average in self._present_of(averages)]

    def unmasked_states(self, optimizers: Sequence[Any]) -> dict[str, str]:
        """See `WeightBucket`; of the shards of this rank."""
        if self._local is None:
            return {}
        return self._local.unmasked_states(self._local_states(optimizers))

    def apply_masks(self, targets: MaskTargets) -> None:
        """Writes zeros into the shards of this rank."""
        if self._local is not None:
            self._local.apply_masks(targets)
            torch.autograd.graph.increment_version(self.weights)

    def _local_masks(self) -> list[Tensor]:
        """The masks of all shards here, those of empty ones included."""
        masks = [torch.ones_like(local(w), dtype=torch.bool) for w in self.weights]
        if self._local is not None:
            for t, mask in zip(self._present, self._local.masks(), strict=True):
                masks[t] = mask
        return masks

    def masks(self) -> list[Tensor]:
        """Bool DTensors, sharded as the weights are, True = kept; nothing is communicated."""
        from torch.distributed.tensor import DTensor

        return [
            DTensor.from_local(mask, self.mesh, self._placements, shape=w.shape, stride=w.stride())
            for mask, w in zip(self._local_masks(), self.weights, strict=True)
        ]

    def num_pruned(self) -> list[int]:
        """See `WeightBucket`; a reduction."""
        return self._sum_counts([int((~mask).sum()) for mask in self._local_masks()])

    def _sum_counts(self, counts: list[int]) -> list[int]:
        return sum_over_shards(self.weights, counts)

    def thresholds(self) -> list[float]:
        """See `WeightBucket`; a reduction."""
        return self._thresholds().tolist()

    def _thresholds(self) -> Tensor:
        """The largest local ones by key, [T]: NaN is above all others, as in a single process."""
        dtype = self.weights[0].dtype
        keys = torch.zeros(len(self.layers), dtype=torch.int64, device=self._device)
        if self._local is not None:
            keys[self._present] = reference.key(self._local.state.thresholds).long()
        torch.distributed.all_reduce(keys, torch.distributed.ReduceOp.MAX, group=self._group)
        return keys.to(reference.INTEGER[dtype]).view(dtype)

    def flips(self) -> list[int]:
        """See `WeightBucket`; a reduction."""
        flips = torch.zeros_like(self._local_k)
        if self._local is not None:
            flips[self._present] = self._local.state.flips
        return self._sum(flips).tolist()

    def is_ranked(self) -> list[bool]:
        """See `WeightBucket`; a reduction, so that all ranks come to the same answer."""
        return (~self._thresholds().isnan()).tolist()

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """See `WeightBucket`; masks are DTensors sharded as the weights are, or whole tensors."""
        shards = [self._rows(t, mask) for t, mask in enumerate(masks)]
        if self._local is not None:
            self._local.set_masks(self._present_of(shards))
        self._set_k(self._sum_counts([int((~shard).sum()) for shard in shards]))

    def _rows(self, t: int, mask: Tensor) -> Tensor:
        """The rows of this rank, of the mask of weight `t`."""
        if is_sharded(mask):
            return local(mask)
        start = min(self.mesh.get_local_rank() * self._chunks[t], mask.shape[0])
        return mask[start : start + self._chunks[t]].to(self._device)

    def layer_states(self) -> dict[str, LayerState]:
        """States of the whole weights by layer name, on every rank; a gathering."""
        thresholds, flips, masks = self._thresholds(), self.flips(), self._gathered_masks()
        return {
            layer.name: LayerState(
                self._shapes[t], self.k[t], thresholds[t], flips[t], reference.pack(masks[t])
            )
            for t, layer in enumerate(self.layers)
        }

    def _gathered_masks(self) -> list[Tensor]:
        """The flat masks of the whole weights, by one gathering of their bits."""
        sizes = [rows * n for rows, n in zip(self._chunks, self._row_numels, strict=True)]
        padded = torch.zeros(sum(sizes), dtype=torch.bool, device=self._device)
        for part, mask in zip(padded.split(sizes), self._local_masks(), strict=True):
            part[: mask.numel()] = mask.flatten()
        words = reference.pack(padded)
        gathered = [torch.empty_like(words) for _ in range(self.mesh.size())]
        torch.distributed.all_gather(gathered, words, group=self._group)
        by_rank = [reference.unpack(x, padded.numel()).split(sizes) for x in gathered]
        return [
            torch.cat([parts[t] for parts in by_rank])[: w.numel()]
            for t, w in enumerate(self.weights)
        ]

    def load_layer_states(self, states: Mapping[str, LayerState]) -> None:
        """See `WeightBucket`; the states are those of the whole weights, the same on every rank."""
        own = {t: states[x.name] for t, x in enumerate(self.layers) if x.name in states}
        self._check_shapes(own)
        counts, shards = list(self.k), {}
        for t, state in own.items():
            numel = self.weights[t].numel()
            kept = reference.unpack(state.mask.to(self._device), numel).view(self._shapes[t])
            shard = self._rows(t, kept)
            # One rank has the flips of all, so that their sum is right.
            flips = state.flips if self.mesh.get_local_rank() == 0 else 0
            shards[self.layers[t].name] = state._replace(
                shape=tuple(shard.shape),
                k=int((~shard).sum()),
                flips=flips,
                mask=reference.pack(shard.flatten()),
            )
            counts[t] = state.k
        if self._local is not None:
            self._local.load_layer_states(shards)
        self._set_k(counts)
