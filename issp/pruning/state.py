"""The pruner's state as plain dicts, numbers and tensors, and the checks when it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from issp.nn.selection import Layer
from issp.ops.schemas import mask_words
from issp.pruning.buckets import Record

_LAYER = ("shape", "k", "threshold", "flips", "mask")


def pack(records: Mapping[str, Record]) -> dict[str, dict]:
    """The records as dicts: what `torch.load(weights_only=True)` reads."""
    return {
        name: {
            "shape": list(record.shape),
            "k": record.k,
            "threshold": record.threshold,
            "flips": record.flips,
            "mask": record.packed,
        }
        for name, record in records.items()
    }


def unpack(
    state: Mapping, layers: Sequence[Layer], configuration: Mapping[str, object]
) -> dict[str, Record]:
    """The records of a saved state, checked against the layers and the settings here.

    Args:
        state: what `Pruner.state_dict` gave.
        layers: those of the pruner that loads.
        configuration: settings that must be equal.

    Raises:
        ValueError: the first difference found.
    """
    missing = {"version", "stage", "step_count", "layers", *configuration} - set(state)
    if missing:
        raise ValueError(
            f"the pruner's state lacks {', '.join(sorted(missing))}: it is something else"
        )
    if state["version"] != 1:
        raise ValueError(f"the pruner's state has version {state['version']}: this issp reads 1")
    for name, mine in configuration.items():
        theirs = state[name]
        if theirs == mine:
            continue
        if name == "targets":
            name, mine, theirs = _first_difference(mine, theirs)
        raise ValueError(
            f"the pruner's state was saved with {name} {theirs}, but here it is {mine}: attach "
            "with the same arguments, or load with strict=False"
        )
    shapes = {layer.name: tuple(layer.weight.shape) for layer in layers}
    return {name: _record(name, saved, shapes) for name, saved in state["layers"].items()}


def _first_difference(mine: Mapping, theirs: Mapping) -> tuple[str, object, object]:
    for name in [*mine, *theirs]:
        if mine.get(name) != theirs.get(name):
            return f"for layer {name} the sparsity", mine.get(name), theirs.get(name)
    return "the layers", list(mine), list(theirs)


def _record(name: str, saved: Mapping, shapes: Mapping[str, tuple[int, ...]]) -> Record:
    if name not in shapes:
        raise ValueError(f"the pruner's state has layer {name}, which is not pruned here")
    lacking = [key for key in _LAYER if key not in saved]
    if lacking:
        raise ValueError(f"the pruner's state lacks {lacking[0]} of layer {name}: it is damaged")
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
    return Record(shape, saved["k"], saved["threshold"], saved["flips"], mask)
