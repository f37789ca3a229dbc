"""Sparse fine-tuning: layers with fixed masks store and train their kept weights alone.

Gradients and moments shrink with the weights, the parameters stay the same objects under the same
names, and everything that is saved stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from issp.nn import autotune
from issp.nn.report import LayerReport
from issp.nn.selection import Layer
from issp.nn.sharding import is_sharded
from issp.nn.sparse_training import (
    KeptPositions,
    SparseTrainingLayer,
    replace_data_,
    to_dense_,
    to_sparse_,
)
from issp.pruning import data_parallel, layer_choice
from issp.pruning.buckets import WeightBuckets
from issp.pruning.ema import EMAWeights
from issp.pruning.kept_states import DenseStateDicts, change_states, check_elementwise
from issp.pruning.masked_layer import MaskedLayer


@dataclass(frozen=True)
class Recorded:
    """Which layers trained sparse in a saved run.

    Args:
        machine: where that was measured, see `issp.nn.autotune.machine`.
        rows: name of a layer -> v of its positions.
    """

    machine: str
    rows: dict[str, int]

    @classmethod
    def of(cls, saved: object, names: Sequence[str]) -> Recorded | None:
        """From a pruner's saved state; None: there was nothing of the kind.

        Raises:
            ValueError: it is damaged, or of other layers.
        """
        if saved is None:
            return None
        if not isinstance(saved, Mapping) or not isinstance(saved.get("machine"), str):
            raise ValueError("the acceleration in the pruner's state is damaged")
        rows = saved.get("rows")
        if not isinstance(rows, Mapping) or not all(
            name in names and isinstance(v, int) and v > 0 for name, v in rows.items()
        ):
            raise ValueError("the acceleration in the pruner's state is damaged or of other layers")
        return cls(saved["machine"], dict(rows))

    def state(self) -> dict[str, Any]:
        """What `of` reads."""
        return {"machine": self.machine, "rows": dict(self.rows)}


class Acceleration:
    """Layers that train sparse, from its construction until `end`.

    Args:
        model: that is trained, with or without wrappers.
        buckets: of a pruner whose masks are fixed; the layers leave them.
        ema: an average of the model, whose layers become sparse as well.
        recorded: which layers, and where that was measured.
        report: of the choice.
    """

    def __init__(
        self,
        model: nn.Module,
        buckets: WeightBuckets,
        ema: EMAWeights | None,
        recorded: Recorded,
        report: LayerReport,
    ) -> None:
        self.recorded, self.report = recorded, report
        self._model, self._buckets, self._ema = model, buckets, ema
        rows = recorded.rows
        layers = [layer for layer in buckets.layers if layer.name in rows]
        masks = buckets.column(lambda bucket: bucket.masks())
        positions = {x.name: KeptPositions(masks[x.name], rows[x.name]) for x in layers}
        wrappers = data_parallel.wrappers_of(model.modules()) if layers else []
        buckets.release(rows.keys())
        self._layers = layers
        self._in_channels_last: list[nn.Conv2d] = []
        for layer in layers:
            own = positions[layer.name]
            change_states(buckets.optimizers, layer, own.gather)
            for module in (layer.module, *self._averages(layer)):
                assert isinstance(module, nn.Conv2d | nn.Linear)
                to_sparse_(module, own.copy())
        if layers:
            self._make_contiguous()
        self._state_dicts = DenseStateDicts(layers, buckets.optimizers)
        for wrapper in wrappers:
            data_parallel.renew(wrapper)

    @property
    def names(self) -> list[str]:
        """The layers that train sparse."""
        return [layer.name for layer in self._layers]

    def end(self) -> None:
        """Makes the layers, the moments and the average dense again, with their zeros."""
        self._state_dicts.remove()
        wrappers = data_parallel.wrappers_of(self._model.modules()) if self._layers else []
        for layer in self._layers:
            assert isinstance(layer.module, SparseTrainingLayer)
            change_states(self._buckets.optimizers, layer, layer.module.positions.expand)
            for module in (layer.module, *self._averages(layer)):
                to_dense_(module)
        for conv in self._in_channels_last:
            self._set_format(conv, torch.channels_last)
        self._buckets.take_back()
        for wrapper in wrappers:
            data_parallel.renew(wrapper)
        self._layers, self._in_channels_last = [], []

    def follow(self, model: nn.Module) -> None:
        """Goes on with the buckets' layers and optimizers as they are now, copies perhaps."""
        self._state_dicts.remove()
        self._model = model
        self._state_dicts = DenseStateDicts(self._layers, self._buckets.optimizers)

    def _averages(self, layer: Layer) -> list[nn.Module]:
        return [] if self._ema is None else [self._ema.module(layer)]

    def _make_contiguous(self) -> None:
        """Gives the dense convolutions between sparse layers the format of those.

        One channels_last weight would make torch's results channels_last, and every sparse layer
        behind it would convert them.
        """
        for module in self._model.modules():
            if type(module) is nn.Conv2d and not module.weight.is_contiguous():
                self._in_channels_last.append(module)
                self._set_format(module, torch.contiguous_format)

    def _set_format(self, conv: nn.Conv2d, memory_format: torch.memory_format) -> None:
        def change(x: Tensor) -> Tensor:
            return x.contiguous(memory_format=memory_format)

        change_states(self._buckets.optimizers, Layer("", conv, 0.0), change)
        replace_data_(conv.get_parameter("weight"), change)


def check(model: nn.Module, buckets: WeightBuckets, ema: EMAWeights | None) -> None:
    """Refuses what sparse fine-tuning cannot follow, before anything is measured or changed.

    Raises:
        ValueError: an optimizer, an average or a wrapper of another kind, or weights in shards.
    """
    check_elementwise(buckets.optimizers, buckets.wrappers)
    if any(is_sharded(layer.weight) for layer in buckets.prunable):
        raise ValueError(
            "freeze(accelerate=...) needs whole weights, but fully_shard has distributed them: "
            "freeze without accelerate, or train with DistributedDataParallel"
        )
    if ema is not None:
        for layer in buckets.prunable:
            ema.module(layer)
    data_parallel.wrappers_of(model.modules())


def choose(
    model: nn.Module,
    buckets: WeightBuckets,
    example: Any,
    known: Recorded | None,
    cache: autotune.Cache | None = None,
) -> tuple[Recorded, LayerReport]:
    """Which layers are to train sparse: measured now, or as recorded on this machine before.

    With several ranks, rank 0 decides and the others follow it.

    Args:
        model: as it trains.
        buckets: of a pruner whose masks are fixed.
        example: input of the model, or a tuple of its arguments, as in training; or True: every
            layer that can train sparse does, and nothing is measured.
        known: from a saved state; a resumed run goes on with the same bits.
        cache: of choices; None: the user's.
    """
    layers = masked_layers(buckets)

    def decide() -> tuple[Recorded, LayerReport]:
        machine = autotune.machine(next(model.parameters()).device.type)
        if known is not None and known.machine == machine:
            rows, report = layer_choice.all_that_can(layers, known.rows)
        elif example is True:
            rows, report = layer_choice.all_that_can(layers)
        else:
            args = example if isinstance(example, tuple) else (example,)
            own_cache = autotune.Cache() if cache is None else cache
            rows, report = layer_choice.choose(model, layers, args, own_cache)
        return Recorded(machine, rows), report

    return _on_rank_0(decide)


def masked_layers(buckets: WeightBuckets) -> list[MaskedLayer]:
    """The layers with masks; those that cannot train sparse say why."""
    masks = buckets.column(lambda bucket: bucket.masks())
    unmasked = [
        name for index in range(len(buckets.optimizers)) for name in buckets.unmasked_states(index)
    ]
    return [
        MaskedLayer(layer, masks[layer.name], _reason(layer, unmasked))
        for layer in buckets.prunable
        if layer.name in masks
    ]


def _reason(layer: Layer, unmasked: Sequence[str]) -> str:
    """Why a layer cannot train its kept weights alone, or ""."""
    if unmasked:
        return f"the optimizer keeps {', '.join(unmasked)} in another form than the weight's"
    if layer.aliases:
        return f"its weight is shared by {', '.join((layer.name, *layer.aliases))}"
    weight = layer.weight
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__name__}"
    if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
        return "its weight is a part of a larger tensor"
    return ""


def _on_rank_0(
    decide: Callable[[], tuple[Recorded, LayerReport]],
) -> tuple[Recorded, LayerReport]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return decide()
    if distributed.get_world_size() == 1:
        return decide()
    result: list[Any] = [decide() if distributed.get_rank() == 0 else None]
    distributed.broadcast_object_list(result, src=0)
    return result[0]
