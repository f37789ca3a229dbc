"""The pruner's state as plain dicts, numbers and tensors, and the checks when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp.nn.names import matched
from issp.nn.selection import Layer
from issp.ops.schemas import mask_words

STAGES = ("pruning", "frozen", "final")


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


def method_state(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a method has learned, in a saved state.

    Raises:
        ValueError: it is no mapping.
    """
    state = saved.get("method_state", {})
    if not isinstance(state, Mapping):
        raise ValueError("the method_state of the pruner's state is damaged")
    return state


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
    required = ("version", "stage", "step_count", "layers", *configuration)
    missing_keys = sorted(set(required) - set(saved)) if isinstance(saved, Mapping) else required
    if missing_keys:
        raise ValueError(
            f"the pruner's state lacks {', '.join(missing_keys)}: it is something else"
        )
    if not _is_count(saved["version"]) or saved["version"] != 1:
        raise ValueError(f"the pruner's state has version {saved['version']}: this issp reads 1")
    if saved["stage"] not in STAGES or not _is_count(saved["step_count"]):
        raise ValueError("the stage or the step_count of the pruner's state is damaged")
    if not isinstance(saved["layers"], Mapping):
        raise ValueError("the layers of the pruner's state are damaged")
    for name, expected in configuration.items():
        actual = saved[name]
        if isinstance(actual, Mapping):
            actual = _by_layer(actual, layers)
        if not isinstance(actual, Tensor) and actual == expected:
            continue
        if isinstance(actual, Mapping) and isinstance(expected, Mapping):
            name, actual, expected = _first_difference(actual, expected)
        raise ValueError(
            f"the pruner's state was saved with {name} {actual}, but here it is {expected}: attach "
            "with the same arguments, or load with strict=False"
        )
    shapes = {layer.name: layer.shape for layer in layers}
    entries = _by_layer(saved["layers"], layers)
    return {name: _layer_state(name, entry, shapes) for name, entry in entries.items()}


def _by_layer(entries: Mapping[Any, Any], layers: Sequence[Layer]) -> Mapping[Any, Any]:
    """The entries by the layers' names, whatever wrappers were in the names when it was saved."""
    if not all(isinstance(name, str) for name in entries):
        return entries  # damaged, which is found out by the caller
    return matched(entries, [layer.name for layer in layers])


def _first_difference(
    actual: Mapping[str, object], expected: Mapping[str, object]
) -> tuple[str, object, object]:
    for name in [*expected, *actual]:
        if actual.get(name) != expected.get(name):
            return f"for layer {name} the sparsity", actual.get(name), expected.get(name)
    return "the layers", list(actual), list(expected)


def _layer_state(
    name: str, saved: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> LayerState:
    if name not in shapes:
        raise ValueError(f"the pruner's state has layer {name}, which is not pruned here")
    if not isinstance(saved, Mapping):
        raise ValueError(f"layer {name} of the pruner's state is damaged")
    missing_keys = [key for key in LayerState._fields if key not in saved]
    if missing_keys:
        raise ValueError(
            f"the pruner's state lacks {missing_keys[0]} of layer {name}: it is damaged"
        )
    state = LayerState(**{key: saved[key] for key in LayerState._fields})
    if isinstance(state.shape, list):
        state = state._replace(shape=tuple(state.shape))
    if state.shape != shapes[name]:
        raise ValueError(
            f"the pruner's state has shape {state.shape} for {name}, whose weight is {shapes[name]}"
        )
    numel = torch.Size(state.shape).numel()
    if not _is_vector(state.mask, torch.int32, mask_words(numel)):
        raise ValueError(f"the mask of {name} in the pruner's state is damaged")
    if not _is_count(state.k) or state.k > numel:
        raise ValueError(f"k of {name} in the pruner's state is {state.k}: it is damaged")
    if not _is_count(state.flips) or state.flips > numel:
        raise ValueError(f"flips of {name} in the pruner's state is {state.flips}: it is damaged")
    if not _is_float(state.threshold):
        raise ValueError(f"the threshold of {name} in the pruner's state is damaged")
    return state


def _is_count(x: object) -> bool:
    return isinstance(x, int) and x >= 0


def _is_vector(x: object, dtype: torch.dtype, numel: int) -> bool:
    return (
        isinstance(x, Tensor)
        and (x.dtype, x.shape, x.layout) == (dtype, (numel,), torch.strided)
        and not x.is_meta
    )


def _is_float(x: object) -> bool:
    return isinstance(x, Tensor) and x.dim() == 0 and x.is_floating_point() and not x.is_meta
