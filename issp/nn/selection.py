"""Which layers are pruned, and how far: types, exclusions, overrides, tied weights; why not."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from issp.nn import sharding
from issp.nn.names import named_modules, plain_pattern
from issp.nn.sparse_training import SparseTrainingLayer, dense_shape
from issp.ops import validation
from issp.ops.keep import Keep, Unit

# Their weights have no input channels in dimension 1; transposed convolutions say so themselves.
_NO_INPUTS_IN_DIM_1 = {"Embedding", "EmbeddingBag", "Bilinear", "Conv1D"}  # the last: transformers
_NOT_PRUNABLE = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)


@dataclass
class Layer:
    """One pruned weight.

    Args:
        name: name of its module, as in `names.named_modules`; of tied weights, the first.
        module: the module that owns the parameter `weight`.
        target: sparsity in 0..1, or the N:M pattern.
        aliases: names of the other modules that share this very parameter.
        dense: why it is left dense, "" when it is pruned.
        unit: what the sparsity is counted in; None: single weights, or an N:M pattern.
    """

    name: str
    module: nn.Module
    target: float | Keep
    aliases: tuple[str, ...] = ()
    dense: str = ""
    unit: Unit | None = None

    @property
    def pattern(self) -> Keep | Unit | None:
        """The N:M pattern or unit in which its weights are selected; None: one by one."""
        return self.target if isinstance(self.target, Keep) else self.unit

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now: `model.to` and loading may have replaced it."""
        return weight_of(self.name, self.module)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the dense weight, also where the layer trains its kept values alone."""
        return dense_shape(self.module)


def select(
    model: nn.Module,
    types: type | tuple[type, ...],
    exclude: str | Iterable[str],
    overrides: Mapping[str, float | Keep],
    sparsity: float | Keep,
    unit: Unit | None = None,
) -> list[Layer]:
    """The layers to prune, in the order of `names.named_modules`, tied weights once.

    Args:
        model: with or without wrappers.
        types: module classes whose `weight` is pruned.
        exclude: name patterns: a glob ("body.*.conv1"), or "re:" and a regular expression for the
            whole name. One that matches a container holds for everything inside it.
        overrides: name pattern -> sparsity in 0..1 or `Keep`; the last match wins.
        sparsity: for all other layers, 0..1 or `Keep`.
        unit: what a sparsity above 0 is counted in; None: single weights.

    Raises:
        ValueError: a name pattern that matches nothing; no layer left; a ratio outside 0..1; tied
            weights with different targets; a weight that cannot be pruned; an N:M pattern or unit
            that does not divide its weight, unless its tail is "dense".
    """
    _check_parallel(model)
    sharding.reshard(sharding.fsdp_modules(model))
    _check_dense(model)
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for value in (sparsity, *overrides.values()):
        if not isinstance(value, Keep) and not 0.0 <= value <= 1.0:
            raise ValueError(f"sparsity is {value}: it must lie in 0..1, or be an issp.Keep")
    modules = named_modules(model)
    excluded = set().union(*(match_names(name, modules, "exclude") for name in exclude))
    eligible = {name: m for name, m in modules.items() if isinstance(m, types)}
    owners = _owners(modules)
    # A weight that is excluded under one of its names is excluded, whatever has that name.
    untouched = {
        weight for weight, names in owners.items() if any(name in excluded for name, _ in names)
    }
    kept = {
        n: m
        for n, m in eligible.items()
        if n not in excluded and id(weight_of(n, m)) not in untouched
    }
    targets: dict[str, float | Keep] = dict.fromkeys(kept, sparsity)
    for name_pattern, target in overrides.items():
        names = match_names(name_pattern, modules, "overrides") & kept.keys()
        if not names:
            raise ValueError(
                f'overrides: "{name_pattern}" matches no pruned layer: correct or drop it'
            )
        targets |= dict.fromkeys(names, target)
    layers = _once(kept, targets)
    if not layers:
        wanted = ", ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise ValueError(
            f"no layer to prune: the model has {len(eligible)} modules of types {wanted} and "
            f"{len(excluded & eligible.keys())} of them are excluded; pass other types"
        )
    for layer in layers:
        if not isinstance(layer.target, Keep) and layer.target > 0:
            layer.unit = unit
        layer.dense = _sharing_reason(owners[id(layer.weight)], kept) or _pattern_reason(layer)
    if all(layer.dense for layer in layers):
        raise ValueError(f"no layer to prune: {layers[0].name}, as all others, {layers[0].dense}")
    return layers


def unpruned_weights(
    model: nn.Module, exclude: str | Iterable[str], layers: Iterable[Layer]
) -> dict[str, str]:
    """What looks prunable and is no layer: name of the parameter -> why.

    That is what is called a weight, has two dimensions or more and is neither excluded nor one of
    an embedding or normalization: transposed convolutions that are not among the types,
    `in_proj_weight` of attention, the weights of recurrent layers and of modules of the user's own.

    Args:
        model: with or without wrappers.
        exclude: name patterns, as for `select`.
        layers: what `select` has returned.
    """
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    modules = named_modules(model)
    excluded = set().union(*(match_names(name, modules, "exclude") for name in exclude))
    selected = {id(layer.weight) for layer in layers}
    return {
        f"{name}.{key}" if name else key: f"{type(module).__name__} is not among the types"
        if key == "weight"
        else "only a parameter `weight` is pruned"
        for name, module in modules.items()
        if name not in excluded and not isinstance(module, _NOT_PRUNABLE)
        for key, p in module._parameters.items()
        if p is not None and "weight" in key and p.dim() > 1 and id(p) not in selected
    }


def _check_dense(model: nn.Module) -> None:
    """Refuses layers that train sparse, whose weights hold the kept values alone."""
    if any(isinstance(module, SparseTrainingLayer) for module in model.modules()):
        raise ValueError(
            "the model trains sparse by pruner.freeze(accelerate=...): call finalize() of that "
            "pruner before attaching another"
        )


def _check_parallel(model: nn.Module) -> None:
    """Refuses wrappers under which every rank would select for itself."""
    for module in model.modules():
        names = {c.__name__ for c in type(module).__mro__}
        if "DeepSpeedEngine" in names:
            raise ValueError(
                "the model is in DeepSpeedEngine, whose optimizer updates flat copies of the "
                "weights: use DistributedDataParallel or fully_shard"
            )
        if "FullyShardedDataParallel" in names:
            raise ValueError(
                "the model is wrapped in FullyShardedDataParallel, where every rank has shards of "
                "the weights and would select within them: use fully_shard, or "
                "DistributedDataParallel"
            )
        for hook, *_ in getattr(module, "_comm_hooks", None) or ():
            if "post_localSGD" in getattr(hook, "__name__", ""):
                raise ValueError(
                    "the model has DistributedDataParallel's post_localSGD_hook, under which the "
                    "weights of the ranks differ and each would select others: do not register it"
                )


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, list[tuple[str, str]]]:
    """By id of each parameter, under which (name of a module, own name) it is to be found."""
    owners: dict[int, list[tuple[str, str]]] = {}
    for name, module in modules.items():
        for key, p in module._parameters.items():
            if p is not None:
                owners.setdefault(id(p), []).append((name, key))
    return owners


def _sharing_reason(owners: list[tuple[str, str]], pruned: Collection[str]) -> str:
    """Why a weight that has these owners stays dense: one of them is no pruned layer."""
    for name, key in owners:
        if name not in pruned or key != "weight":
            shared = f"{name}.{key}" if name else key
            return f"stays dense: its weight is also {shared}, which is not pruned"
    return ""


def _pattern_reason(layer: Layer) -> str:
    """Why a layer stays dense, "" if its pattern or unit divides it (or it has none)."""
    by = layer.pattern
    if by is None:
        return ""
    reason = undivided_reason(layer, by)
    if reason and by.tail != "dense":
        raise ValueError(
            f'{layer.name}: {reason}; {type(by).__name__}(..., tail="dense") leaves such layers '
            "dense, or name them in exclude= or overrides="
        )
    return f"stays dense: {reason}" if reason else ""


def undivided_reason(layer: Layer, by: Keep | Unit) -> str:
    """Why a pattern finds no groups, or a unit no place, in a layer's weight, or ""."""
    return _layout_reason(layer.module, by) or indivisible_reason(layer.weight, by)


def _layout_reason(module: nn.Module, by: Keep | Unit) -> str:
    """Why the groups of a pattern would not be input channels of one output, or ""."""
    if isinstance(by, Keep) and by.layout == "flat":
        return ""
    names = {cls.__name__ for cls in type(module).__mro__}
    if getattr(module, "transposed", False) or not names.isdisjoint(_NO_INPUTS_IN_DIM_1):
        remedy = 'use layout="flat"' if isinstance(by, Keep) else "prune its weights one by one"
        return (
            "a pattern groups input channels in dimension 1 of a weight, and that of a "
            f"{type(module).__name__} has none there: {remedy}"
        )
    groups = getattr(module, "groups", 1)
    if groups > 1 and getattr(module, "out_channels", 0) // groups % by.v:
        return (
            f"v = {by.v} output rows would share positions across the {groups} groups of the "
            "convolution, whose inputs differ: choose another v"
        )
    return ""


def unsupported_reason(module: nn.Module) -> str:
    """Why sparse layers cannot compute what a Conv2d or Linear computes, or ""."""
    groups = getattr(module, "groups", 1)
    if groups != 1:
        return f"sparse layers have groups = 1 only, not {groups}"
    padding_mode = getattr(module, "padding_mode", "zeros")
    if padding_mode != "zeros":
        return f'sparse layers pad by zeros only, not by "{padding_mode}"'
    return ""


def indivisible_reason(weight: Tensor, by: Keep | Unit) -> str:
    """Why a weight [O, I, ...] does not divide into the groups of a pattern or units, or ""."""
    try:
        validation.check_pattern_divides(weight, "weight", by)
    except ValueError as error:
        return str(error)
    return ""


def match_names(name_pattern: str, names: Collection[str], argument: str) -> set[str]:
    """The names of modules that a name pattern selects, with everything inside of them.

    A name pattern that matches none may have been read from a wrapped model: the parts of wrappers
    are then left out of it.

    Args:
        name_pattern: a glob, or "re:" and a regular expression for the whole name.
        names: of all modules of the model.
        argument: which argument the name pattern comes from, for the message.

    Raises:
        ValueError: no regular expression, or one that matches no name.
    """
    hit = _hit(name_pattern, names, argument) or _hit(plain_pattern(name_pattern), names, argument)
    if not hit:
        raise ValueError(f'{argument}: "{name_pattern}" matches no module of the model')
    return {n for n in names if n in hit or any(n.startswith(f"{h}.") for h in hit)}


def _hit(name_pattern: str, names: Collection[str], argument: str) -> set[str]:
    is_expression = name_pattern.startswith("re:")
    try:
        expression = re.compile(
            name_pattern[3:] if is_expression else fnmatch.translate(name_pattern)
        )
    except re.error as error:
        raise ValueError(
            f'{argument}: "{name_pattern}" is no regular expression: {error}'
        ) from None
    return {
        n for n in names if n and (expression.fullmatch(n) or expression.fullmatch(f"{n}.weight"))
    }


def _once(modules: Mapping[str, nn.Module], targets: Mapping[str, float | Keep]) -> list[Layer]:
    layers: dict[int, Layer] = {}
    for name, module in modules.items():
        weight = weight_of(name, module)
        first = layers.setdefault(id(weight), Layer(name, module, targets[name]))
        if first.name != name:
            if first.target != targets[name]:
                raise ValueError(
                    f"{first.name} and {name} share one weight but have the targets "
                    f"{first.target} and {targets[name]}: give them one"
                )
            first.aliases += (name,)
    return list(layers.values())


def weight_of(name: str, module: nn.Module) -> nn.Parameter:
    """The weight of a module to prune.

    Raises:
        ValueError: it has none, or one that cannot be pruned.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{name} has no parameter `weight` (parametrized, sharded, or of another kind): remove "
            "the parametrization or exclude it"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} is not initialized: run the model once before attaching")
    if getattr(weight, "_fsdp_flattened", False):
        raise ValueError(
            f"{name} is sharded (FSDP), in pieces that are no rows: use fully_shard or "
            "DistributedDataParallel, or exclude it"
        )
    if sharding.is_sharded(weight) and (problem := sharding.unsupported_sharding(weight)):
        raise ValueError(f"{name} {problem}, or exclude it")
    if weight.dtype not in validation.DTYPES:
        raise ValueError(f"{name} has a weight of {weight.dtype}: exclude it")
    if weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: give it memory before attaching")
    if weight.numel() == 0:
        raise ValueError(f"{name} has an empty weight: exclude it")
    return weight
