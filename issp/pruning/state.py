"""The pruner's state as plain dicts, numbers and tensors, and the checks when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from issp.nn.selection import Layer
from issp.ops.schemas import mask_words

_LAYER_KEYS = ("shape", "k", "threshold", "flips", "mask")


@dataclass(frozen=True)
class LayerState:
    """What is known of one layer, independent of its bucket: to form new buckets, save and load.

    Args:
        shape: of the weight.
        k: how many weights are selected.
        threshold: 0-dim tensor in the weight's dtype; NaN before the first selection.
        flips: mask bits that the latest step changed.
        packed_mask: int32 words of the mask in the order of the weight's indices, whatever the
            weight's memory order, as in `issp.ops.schemas`.
    """

    shape: tuple[int, ...]
    k: int
    threshold: Tensor
    flips: int
    packed_mask: Tensor


def pack(states: Mapping[str, LayerState]) -> dict[str, dict[str, Any]]:
    """The states of the layers as dicts: what `torch.load(weights_only=True)` reads."""
    return {
        name: {
            "shape": list(state.shape),
            "k": state.k,
            "threshold": state.threshold,
            "flips": state.flips,
            "mask": state.packed_mask,
        }
        for name, state in states.items()
    }


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
    missing_keys = [key for key in _LAYER_KEYS if key not in saved]
    if missing_keys:
        raise ValueError(
            f"the pruner's state lacks {missing_keys[0]} of layer {name}: it is damaged"
        )
    shape = tuple(saved["shape"])
    if shape != shapes[name]:
        raise ValueError(
            f"the pruner's state has shape {shape} for {name}, whose weight is {shapes[name]}"
        )
    numel = torch.Size(shape).numel()
    mask = saved["mask"]
    if mask.dtype != torch.int32 or mask.shape != (mask_words(numel),):
        raise ValueError(f"the mask of {name} in the pruner's state is damaged")
    if not 0 <= saved["k"] <= numel:
        raise ValueError(f"k of {name} in the pruner's state is {saved['k']}: it is damaged")
    return LayerState(
        shape=shape,
        k=saved["k"],
        threshold=saved["threshold"],
        flips=saved["flips"],
        packed_mask=mask,
    )
