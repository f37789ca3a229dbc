"""What the frameworks share: checked arguments, refused engines, attaching in a resumed run."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from issp.pruning.attach import attach
from issp.pruning.pruner import Pruner

# Engines that keep a part of each weight per process, or step weights that are none of the module.
_REFUSED = ("DEEPSPEED", "FSDP", "MODELPARALLEL", "MEGATRON", "TORCHTP", "XLA")


def check_arguments(arguments: Mapping[str, Any]) -> None:
    """Refuses at once what `attach` would refuse when the training begins.

    Raises:
        TypeError: `attach` has no such argument, or the framework gives it.
        ValueError: `hook`, since the framework's loop calls no `pruner.step()`.
    """
    inspect.signature(attach).bind(None, None, **arguments)
    if "hook" in arguments:
        raise ValueError("hook: the framework's loop needs the optimizer's hook; drop the argument")


def check_engine(name: str) -> None:
    """Refuses engines whose optimizers do not step the module's own weights.

    Args:
        name: of a Lightning strategy or of one of accelerate's distributed types.

    Raises:
        ValueError: it is one of those.
    """
    if name.upper().replace("_", "").startswith(_REFUSED) or "XLA" in name:
        raise ValueError(
            f"{name} splits the weights, or steps copies of them, so that no process can prune "
            "whole layers: train on one device or with DistributedDataParallel"
        )


def check_accelerate(state: Any) -> None:
    """`check_engine` for accelerate's state.

    The type alone does not tell: constructing the state once more resets FSDP's to MULTI_GPU.

    Args:
        state: `AcceleratorState`.
    """
    for engine in ("fsdp", "megatron_lm", "deepspeed", "torch_tp"):
        if getattr(state, f"{engine}_plugin", None) is not None:
            check_engine(engine.upper())
    check_engine(state.distributed_type.name)


def attach_resumed(
    model: nn.Module,
    optimizers: Sequence[Optimizer],
    state: Mapping[str, Any] | None,
    arguments: Mapping[str, Any],
) -> Pruner:
    """Attaches a pruner, in a resumed run with its state, where the framework has loaded the rest.

    Args:
        model: with the weights of the checkpoint.
        optimizers: with their states of the checkpoint, or without any so far.
        state: of the pruner; None in a new run.
        arguments: of `attach`.

    Raises:
        ValueError: as `attach` and `Pruner.load_state_dict`.
    """
    if state is None:
        return attach(model, list(optimizers), **arguments)
    # Methods that fix their masks when they are attached change weights and moments at once.
    weights = copy.deepcopy(model.state_dict())
    moments = [copy.deepcopy(x.state_dict()) if x.state else None for x in optimizers]
    pruner = attach(model, list(optimizers), **arguments)
    try:
        pruner.load_state_dict(state)
    except ValueError:
        pruner.detach()
        raise
    finally:
        with torch.no_grad():
            for name, x in model.state_dict().items():
                if isinstance(x, torch.Tensor):
                    x.copy_(weights[name])
        for optimizer, saved in zip(optimizers, moments, strict=True):
            if saved is not None:
                optimizer.load_state_dict(saved)
    return pruner


def metrics(pruner: Pruner) -> dict[str, float]:
    """What a training logs: shares of zeros and of selected weights, changed bits of the masks."""
    summary = pruner.summary()
    return {
        "zeros": summary.sparsity,
        "selected": summary.selected / summary.numel,
        "flips": float(sum(row.flips for row in summary.rows if row.tied_to is None)),
    }
