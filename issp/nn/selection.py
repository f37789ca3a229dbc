"""Which layers are pruned, and how far: types, exclusions, overrides, tied weights."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from issp.ops.keep import Keep
from issp.ops.validation import pruning as checks

_WRAPPERS = (
    nn.parallel.DistributedDataParallel,
    nn.parallel.DataParallel,
    torch.optim.swa_utils.AveragedModel,
)


@dataclass
class Layer:
    """One pruned weight.

    Args:
        name: name of its module, as in `model.named_modules()`; of tied weights, the first.
        module: the module that owns the parameter `weight`.
        target: sparsity in 0..1, or the N:M pattern.
        aliases: names of the other modules that share this very parameter.
        dense: why it is left dense, "" when it is pruned.
    """

    name: str
    module: nn.Module
    target: float | Keep
    aliases: tuple[str, ...] = ()
    dense: str = ""

    @property
    def weight(self) -> nn.Parameter:
        """The parameter as it is now: `model.to` and loading may have replaced it."""
        return self.module._parameters["weight"]


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, DataParallel, torch.compile and averaged models.

    Their prefixes ("module.", "_orig_mod.") would otherwise stand in every name.
    """
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod
        elif isinstance(model, _WRAPPERS):
            model = model.module
        else:
            return model


def select(
    model: nn.Module,
    types: type | tuple[type, ...],
    exclude: str | Iterable[str],
    overrides: Mapping[str, float | Keep],
    sparsity: float | Keep,
) -> list[Layer]:
    """The layers to prune, in the order of `model.named_modules()`, tied weights once.

    Args:
        model: unwrapped model.
        types: module classes whose `weight` is pruned.
        exclude: globs ("body.*.conv1"), or "re:" and a regular expression for the whole name. A
            pattern that matches a container holds for everything inside it.
        overrides: patterns of the same kind -> sparsity in 0..1 or `Keep`; the last match wins.
        sparsity: for all other layers, 0..1 or `Keep`.

    Raises:
        ValueError: a pattern that matches nothing; no layer left; a ratio outside 0..1; tied
            weights with different targets; a weight that cannot be pruned; an N:M pattern that
            does not divide its weight, unless its tail is "dense".
    """
    exclude = [exclude] if isinstance(exclude, str) else list(exclude)
    for value in (sparsity, *overrides.values()):
        if not isinstance(value, Keep) and not 0.0 <= value <= 1.0:
            raise ValueError(f"sparsity is {value}: it must lie in 0..1, or be an issp.Keep")
    modules = dict(model.named_modules(remove_duplicate=False))
    excluded = set()
    for pattern in exclude:
        excluded |= _matching(pattern, modules, "exclude")
    eligible = {name: m for name, m in modules.items() if isinstance(m, types)}
    # A weight that is excluded under one of its names is excluded.
    untouched = {id(m._parameters.get("weight")) for n, m in eligible.items() if n in excluded}
    kept = {
        n: m
        for n, m in eligible.items()
        if n not in excluded and id(_weight(n, m)) not in untouched
    }
    targets: dict[str, float | Keep] = dict.fromkeys(kept, sparsity)
    for pattern, target in overrides.items():
        hit = _matching(pattern, modules, "overrides") & kept.keys()
        if not hit:
            raise ValueError(f'overrides: "{pattern}" matches no pruned layer: correct or drop it')
        targets |= dict.fromkeys(hit, target)
    layers = _once(kept, targets)
    if not layers:
        wanted = ", ".join(t.__name__ for t in (types if isinstance(types, tuple) else (types,)))
        raise ValueError(
            f"no layer to prune: the model has {len(eligible)} modules of types {wanted} and "
            f"{len(excluded & eligible.keys())} of them are excluded; pass other types"
        )
    for layer in layers:
        layer.dense = _tail(layer)
    if all(layer.dense for layer in layers):
        raise ValueError(f"no layer to prune: {layers[0].name}, as all others, {layers[0].dense}")
    return layers


def _tail(layer: Layer) -> str:
    """Why an N:M layer stays dense, "" if its pattern divides it (or it has none)."""
    keep = layer.target
    if not isinstance(keep, Keep):
        return ""
    try:
        checks.pattern(layer.weight, "weight", keep.n, keep.of, keep.v, keep.layout)
    except ValueError as error:
        if keep.tail == "dense":
            return f"stays dense: {error}"
        raise ValueError(
            f'{layer.name}: {error}; Keep(..., tail="dense") leaves such layers dense, or name '
            "them in exclude= or overrides="
        ) from None
    return ""


def _matching(pattern: str, names: Iterable[str], argument: str) -> set[str]:
    if pattern.startswith("re:"):
        try:
            matches = re.compile(pattern[3:]).fullmatch
        except re.error as error:
            raise ValueError(f'{argument}: "{pattern}" is no regular expression: {error}') from None
    else:

        def matches(name: str) -> bool:
            return fnmatch.fnmatchcase(name, pattern)

    hit = {n for n in names if n and (matches(n) or matches(f"{n}.weight"))}
    if not hit:
        raise ValueError(f'{argument}: "{pattern}" matches no module of the model')
    return {n for n in names if n in hit or any(n.startswith(f"{h}.") for h in hit)}


def _once(modules: Mapping[str, nn.Module], targets: Mapping[str, float | Keep]) -> list[Layer]:
    layers: dict[int, Layer] = {}
    for name, module in modules.items():
        weight = _weight(name, module)
        first = layers.setdefault(id(weight), Layer(name, module, targets[name]))
        if first.name != name:
            if first.target != targets[name]:
                raise ValueError(
                    f"{first.name} and {name} share one weight but have the targets "
                    f"{first.target} and {targets[name]}: give them one"
                )
            first.aliases += (name,)
    return list(layers.values())


def _weight(name: str, module: nn.Module) -> Tensor:
    weight = module._parameters.get("weight")
    if weight is None:
        raise ValueError(
            f"{name} has no parameter `weight` (parametrized, or of another kind): remove the "
            "parametrization or exclude it"
        )
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"{name} is not initialized: run the model once before attaching")
    if hasattr(weight, "device_mesh"):
        raise ValueError(
            f"{name} is sharded (fully_shard): selecting over shards is not supported; use "
            "DistributedDataParallel, or exclude it"
        )
    if weight.dtype not in checks.DTYPES:
        raise ValueError(f"{name} has a weight of {weight.dtype}: exclude it")
    if weight.device.type == "meta":
        raise ValueError(f"{name} is on the meta device: give it memory before attaching")
    if weight.numel() == 0:
        raise ValueError(f"{name} has an empty weight: exclude it")
    return weight
