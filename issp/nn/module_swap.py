"""Transfers a user's hooks and attributes when a sparse layer replaces a dense one.

Hooks on calls and attributes that the user has set are transferred. Hooks stay in the dicts that
they are registered in, so that the handles which registered them still remove them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn

from issp.nn.layers import STORED, NMConv2d, SparseLayer, SparseLinear

CALLS = (
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_backward_pre_hooks", "_backward_hooks"),
)
_STATES = (
    *("_state_dict_hooks", "_state_dict_pre_hooks"),
    *("_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"),
)
_DENSE = {
    nn.Conv2d: frozenset(vars(nn.Conv2d(1, 1, 1, device="meta"))),
    nn.Linear: frozenset(vars(nn.Linear(1, 1, device="meta"))),
}
# Names that mean something in a sparse layer: an attribute of that name cannot be transferred.
_RESERVED = frozenset(STORED).union(NMConv2d.STATE, dir(NMConv2d), dir(SparseLinear))


def replacement_blocker(layer: nn.Module) -> str:
    """Why a sparse layer cannot take the place of an nn.Conv2d or nn.Linear, or ""."""
    members = (*layer._parameters, *layer._buffers, *layer._modules)
    more = [name for name in members if name not in ("weight", "bias")]
    if more:
        return f"it has {', '.join(more)} besides weight and bias: remove the parametrization"
    for name, parameter in layer._parameters.items():
        if parameter is not None and (
            parameter._backward_hooks or parameter._post_accumulate_grad_hooks
        ):
            return f"its {name} has hooks of its own, and a sparse layer's is another tensor"
    if any(getattr(layer, name) for name in _STATES):
        return "it has hooks on its state_dict, and a sparse layer's has other entries"
    if layer._backward_hooks and not layer._is_full_backward_hook:
        return "its backward hooks see torch's own operation alone: use register_full_backward_hook"
    clash = [
        name for name in user_attributes(layer) if name in _RESERVED or hasattr(type(layer), name)
    ]
    if clash:
        return f"its attribute {', '.join(clash)} means something else in a sparse layer"
    return ""


def transfer_hooks(old: nn.Module, new: nn.Module) -> None:
    """Gives `new`, which replaces `old`, its hooks on calls and its user's attributes."""
    for name in (*CALLS, "_is_full_backward_hook"):
        setattr(new, name, getattr(old, name))
    for name in user_attributes(old):
        setattr(new, name, vars(old)[name])


@contextmanager
def without_hooks(layer: nn.Module) -> Iterator[None]:
    """Removes the layer's hooks on calls for as long as the context lasts."""
    before = {name: getattr(layer, name) for name in CALLS}
    for name in CALLS:
        setattr(layer, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in before.items():
            setattr(layer, name, hooks)


def swapper(root: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> Callable[[bool], None]:
    """A function that puts modules in their places: the replacements (True), or those before.

    Args:
        root: holds them, at any depth and under any number of names.
        replacements: module -> what replaces it.
    """
    children = [
        (parent, attribute, child)
        for parent in root.modules()
        for attribute, child in parent._modules.items()
        if child is not None and child in replacements
    ]

    def swap(replaced: bool) -> None:
        for parent, attribute, child in children:
            parent._modules[attribute] = replacements[child] if replaced else child

    return swap


def user_attributes(layer: nn.Module) -> list[str]:
    """Attributes that the user has set: those that a new layer of the kind does not have."""
    if isinstance(layer, SparseLayer):
        known = _DENSE[layer.dense] | layer.STATE
    else:
        known = _DENSE[type(layer)]
    return [name for name in vars(layer) if name not in known]
