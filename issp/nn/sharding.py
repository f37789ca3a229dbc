"""Weights that `fully_shard` (FSDP2) distributes over the ranks of a process group, as DTensors.

The pruner works on the shards where every rank has whole rows of a weight, in the order of the
ranks. Everything else is refused here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(x: object) -> bool:
    """Whether a tensor is a DTensor, whatever its placements."""
    return hasattr(x, "device_mesh")


def local(x: Any) -> Tensor:
    """The shard of this rank, which may be empty; a plain tensor is returned as it is.

    It is the same object each time (`DTensor.to_local` makes a new one of a parameter).
    """
    return x._local_tensor if is_sharded(x) else x


def local_like(x: Any, weight: Any) -> Tensor:
    """The shard of a tensor that is distributed as a weight is; any other one as it is."""
    place = weight.device_mesh, weight.placements
    return local(x) if is_sharded(x) and (x.device_mesh, x.placements) == place else x


def unsupported_sharding(weight: Any) -> str:
    """Why the pruner cannot select over the shards of a DTensor, with the remedy, or ""."""
    # Imported here: torch may be built without it, and then nothing is a DTensor.
    from torch.distributed.tensor import Shard

    mesh, placements = weight.device_mesh, weight.placements
    if mesh.ndim != 1:
        return (
            f"is distributed over a mesh of {mesh.ndim} dimensions (HSDP, or tensor parallelism "
            "beside fully_shard): use fully_shard with a mesh of one dimension"
        )
    if type(placements[0]) is not Shard or placements[0].dim != 0:
        return (
            f"is distributed as {placements[0]!r}: shards are selected over where they are rows of "
            "the weight, Shard(dim=0), as fully_shard makes them without shard_placement_fn"
        )
    if weight.device.type not in (mesh.device_type, "meta"):
        return (
            f"has its shards on the {weight.device.type} and its mesh on {mesh.device_type}: use "
            "fully_shard without CPUOffloadPolicy"
        )
    if not local(weight).is_contiguous():
        return "has shards that are not contiguous: distribute weight.contiguous()"
    return ""


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of a model that `fully_shard` was called on."""
    return [m for m in model.modules() if any(c.__name__ == "FSDPModule" for c in type(m).__mro__)]


def reshard(modules: Sequence[Any]) -> None:
    """Puts the sharded weights of `fsdp_modules` back in place.

    After a forward pass that no backward pass follows, the outermost module keeps whole copies of
    its weights for the next one: these would not see what is written into the shards.
    """
    for module in modules:
        module.reshard()


def check_whole(model: nn.Module) -> None:
    """Refuses a model with sharded parameters, for what reads whole weights.

    Raises:
        ValueError: it has one.
    """
    for name, parameter in model.named_parameters():
        if is_sharded(parameter):
            raise ValueError(
                f"{name} is sharded: give the full state dict of the model (get_model_state_dict "
                "of torch.distributed.checkpoint, with full_state_dict=True) to one that is not, "
                "and use that"
            )


def sum_over_shards(weights: Sequence[Tensor], counts: Sequence[int]) -> list[int]:
    """Counts of all shards from those of this rank; those of plain tensors stay as they are.

    One reduction per mesh, which all of its ranks must call.
    """
    meshes = {w.device_mesh: w for w in weights if is_sharded(w)}  # type: ignore[attr-defined]
    result = list(counts)
    for mesh, first in meshes.items():
        places = [i for i, w in enumerate(weights) if getattr(w, "device_mesh", None) == mesh]
        summed = torch.tensor([counts[i] for i in places], dtype=torch.int64, device=first.device)
        torch.distributed.all_reduce(summed, group=mesh.get_group())
        for i, count in zip(places, summed.tolist(), strict=True):
            result[i] = count
    return result
