"""DistributedDataParallel around a model whose parameters change their shapes."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from issp.nn import module_swap

_MIB = 1 << 20
# Arguments of its constructor that it keeps under their names, in one version of torch or another.
_SETTINGS = {
    *("device_ids", "output_device", "dim", "process_group", "mixed_precision", "static_graph"),
    *("find_unused_parameters", "gradient_as_bucket_view", "skip_all_reduce_unused_params"),
    *("broadcast_buffers", "forward_sync_buffers", "batched_grad_copy"),
}


def wrappers_of(modules: Iterable[nn.Module]) -> list[DistributedDataParallel]:
    """The wrappers that train any of the modules, wherever the user keeps them.

    Raises:
        ValueError: one of them has a communication hook, which a new reducer would not have.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    wanted = set(map(id, modules))
    found = [
        x
        for x in gc.get_objects()
        if isinstance(x, DistributedDataParallel) and wanted & set(map(id, x.modules()))
    ]
    for wrapper in found:
        if wrapper._comm_hooks:
            raise ValueError(
                "freeze(accelerate=...) gives DistributedDataParallel new buckets, which its "
                "communication hook does not follow: freeze without accelerate, or without the hook"
            )
    return found


def renew(wrapper: DistributedDataParallel) -> None:
    """Gives a wrapper the buckets that its parameters need now; its settings stay.

    All ranks must call it at the same step.
    """
    hooks = {name: getattr(wrapper, name) for name in module_swap.CALLS}
    parameters = inspect.signature(DistributedDataParallel.__init__).parameters
    known = _SETTINGS & parameters.keys() & vars(wrapper).keys()
    settings = {name: getattr(wrapper, name) for name in known}
    cap = max(1, wrapper.bucket_bytes_cap // _MIB)
    wrapper.__init__(wrapper.module, bucket_cap_mb=cap, **settings)  # type: ignore[misc]
    for name, own in hooks.items():
        setattr(wrapper, name, own)
