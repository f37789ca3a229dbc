"""The pruned weights in buckets: one optimizer, device and dtype each, one op call per step."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from issp import ops
from issp.nn import sharding
from issp.nn.names import named_modules
from issp.nn.selection import Layer
from issp.ops import ShrinkState, reference
from issp.ops.keep import Keep, Unit
from issp.ops.pruning import write_zeros_
from issp.ops.schemas import mask_words
from issp.pruning.ema import EMAWeights
from issp.pruning.iterates import iterates, shrink
from issp.pruning.memory_order import (
    ContiguousViews,
    inverse,
    memory_order,
    pointers,
    same_objects,
)
from issp.pruning.moments import MaskTargets, OptimizerMoments, look_up
from issp.pruning.prune_step import prunes_within_step
from issp.pruning.state import LayerState

T = TypeVar("T")
# Of so many weights the memory is compared in every step; of more, of a part of them by turns.
_COMPARED = 64


class WeightBucket:
    """Weights that share an optimizer, a device and a dtype, with and without patterns.

    Args:
        layers: their order is the order of the state.
        optimizer: number of the optimizer whose steps prune them.
        param_group: number of the parameter group that has all of them; None where it does not
            matter, because the optimizer does not prune within its step.

    Attributes:
        weights: as `refresh` has found them.
        flattened: which of them the selection takes as [O, kh * kw * I], see `selection_views`.
        version: how often `refresh` has accepted other memory.
        state: masks, counts and thresholds, as the ops take them.
        is_one_call: its step is one call of an op, which writes nothing if it refuses a weight.

    Raises:
        ValueError: a weight that no permutation of its dimensions makes contiguous, or one with a
            pattern or units in an order other than contiguous and channels_last.
    """

    is_one_call = True

    def __init__(
        self, layers: Sequence[Layer], optimizer: int, param_group: int | None = None
    ) -> None:
        self.layers, self.optimizer, self.param_group = list(layers), optimizer, param_group
        self._parameter_dicts = [layer.module._parameters for layer in layers]
        self._orders = [_memory_order(layer) for layer in layers]
        self._patterns = [x.pattern for x in layers]
        self.flattened = [
            _is_flattened(x, order) for x, order in zip(layers, self._orders, strict=True)
        ]
        self._all_contiguous = not any(self._orders)
        self._any_flattened = any(self.flattened)
        self.weights = self.current_weights()
        self._views = ContiguousViews(self._orders, self.flattened)
        self.version = self._part = 0
        self._pointers = pointers(self.weights)
        self._shapes = [tuple(w.shape) for w in self.weights]
        self._sizes = [LayerSize.of(x, w) for x, w in zip(layers, self.weights, strict=True)]
        self.k = [0] * len(self.weights)
        views = self.contiguous_views(self.weights)
        self._view_shapes = [v.shape for v in views]
        self.state = ShrinkState(self.selection_views(views), self.k, self._patterns)
        self._num_words = [mask_words(n) for n in self.state.numels]
        self._moments = OptimizerMoments()

    def current_weights(self) -> list[Tensor]:
        """The weights as they are now: loading and `to` may have replaced them.

        Raises:
            ValueError: a layer has lost its weight, to a parametrization for instance.
        """
        try:
            return [parameters["weight"] for parameters in self._parameter_dicts]  # type: ignore[misc]
        except KeyError:
            return [layer.weight for layer in self.layers]  # which says what is wrong

    def contiguous_views(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors as the ops take them: contiguous (channels_last is permuted, not copied)."""
        if self._all_contiguous:
            return tensors
        with torch.no_grad():
            return [
                x if order is None else x.permute(order)
                for x, order in zip(tensors, self._orders, strict=True)
            ]

    def selection_views(self, views: list[Tensor]) -> list[Tensor]:
        """The contiguous views as the selection takes them.

        Patterns and units group input channels, dimension 1 of [O, I, ...]. In a channels_last
        weight, [O, kh, kw, I] in memory, M of them are adjacent: [O, kh * kw * I] has the same
        groups.
        """
        if not self._any_flattened:
            return views
        with torch.no_grad():
            return [
                v.flatten(1) if flat else v for v, flat in zip(views, self.flattened, strict=True)
            ]

    def refresh(self, exact: bool = True) -> bool:
        """Accepts weights whose memory is another than before, if the state suits them.

        Args:
            exact: False: of many weights the memory of some is compared, of others the next time.
                The ops use the memory that a weight has, and refuse what the state does not suit.

        Returns:
            False if it does not: another device, dtype, shape or memory order.

        Raises:
            ValueError: a weight that cannot be pruned any more: sharded since, or replaced.
        """
        weights = self._latest_weights()
        part = self._next_part() if weights is self.weights and not exact else slice(None)
        if pointers(weights[part]) == self._pointers[part]:
            self.weights = weights
            return True
        weights = [layer.weight for layer in self.layers]
        present = pointers(weights)
        kinds = [(w.dtype, tuple(w.shape)) for w in weights]
        expected = [(self.state.thresholds.dtype, shape) for shape in self._shapes]
        if kinds != expected or not self._is_regular(weights):
            return False
        self.weights, self._pointers = weights, present
        self.version += 1
        return True

    def _latest_weights(self) -> list[Tensor]:
        """`current_weights`, the very list of `refresh` if none has been replaced since."""
        weights = self.current_weights()
        return self.weights if same_objects(weights, self.weights) else weights

    def _next_part(self) -> slice:
        parts = 1 + (len(self.weights) - 1) // _COMPARED
        self._part = (self._part + 1) % parts
        return slice(self._part, None, parts)

    def set_ratio(self, ratio: float, final: float) -> None:
        """Sets how many weights are selected; the device is written only when a number changes.

        Args:
            ratio: sparsity of the schedule now.
            final: sparsity of the schedule at its end; the target of a layer is scaled by
                ratio / final.
        """
        counts = {size: size.selected(ratio, final) for size in set(self._sizes)}
        k = [counts[size] for size in self._sizes]
        if k != self.k:
            self.state.set_k(k)
            self.k = k

    def shrink(self, factor: float, found_inf: Tensor | None = None) -> None:
        """Selects anew and shrinks the weights that the latest `refresh` has found.

        The device skips it where `found_inf` is not 0.
        """
        device = self.state.k.device
        if found_inf is not None and found_inf.device != device:
            found_inf = found_inf.to(device, non_blocking=True)
        ops.soft_shrink_(self._views.of(self.weights), self.state, factor, found_inf)

    def shrink_iterates(
        self, optimizers: Sequence[Any], factor: float, found_inf: Tensor | None
    ) -> None:
        """Shrinks what schedule-free optimizers keep beside weights that have just been shrunk."""
        found = list(iterates(optimizers, self.weights))
        kept = self.masks() if found else []
        for t, x in found:
            shrink(x, kept[t], factor, found_inf)

    def regularize(self, lambdas: Sequence[float] | Sequence[Tensor], scale: Tensor | None) -> None:
        """Adds an L2 penalty to the gradients: g += lambda * w where the mask says unimportant.

        Weights without a gradient are left out.

        Args:
            lambdas: one per layer; or for each layer a tensor in the weight's shape, of all weights
                whatever the mask says.
            scale: AMP's scale of the gradients, one element; None: 1.
        """
        weights = self.current_weights()
        if lambdas and isinstance(lambdas[0], Tensor):
            self._add_penalties([x for x in lambdas if isinstance(x, Tensor)], weights, scale)
            return
        dtype = torch.float64 if self.state.thresholds.dtype == torch.float64 else torch.float32
        factors = torch.tensor(lambdas, dtype=dtype, device=self.state.k.device)
        if scale is not None:
            factors *= scale.to(factors.device)
        grads = [_regular_grad(weight) for weight in weights]
        views = self.contiguous_views([w.detach() for w in weights])
        ops.regularize_(self.contiguous_views(grads), views, factors, self.state)

    @torch.no_grad()
    def _add_penalties(
        self, lambdas: Sequence[Tensor], weights: Sequence[Tensor], scale: Tensor | None
    ) -> None:
        for factor, weight in zip(lambdas, weights, strict=True):
            if weight.grad is not None:
                penalty = factor * weight
                weight.grad += penalty if scale is None else penalty * scale.to(weight.device)

    def mask_targets(
        self,
        optimizers: Sequence[Any],
        averages: list[Tensor] | None = None,
        exact: bool = True,
    ) -> MaskTargets:
        """What `apply_masks` writes: weights, the optimizers' moments, one average per weight.

        Args:
            optimizers: the states of these.
            averages: one per weight.
            exact: see `OptimizerMoments.targets`; False: the weights are those that the latest
                `refresh` has found.

        Raises:
            ValueError: an average that cannot be masked.
        """
        weights = self._latest_weights() if exact else self.weights
        targets = self._moments.targets(optimizers, weights, self._orders, exact)
        if averages is None:
            return targets
        targets = targets.copy()
        self._add_averages(targets, averages)
        return targets

    def check_averages(self, averages: list[Tensor]) -> None:
        """Raises ValueError for an average that cannot be masked."""
        self._add_averages(MaskTargets(self.current_weights(), self._orders), averages)

    def _add_averages(self, targets: MaskTargets, averages: list[Tensor]) -> None:
        for t in targets.add(dict(enumerate(averages))):
            raise ValueError(
                f"ema: the average of {self.layers[t].name} cannot be masked: it must be a strided "
                "float tensor with memory of its own"
            )

    def unmasked_states(self, optimizers: Sequence[Any]) -> dict[str, str]:
        """Entries of the optimizers' states that look like moments and cannot be masked: why."""
        # Not kept: some optimizers replace their moments, and old ones would stay in memory.
        return look_up(optimizers, self.current_weights(), self._orders)[1]

    def apply_masks(self, targets: MaskTargets) -> None:
        """Writes zeros where the mask says pruned, in one call if memory orders allow."""
        write_zeros_(targets.views(), self.state)
        if targets.irregular:
            kept = self.masks()
            with torch.no_grad():
                for t, tensor in targets.irregular:
                    tensor.masked_fill_(~kept[t].to(tensor.device), 0)

    def _is_regular(self, tensors: list[Tensor]) -> bool:
        """Whether the tensors are whole, with the device and the memory orders of the weights."""
        device = self.state.k.device
        return all(
            x.device == device and v.is_contiguous() and not sharding.is_sharded(x)
            for x, v in zip(tensors, self.contiguous_views(tensors), strict=True)
        )

    def masks(self) -> list[Tensor]:
        """Bool masks in the weights' shapes, True = kept."""
        masks = zip(self.state.masks(), self._orders, self._view_shapes, strict=True)
        return [
            mask if order is None else mask.view(shape).permute(inverse(order))
            for mask, order, shape in masks
        ]

    def num_pruned(self) -> list[int]:
        """How many weights of each layer the masks prune; waits for the device."""
        return [int((~mask).sum()) for mask in self.masks()]

    def thresholds(self) -> list[float]:
        """Magnitude of the last selected weight of each layer; waits for the device."""
        return self.state.thresholds.tolist()

    def flips(self) -> list[int]:
        """Mask bits of each layer that the latest step changed; waits for the device."""
        return self.state.flips.tolist()

    def clear_flips(self) -> None:
        """Sets the counts of flips to 0, without waiting for the device."""
        self.state.flips.zero_()

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """Sets masks as if a step had selected them: bool in the weights' shapes, True = kept."""
        views = self.contiguous_views(list(masks))
        self.state.set_masks(self.selection_views([v.contiguous() for v in views]))
        self.state.thresholds.zero_()
        self._set_k([int((~mask).sum()) for mask in masks])

    def is_ranked(self) -> list[bool]:
        """Which weights have been ranked or have got masks; waits for the device."""
        return (~self.state.thresholds.isnan()).tolist()

    def layer_states(self) -> dict[str, LayerState]:
        """Copies of masks, counts and thresholds, by layer name."""
        flips, thresholds = self.flips(), self.state.thresholds.clone()
        words, states = self.state.packed.split(self._num_words), {}
        for t, layer in enumerate(self.layers):
            packed, order = words[t].clone(), self._orders[t]
            if order is not None:
                kept = reference.unpack(packed, self.state.numels[t]).view(self._view_shapes[t])
                packed = reference.pack(kept.permute(inverse(order)).flatten())
            shape, k = self._shapes[t], self.k[t]
            states[layer.name] = LayerState(shape, k, thresholds[t], flips[t], mask=packed)
        return states

    def load_layer_states(self, states: Mapping[str, LayerState]) -> None:
        """Takes over the states of its layers; a layer without one stays as it is.

        Raises:
            ValueError: a weight has another shape than its state; nothing has been changed.
        """
        own = {t: states[x.name] for t, x in enumerate(self.layers) if x.name in states}
        self._check_shapes(own)
        words = self.state.packed.split(self._num_words)
        for t, state in own.items():
            packed, order = state.mask.to(self.state.k.device), self._orders[t]
            if order is not None:
                kept = reference.unpack(packed, self.state.numels[t]).view(self._shapes[t])
                packed = reference.pack(kept.permute(order).flatten())
            words[t].copy_(packed)
            self.state.thresholds[t] = state.threshold
            self.state.flips[t] = state.flips
            self.k[t] = state.k
        self._set_k(self.k)

    def _check_shapes(self, states: Mapping[int, LayerState]) -> None:
        for t, state in states.items():
            if self._shapes[t] != state.shape:
                raise ValueError(
                    f"{self.layers[t].name}: the mask has shape {state.shape} but the weight "
                    f"{self._shapes[t]}: attach anew"
                )

    def _set_k(self, k: list[int]) -> None:
        self.k = with_patterns(k, self._patterns, self.state.numels)
        self.state.set_k(self.k)


class Owner(NamedTuple):
    """Who trains a weight.

    Args:
        optimizer: number of the optimizer.
        param_group: number of its parameter group; None if the optimizer does not prune within its
            step.
    """

    optimizer: int
    param_group: int | None


class WeightBuckets:
    """All layers to prune, and the buckets of those that are pruned now; iterates over the buckets.

    Weights of one bucket share an optimizer, a device and a dtype. Where the optimizer prunes
    within its step (`issp.optim`) they also share a parameter group, since that is what it updates
    in one pass.

    A layer becomes active once its weight requires a gradient and belongs to an optimizer. It stays
    active from then on: its mask must hold when the weight is no longer trained. Layers marked
    dense are never active.

    Args:
        layers: all layers to prune, in the model's order.
        optimizers: may be empty; then requiring a gradient is enough.
        wrappers: optimizers around them that keep weights or moments of their own.
        sharded: makes the bucket of some DTensors from layers and the number of the optimizer.

    Attributes:
        prunable: the layers that are not marked dense.
        active: names of the active layers.

    Raises:
        ValueError: none of the weights is trained.
    """

    def __init__(
        self,
        layers: list[Layer],
        optimizers: list[Optimizer],
        wrappers: list[Any],
        sharded: Callable[[Sequence[Layer], int], WeightBucket],
    ) -> None:
        self.layers, self._sharded = layers, sharded
        self.prunable = [layer for layer in layers if not layer.dense]
        self.optimizers, self.wrappers = optimizers, wrappers
        self.active: set[str] = set()
        self._buckets: list[WeightBucket] = []
        self._released: list[WeightBucket] = []
        self.rebuild({})

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "wrappers": []}  # some cannot be copied, nor can their hooks

    def __iter__(self) -> Iterator[WeightBucket]:
        return iter(self._buckets)

    def __len__(self) -> int:
        return len(self._buckets)

    @property
    def is_one_call(self) -> bool:
        """Whether a step is one call of an op, which writes nothing if it refuses a weight."""
        return [bucket.is_one_call for bucket in self._buckets] == [True]

    def refresh(self, exact: bool = True) -> bool:
        """Notices weights that moved (device, dtype, memory) or have come to be trained.

        Args:
            exact: see `WeightBucket.refresh`; False only counts where `is_one_call` holds.

        Returns:
            Whether the buckets were formed anew.
        """
        # A list: every bucket is refreshed, also behind the first one that does not suit.
        exact = exact or not self.is_one_call
        if all([x.refresh(exact) for x in self._buckets]) and not self._newly_trainable():
            return False
        self.rebuild(self.layer_states())
        return True

    def _newly_trainable(self) -> bool:
        """Whether a layer that is not active yet is trained now."""
        if len(self.active) == len(self.prunable):
            return False
        inactive = [x for x in self.prunable if x.name not in self.active]
        if not any(layer.weight.requires_grad for layer in inactive):
            return False
        owners = self._owners()
        return any(owners[layer.name] is not None for layer in inactive)

    def _owners(self) -> dict[str, Owner | None]:
        """Who trains each layer; None for layers that nobody trains."""
        by_id = {
            id(parameter): Owner(index, number if prunes_within_step(optimizer) else None)
            for index, optimizer in enumerate(self.optimizers)
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        owners = {}
        for layer in self.prunable:
            owner = by_id.get(id(layer.weight)) if self.optimizers else Owner(0, None)
            owners[layer.name] = owner if layer.weight.requires_grad else None
        return owners

    def weights(self) -> list[nn.Parameter]:
        """The weights of the layers that are not marked dense, as far as there still are any.

        It never raises: every pruner is asked after the step of every optimizer.
        """
        weights = [layer.module._parameters.get("weight") for layer in self.prunable]
        return [weight for weight in weights if weight is not None]

    def rebuild(
        self, states: Mapping[str, LayerState], active: Collection[str] | None = None
    ) -> None:
        """Forms the buckets anew.

        Args:
            states: masks and counts by layer name; a layer without them starts with all kept.
            active: the layers that stay active, None: those that are now. Layers that have come to
                be trained become active in any case.

        Raises:
            ValueError: none of the weights is trained, or a weight has another shape than its
                state; nothing has been changed.
        """
        active = self.active if active is None else active
        owners = self._owners()
        parts: dict[tuple[Owner, Any, torch.device, torch.dtype], list[Layer]] = {}
        released = {layer.name for bucket in self._released for layer in bucket.layers}
        for layer in self.prunable:
            owner, weight = owners[layer.name], layer.weight
            if layer.name not in released and (owner is not None or layer.name in active):
                owner = owner or Owner(0, None)
                mesh = getattr(weight, "device_mesh", None)
                if mesh is not None:
                    owner = Owner(owner.optimizer, None)  # no optimizer prunes shards in its step
                key = (owner, mesh, weight.device, weight.dtype)
                parts.setdefault(key, []).append(layer)
        if not released and all(owner is None for owner in owners.values()):
            if any(sharding.is_sharded(layer.weight) for layer in self.prunable):
                raise ValueError(
                    "no weight to prune is trained: fully_shard replaces the parameters, so build "
                    "the optimizer after it, and attach with that one (or call reattach(opt))"
                )
            raise ValueError(
                "no weight to prune is trained: the weights must require gradients and be in the "
                "optimizer (of a copied model, pass its own optimizer)"
            )
        buckets = [
            WeightBucket(layers, *owner) if mesh is None else self._sharded(layers, owner.optimizer)
            for (owner, mesh, _, _), layers in parts.items()
        ]
        for bucket in buckets:
            bucket.load_layer_states(states)
        self._buckets = buckets
        self.active = {layer.name for bucket in buckets for layer in bucket.layers} | released

    def release(self, names: Collection[str]) -> None:
        """Leaves layers with fixed masks to their sparse form; what is known of them stays."""
        states = self.layer_states()
        for bucket in self:
            layers = [layer for layer in bucket.layers if layer.name in names]
            if layers:
                released = WeightBucket(layers, bucket.optimizer, bucket.param_group)
                released.load_layer_states(states)
                self._released.append(released)
        self.rebuild(states)

    def take_back(self) -> None:
        """Ends `release`; the layers must be dense again."""
        states, self._released = self.layer_states(), []
        self.rebuild(states)

    def rebind(
        self, model: nn.Module | None, optimizers: list[Optimizer], wrappers: list[Any]
    ) -> None:
        """Goes on with a copy of the model (None: the same) and other optimizers.

        Raises:
            ValueError: the model lacks a layer, or no weight is trained; nothing has been changed.
        """
        states = self.layer_states()
        before = (self.optimizers, self.wrappers, [layer.module for layer in self.layers])
        if model is not None:
            self._set_modules(model)
        self.optimizers, self.wrappers = optimizers, wrappers
        try:
            self.rebuild(states)
        except Exception:
            self.optimizers, self.wrappers, modules = before
            for layer, module in zip(self.layers, modules, strict=True):
                layer.module = module
            raise

    def _set_modules(self, model: nn.Module) -> None:
        modules = named_modules(model)
        for layer in self.layers:
            weight = getattr(modules.get(layer.name), "_parameters", {}).get("weight")
            if weight is None or weight.shape != layer.weight.shape:
                raise ValueError(
                    f"the model has no layer {layer.name} with a weight of shape "
                    f"{tuple(layer.weight.shape)}: attach anew"
                )
        for layer in self.layers:
            layer.module = modules[layer.name]

    def layer_states(self) -> dict[str, LayerState]:
        """Copies of masks, counts and thresholds of every active layer."""
        return {name: x for bucket in self.all() for name, x in bucket.layer_states().items()}

    def column(self, read: Callable[[WeightBucket], Iterable[T]]) -> dict[str, T]:
        """By name of the active layers what `read` returns of a bucket's layers, in their order."""
        return {x.name: v for b in self.all() for x, v in zip(b.layers, read(b), strict=True)}

    def all(self) -> list[WeightBucket]:
        """The buckets, and those of layers that train their kept weights alone."""
        return [*self._buckets, *self._released]

    def notes(self) -> dict[str, str]:
        """For every layer that is not active, why not."""
        return {
            layer.name: layer.dense
            or ("not in the optimizer" if layer.weight.requires_grad else "requires_grad is False")
            for layer in self.layers
            if layer.name not in self.active
        }

    def warn_missing(self) -> None:
        """Warns of layers that no optimizer has; to be called by what `attach` calls."""
        missing = [name for name, note in self.notes().items() if note == "not in the optimizer"]
        if missing:
            names = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            warnings.warn(
                f"{len(missing)} weights to prune are not in the optimizer and stay dense until "
                f"add_param_group brings them: {names}; exclude them to silence this",
                stacklevel=4,
            )

    def check_maskable(self, ema: EMAWeights | None) -> None:
        """Refuses what `fix_masks` would refuse later."""
        if ema is not None:
            for bucket in self:
                bucket.check_averages(ema.tensors(bucket.layers))

    def fix_masks(self, ema: EMAWeights | None) -> None:
        """Masks all weights, moments and averages, by the masks as they are.

        Layers that no step has selected yet are selected first, at the full sparsity.

        Raises:
            ValueError: see `WeightBucket.mask_targets`; nothing has been changed.
        """
        targets = self._mask_targets(self, ema)
        self.rank(self.unranked())
        for bucket, tensors in targets:
            bucket.apply_masks(tensors)

    def unranked(self) -> set[str]:
        """Names of the active layers that no step has selected yet and that have no other masks."""
        ranked = self.column(lambda bucket: bucket.is_ranked())
        return {name for name, is_ranked in ranked.items() if not is_ranked}

    def rank(self, names: Collection[str]) -> None:
        """Selects the smallest weights of active layers, at the full sparsity, and keeps them."""
        for bucket in self:
            layers = [layer for layer in bucket.layers if layer.name in names]
            if layers:
                ranking = type(bucket)(layers, bucket.optimizer)
                ranking.set_ratio(1.0, 1.0)
                ranking.shrink(1.0)
                bucket.load_layer_states(ranking.layer_states())

    def set_masks(self, masks: Mapping[str, Tensor]) -> None:
        """Sets masks of active layers: bool in the weights' shapes, True = kept."""
        for bucket in self:
            layers = [layer for layer in bucket.layers if layer.name in masks]
            if layers:
                before = dict(zip([x.name for x in bucket.layers], bucket.masks(), strict=True))
                chosen = type(bucket)(layers, bucket.optimizer)
                chosen.set_masks([masks[layer.name] for layer in layers])
                flips = {x.name: int((masks[x.name] ^ before[x.name]).sum()) for x in layers}
                states = chosen.layer_states().items()
                bucket.load_layer_states({n: x._replace(flips=flips[n]) for n, x in states})

    def apply_masks(self, buckets: Iterable[WeightBucket], exact: bool = True) -> None:
        """Writes zeros into pruned weights and their optimizer moments.

        Args:
            buckets: those of the weights.
            exact: see `WeightBucket.mask_targets`; False only counts where `is_one_call` holds.
        """
        exact = exact or not self.is_one_call
        for bucket, tensors in self._mask_targets(buckets, None, exact):
            bucket.apply_masks(tensors)

    def _mask_targets(
        self, buckets: Iterable[WeightBucket], ema: EMAWeights | None, exact: bool = True
    ) -> list[tuple[WeightBucket, MaskTargets]]:
        return [
            (
                bucket,
                bucket.mask_targets(
                    self._optimizers_of(bucket),
                    None if ema is None else ema.tensors(bucket.layers),
                    exact,
                ),
            )
            for bucket in buckets
        ]

    def unmasked_states(self, index: int) -> dict[str, str]:
        """Entries in the state of optimizer `index` that the masks will not reach, and why."""
        return {
            name: why
            for bucket in self
            if bucket.optimizer == index
            for name, why in bucket.unmasked_states(self._optimizers_of(bucket)).items()
        }

    def shrink_iterates(
        self, buckets: Iterable[WeightBucket], factor: float, found_inf: Tensor | None
    ) -> None:
        """Shrinks what schedule-free optimizers keep beside weights that have just been shrunk."""
        for bucket in buckets:
            bucket.shrink_iterates(self._optimizers_of(bucket), factor, found_inf)

    def _optimizers_of(self, bucket: WeightBucket) -> list[Any]:
        """The optimizer of a bucket, and the wrappers around all of them."""
        return [*self.optimizers[bucket.optimizer : bucket.optimizer + 1], *self.wrappers]


@torch.no_grad()
def smallest(layer: Layer, scores: Tensor) -> Tensor:
    """The mask that a layer gets where its weights are ranked by other numbers, True = kept.

    Args:
        layer: its target says how many are pruned, and in which pattern or units.
        scores: [...] float32 in the weight's shape; the smallest magnitudes are pruned.
    """
    state = ShrinkState([scores], [LayerSize.of(layer, scores).selected(1.0, 1.0)], [layer.pattern])
    ops.soft_shrink_([scores], state, 1.0)
    return state.masks()[0]


def _regular_grad(weight: Tensor) -> Tensor:
    """The gradient of a weight, of its dtype and memory order; without one, zeros of no effect."""
    grad = weight.grad
    if grad is None:
        return torch.zeros_like(weight.detach())
    is_regular = grad.layout == torch.strided and grad.dtype == weight.dtype
    if is_regular and grad.stride() == weight.stride():
        return grad
    regular = torch.empty_like(weight.detach()).copy_(grad.to_dense() if grad.is_sparse else grad)
    weight.grad = regular
    return regular


class LayerSize(NamedTuple):
    """What decides how many of a layer's weights are selected."""

    target: float | Keep
    unit: Unit | None
    numel: int

    @classmethod
    def of(cls, layer: Layer, weight: Tensor) -> LayerSize:
        """That of a layer, with its weight."""
        return cls(layer.target, layer.unit, weight.numel())

    def selected(self, ratio: float, final: float) -> int:
        """How many weights are selected where the schedule is at `ratio` of `final`."""
        target = self.target
        if isinstance(target, Keep):
            # A pattern has no stages in between: it holds as soon as anything is pruned.
            return target.pruned(self.numel) if ratio > 0 else 0
        # Not target * (ratio / final) throughout: its rounding error could cost or add one weight.
        share = ratio if target == final else target * (ratio / final)
        size = self.unit.size if self.unit else 1
        return ops.num_pruned(self.numel // size, share) * size


def with_patterns(
    k: Sequence[int], patterns: Sequence[Keep | Unit | None], numels: Sequence[int]
) -> list[int]:
    """Counts as the ops take them: masks from elsewhere may prune any number of weights."""
    return [
        by.pruned(numel)
        if isinstance(by, Keep) and count
        else -(-count // by.size) * by.size
        if isinstance(by, Unit)
        else count
        for count, by, numel in zip(k, patterns, numels, strict=True)
    ]


def _is_flattened(layer: Layer, order: list[int] | None) -> bool:
    """Whether a weight with a pattern is channels_last: the selection reads [O, kh * kw * I]."""
    by = layer.pattern
    if order is None or by is None or order[:2] == [0, 1]:
        return False
    if isinstance(by, Keep) and by.layout == "flat":
        return False
    if order[0] != 0 or order[-1] != 1:
        raise ValueError(
            f"{layer.name}: its weight is neither contiguous nor channels_last in memory, so that "
            "a pattern finds no groups of input channels: replace it by weight.contiguous()"
        )
    return True


def _memory_order(layer: Layer) -> list[int] | None:
    order = memory_order(layer.weight)
    if order == []:
        raise ValueError(
            f"{layer.name}: its weight is a view with gaps or overlaps in memory: replace it by "
            "weight.contiguous() or exclude the layer"
        )
    return order
