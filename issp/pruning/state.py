"""The pruner's state as plain dicts, numbers and tensors, and the checks when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp.nn.selection import Layer
from issp.ops.schemas import mask_words


class LayerState(NamedTuple):
    """What is known of one layer, independent of its bucket: to form new buckets, save and load.

    The names of the fields are the keys of the saved state.

    Args:
        shape: of the weight.
        k: how many weights are selected.
        threshold: 0-dim tensor in the weight's dtype; NaN before the first selection.
        flips: mask bits that the latest step changed.
        mask: packed, int32 words in the order of the weight's indices, whatever the weight's
            memory order, as in `issp.ops.schemas`.
    """

    shape: tuple[int, ...]
    k: int
    threshold: Tensor
    flips: int
    mask: Tensor


def pack(states: Mapping[str, LayerState]) -> dict[str, dict[str, Any]]:
    """The states of the layers as dicts: what `torch.load(weights_only=True)` reads."""
    return {name: {**x._asdict(), "shape": list(x.shape)} for name, x in states.items()}


def unpack(
    saved: Mapping[str, Any], layers: Sequence[Layer], configuration: Mapping[str, object]
) -> dict[str, LayerState]:
    """The states of the layers in a saved state, checked against the layers and settings here.

    Args:
        saved: what `Pruner.state_dict` returned.
        layers: those of the pruner that loads.
        configuration: settings that must be equal.

    Raises:
        ValueError: the first difference.
    """
    missing_keys = {"version", "stage", "step_count", "layers", *configuration} - set(saved)
    if missing_keys:
        raise ValueError(
            f"the pruner's state lacks {', '.join(sorted(missing_keys))}: it is something else"
        )
    if saved["version"] != 1:
        raise ValueError(f"the pruner's state has version {saved['version']}: this issp reads 1")
    for name, expected in configuration.items():
        actual = saved[name]
        if actual == expected:
            continue
        if name == "targets":
            name, actual, expected = _first_difference(actual, expected)
        raise ValueError(
            f"the pruner's state was saved with {name} {actual}, but here it is {expected}: attach "
            "with the same arguments, or load with strict=False"
        )
    shapes = {layer.name: tuple(layer.weight.shape) for layer in layers}
    return {name: _layer_state(name, entry, shapes) for name, entry in saved["layers"].items()}


def _first_difference(actual: Any, expected: Any) -> tuple[str, object, object]:
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            return f"for layer {name} the sparsity", actual.get(name), expected.get(name)
    return "the layers", list(actual), list(expected)


def _layer_state(
    name: str, saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> LayerState:
    if name not in shapes:
        raise ValueError(f"the pruner's state has layer {name}, which is not pruned here")
    missing_keys = [key for key in LayerState._fields if key not in saved]
    if missing_keys:
        raise ValueError(
            f"the pruner's state lacks {missing_keys[0]} of layer {name}: it is damaged"
        )
    state = LayerState(**{key: saved[key] for key in LayerState._fields})
    state = state._replace(shape=tuple(state.shape))
    if state.shape != shapes[name]:
        raise ValueError(
            f"the pruner's state has shape {state.shape} for {name}, whose weight is {shapes[name]}"
        )
    numel = torch.Size(state.shape).numel()
    if state.mask.dtype != torch.int32 or state.mask.shape != (mask_words(numel),):
        raise ValueError(f"the mask of {name} in the pruner's state is damaged")
    if not 0 <= state.k <= numel:
        raise ValueError(f"k of {name} in the pruner's state is {state.k}: it is damaged")
    return state
