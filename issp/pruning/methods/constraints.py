"""The layers that share index sets: equal weight shape, directly before a residual addition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol

from torch import Tensor

from issp.nn.names import named_modules
from issp.nn.residual_groups import constrained_layers, shape_groups
from issp.nn.selection import Layer, match_names
from issp.pruning.methods.base import Setting


class Constrained(Protocol):
    """A method whose layers share index sets; see `issp.pruning.methods.srp.SRP`."""

    name: ClassVar[str]
    constrained: str | Sequence[str] | None
    example: Tensor | None


def check_constrained(method: Constrained) -> None:
    """Refuses options of a wrong kind.

    Raises:
        TypeError: one of them.
    """
    given = method.constrained
    patterns = given if isinstance(given, list | tuple) else [given]
    if given is not None and not all(isinstance(one, str) for one in patterns):
        raise TypeError(f"constrained must be a name pattern or several, not {given!r}")
    if not isinstance(method.example, Tensor | None):
        raise TypeError(f"example must be a tensor, not {method.example!r}")


def constrained_groups(method: Constrained, setting: Setting) -> list[list[Layer]]:
    """Layers of one shape and one target, in the model's order; groups of one are left out.

    Raises:
        ValueError: a name pattern that matches nothing, or a graph that cannot be traced.
    """
    names = set(_names(method, setting))
    layers = [layer for layer in setting.buckets.prunable if layer.name in names]
    targets = dict.fromkeys(layer.target for layer in layers)
    return [
        group
        for target in targets
        for group in shape_groups([layer for layer in layers if layer.target == target])
    ]


def _names(method: Constrained, setting: Setting) -> list[str]:
    if method.constrained is None:
        types = tuple({type(layer.module) for layer in setting.buckets.prunable})
        return constrained_layers(setting.model, types, method.example)
    modules = named_modules(setting.model)
    given = method.constrained
    patterns = [given] if isinstance(given, str) else list(given)
    matched = set().union(*(match_names(x, modules, "constrained") for x in patterns))
    return [name for name in modules if name in matched]
