"""Which weights are pruned now: the layers, the optimizers that train them, and their groups."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping

from torch import nn
from torch.optim import Optimizer

from issp.nn.selection import Layer, unwrap
from issp.pruning.buckets import Group, Record
from issp.pruning.ema import Average


class Roster:
    """The layers in groups of one optimizer, device and dtype each.

    Where the optimizer can do the pruner's work within its step (`issp.optim`), also of one
    parameter group, since that is what it updates in one pass.

    A layer joins when its weight is trained: it requires gradients and an optimizer has it. From
    then on it stays, or a mask would vanish with a frozen weight. One that stays dense never joins.

    Args:
        layers: all layers to prune, in the model's order.
        optimizers: may be empty; then requiring gradients is enough.

    Raises:
        ValueError: none of the weights is trained.
    """

    def __init__(self, layers: list[Layer], optimizers: list[Optimizer]) -> None:
        self.layers = layers
        self.prunable = [layer for layer in layers if not layer.dense]
        self.optimizers = optimizers
        self.joined: set[str] = set()
        self.groups: list[Group] = []
        self.regroup({})

    def follow(self) -> bool:
        """Notices weights that moved (device, dtype, memory) or have come to be trained.

        Returns:
            Whether the groups are new ones.
        """
        moved = [group for group in self.groups if group.moved()]
        stale = moved and not all([group.fits() for group in moved])
        if stale or self._newcomers():
            self.regroup(self.records())
            return True
        return False

    def _newcomers(self) -> bool:
        if len(self.joined) == len(self.prunable):
            return False
        outside = [x for x in self.prunable if x.name not in self.joined and x.weight.requires_grad]
        if not outside:
            return False
        owners = self._owners()
        return any(owners[layer.name] is not None for layer in outside)

    def _owners(self) -> dict[str, tuple[int, int | None] | None]:
        """For every layer the numbers of the optimizer and parameter group that train it."""
        held = {
            id(parameter): (index, part if hasattr(opt, "follow_pruner") else None)
            for index, opt in enumerate(self.optimizers)
            for part, group in enumerate(opt.param_groups)
            for parameter in group["params"]
        }
        owners = {}
        for layer in self.prunable:
            owner = held.get(id(layer.weight)) if self.optimizers else (0, None)
            owners[layer.name] = owner if layer.weight.requires_grad else None
        return owners

    def trained_by(self, opt: Optimizer) -> bool:
        """Whether an optimizer has one of the weights."""
        weights = {id(layer.weight) for layer in self.layers}
        return any(id(p) in weights for group in opt.param_groups for p in group["params"])

    def regroup(self, records: Mapping[str, Record]) -> None:
        """Forms the groups anew; masks and counts come from the records."""
        owners = self._owners()
        parts: dict[tuple, list[Layer]] = {}
        for layer in self.prunable:
            owner = owners[layer.name]
            if owner is not None or layer.name in self.joined:
                place = (owner or (0, None), layer.weight.device, layer.weight.dtype)
                parts.setdefault(place, []).append(layer)
        if all(owner is None for owner in owners.values()):
            raise ValueError(
                "no weight to prune is trained: the weights must require gradients and be in the "
                "optimizer (of a copied model, pass its own optimizer)"
            )
        groups = [Group(layers, *owner) for (owner, *_), layers in parts.items()]
        for group in groups:
            group.restore(records)
        self.groups = groups
        self.joined = {layer.name for group in groups for layer in group.layers}

    def move_to(self, model: nn.Module | None, optimizers: list[Optimizer]) -> None:
        """Goes on with a copy of the model (None: the same) and other optimizers.

        Raises:
            ValueError: the model lacks a layer, or no weight is trained; nothing has changed.
        """
        records = self.records()
        before = (self.optimizers, [layer.module for layer in self.layers])
        if model is not None:
            self._rebind(model)
        self.optimizers = optimizers
        try:
            self.regroup(records)
        except Exception:
            self.optimizers, modules = before
            for layer, module in zip(self.layers, modules, strict=True):
                layer.module = module
            raise

    def _rebind(self, model: nn.Module) -> None:
        modules = dict(unwrap(model).named_modules(remove_duplicate=False))
        for layer in self.layers:
            weight = getattr(modules.get(layer.name), "_parameters", {}).get("weight")
            if weight is None or weight.shape != layer.weight.shape:
                raise ValueError(
                    f"the model has no layer {layer.name} with a weight of shape "
                    f"{tuple(layer.weight.shape)}: attach anew"
                )
        for layer in self.layers:
            layer.module = modules[layer.name]

    def records(self) -> dict[str, Record]:
        """Copies of masks, counts and thresholds of every layer that has joined."""
        return {name: r for group in self.groups for name, r in group.records().items()}

    def notes(self) -> dict[str, str]:
        """Why the layers that are not pruned are not."""
        return {
            layer.name: layer.dense
            or ("not in the optimizer" if layer.weight.requires_grad else "requires_grad is False")
            for layer in self.layers
            if layer.name not in self.joined
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

    def select_missing(self) -> None:
        """Selects, at the full sparsity, for layers that no step has selected yet."""
        for group in self.groups:
            chosen = zip(group.layers, group.chosen(), strict=True)
            missing = [layer for layer, done in chosen if not done]
            if missing:
                late = Group(missing, group.index)
                late.set_ratio(1.0, 1.0)
                late.shrink(0.0)
                group.restore(late.records())

    def mask(self, groups: Iterable[Group], ema: Average | None = None) -> None:
        """Writes zeros into pruned weights, their optimizer moments and their average."""
        for group in groups:
            group.mask(
                self.optimizers[group.index] if self.optimizers else None,
                None if ema is None else ema.tensors(group.layers),
            )
