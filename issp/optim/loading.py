"""The checks of a saved optimizer state: torch loads what it is given and fails at the step."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class StateForm(NamedTuple):
    """What an optimizer's state consists of.

    Args:
        options: names of the options that must be numbers from 0 on; pairs of them for "betas".
        moments: names of the tensors that are like their parameter.
        required: names of all entries that a state cannot lack.
        sparse: whether sparse gradients leave sparse moments.
    """

    options: tuple[str, ...]
    moments: tuple[str, ...]
    required: tuple[str, ...]
    sparse: bool = False


def check_state(saved: Any, groups: Sequence[Mapping[str, Any]], form: StateForm) -> None:
    """Refuses a saved state that the optimizer's step could not go on with.

    Numbers of groups and of parameters are left to torch, which refuses others than expected.

    Args:
        saved: what the optimizer's `state_dict` has returned.
        groups: the optimizer's parameter groups.
        form: of the optimizer's state.

    Raises:
        ValueError: the first thing that does not fit.
    """
    if not (
        isinstance(saved, Mapping)
        and isinstance(saved.get("state"), Mapping)
        and isinstance(saved.get("param_groups"), list | tuple)
    ):
        raise ValueError(
            "the optimizer's state has no state and param_groups: it is something else"
        )
    for number, (own, group) in enumerate(zip(groups, saved["param_groups"], strict=False)):
        if not isinstance(group, Mapping) or not isinstance(group.get("params"), list | tuple):
            raise ValueError(f"parameter group {number} of the optimizer's state has no params")
        for name in form.options:
            _check_option(number, group, name)
        for key, parameter in zip(group["params"], own["params"], strict=False):
            if not isinstance(key, int | str):
                raise ValueError(f"parameter group {number} of the optimizer's state is damaged")
            entries = saved["state"].get(key, {})
            if not isinstance(entries, Mapping):
                raise ValueError(f"the optimizer's state of parameter {key} is damaged")
            if entries:
                required = form.required
                if group.get("amsgrad"):
                    required = (*required, "max_exp_avg_sq")
                _check_entries(f"the optimizer's state of parameter {key}", entries, required)
                _check_moments(key, entries, parameter, form)


def _check_option(number: int, group: Mapping[str, Any], name: str) -> None:
    value = group.get(name)
    values = [value]
    if name == "betas":
        values = list(value) if isinstance(value, list | tuple) and len(value) == 2 else [None]
    if not all(map(_is_count, values)):
        what = f"lacks {name}" if name not in group else f"has {name} {value}"
        raise ValueError(
            f"parameter group {number} of the optimizer's state {what}: it was saved by another "
            "optimizer or is damaged"
        )


def _is_count(x: object) -> bool:
    """Whether something is a number from 0 on, in a tensor or not."""
    if isinstance(x, Tensor):
        is_number = x.numel() == 1 and not x.is_complex() and x.device.type != "meta"
        x = x.item() if is_number and x.layout == torch.strided else None
    return isinstance(x, int | float | np.integer | np.floating) and bool(
        0 <= x < sys.float_info.max
    )


def _check_entries(where: str, entries: Mapping[str, Any], required: Sequence[str]) -> None:
    missing = [name for name in required if entries.get(name) is None]
    if missing:
        raise ValueError(
            f"{where} lacks {missing[0]}: it was saved by another optimizer or is damaged"
        )
    if "step" in required and not _is_count(entries["step"]):
        raise ValueError(f"step in {where} is no number from 0 on: it is damaged")


def _check_moments(
    key: object, entries: Mapping[str, Any], parameter: Tensor, form: StateForm
) -> None:
    for name in form.moments:
        x = entries.get(name)
        misfit = "" if x is None else _misfit(x, parameter, form.sparse)
        if misfit:
            raise ValueError(
                f"{name} in the optimizer's state of parameter {key} {misfit}: it belongs to "
                "another model or is damaged"
            )


def _misfit(x: object, parameter: Tensor, sparse: bool) -> str:
    """Why a moment does not belong to a parameter, or "". torch adapts device and float dtype."""
    if not isinstance(x, Tensor):
        return "is no tensor"
    if x.shape != parameter.shape:
        return f"has shape {tuple(x.shape)} but the parameter {tuple(parameter.shape)}"
    if _number_kind(x) != _number_kind(parameter):
        return f"has dtype {x.dtype} but the parameter {parameter.dtype}"
    if x.layout != torch.strided and not (sparse and x.layout == torch.sparse_coo):
        return f"has layout {x.layout}"
    if x.is_meta and not parameter.is_meta:
        return "has no values"
    return ""


def _number_kind(x: Tensor) -> tuple[bool, bool]:
    return x.is_floating_point(), x.is_complex()
