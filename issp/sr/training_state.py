"""The form of a training state: checked as a whole before any part of it is loaded.

Each part also checks what it alone knows, such as the shapes of its tensors, when it is loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from issp.sr.tensor_files import is_plain

_SECTIONS = ("model", "optimizer", "batches", "meter", "best", "random")
_OPTIONAL_SECTIONS = ("ema", "pruner")
_COUNTS = ("iteration", "meter.count", "best.iteration", "batches.sampler.position")
_BEST = ("best.psnr", "best.iteration", "best.scored_on")
_MOST = 2**53  # of a count
# Where tensors stand, and where each of their numbers is finite in a run that can go on.
_TENSORS = re.compile(
    r"(model|ema|optimizer\.state|random)\..+|pruner\.layers\..+\.(mask|threshold)"
    r"|pruner\.method_state\..+|meter\.(loss|ranks)"
)
_FINITE = re.compile(r"(model|ema|optimizer|meter)\..+")


def check(state: dict[str, Any]) -> None:
    """Refuses a state of another form than `TrainingRun.save_state` writes.

    Raises:
        ValueError: the first place that is damaged.
    """
    if {"optimizers", "schedulers"} <= state.keys():
        raise ValueError(
            "it is one of BasicSR, without weights: begin with its model, path.pretrain_network_g"
        )
    for name in (*_SECTIONS, *_OPTIONAL_SECTIONS):
        section = state.get(name)
        if not isinstance(section, dict) and (section is not None or name in _SECTIONS):
            raise ValueError(f"it has no section {name}: it is damaged or something else")
    leaves = dict(_leaves(state, ""))
    for name in _COUNTS:
        if not _is_count(leaves.get(name)):
            raise ValueError(f"{name} is {_shown(leaves.get(name))}: it is damaged")
    pending = state.get("pending", False)
    if not isinstance(pending, bool) or (pending and not leaves["meter.count"]):
        raise ValueError(f"pending is {_shown(pending)}: it is damaged")
    psnr = leaves.get("best.psnr")
    if not isinstance(psnr, float) or math.isnan(psnr):
        raise ValueError(f"best.psnr is {_shown(psnr)}: it is damaged")
    unknown = [name for name in leaves if name.startswith("best.") and name not in _BEST]
    if unknown:
        raise ValueError(f"it has the unknown entry {unknown[0]}: it is of another version")
    for name, value in leaves.items():
        if isinstance(value, Tensor):
            _check_tensor(name, value)
        elif name.startswith("optimizer.state.") and not _is_number(value):
            raise ValueError(f"{name} is {_shown(value)}: it is damaged")


def _leaves(tree: object, name: str) -> Iterator[tuple[str, object]]:
    """The values inside of nested dicts and lists, with their dotted names."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{name}.{key}" if name else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{name}.{number}")
    else:
        yield name, tree


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST


def _is_number(value: object) -> bool:
    return value is None or isinstance(value, int | float) and abs(value) <= _MOST


def _check_tensor(name: str, value: Tensor) -> None:
    if not _TENSORS.fullmatch(name):
        raise ValueError(f"{name} is {_shown(value)}: it is damaged")
    if not is_plain(value) or (name.startswith("pruner.") and not value.is_contiguous()):
        raise ValueError(f"{name} does not hold plain numbers: it is damaged")
    if name == "meter.loss" and value.shape != ():
        raise ValueError(f"{name} has shape {tuple(value.shape)}: it is damaged")
    if _FINITE.fullmatch(name) and not torch.isfinite(value).all():
        raise ValueError(f"{name} holds NaN or infinite numbers: resume from an earlier state")
    if name.endswith("exp_avg_sq") and value.is_floating_point() and (value < 0).any():
        raise ValueError(f"{name}, a mean of squares, holds negative numbers: it is damaged")


def _shown(value: object) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)[:40]
