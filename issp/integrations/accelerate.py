"""Pruning in a loop of Hugging Face's Accelerate."""

from __future__ import annotations

from typing import Any

from torch import nn

from issp.integrations.attachment import check_accelerate, check_arguments
from issp.pruning.attach import attach as attach_pruner
from issp.pruning.pruner import Pruner
from issp.utils.errors import MissingPackageError

try:
    from accelerate import Accelerator
except ImportError:
    raise MissingPackageError("Accelerate's loops", "accelerate", "accelerate") from None


def attach(accelerator: Accelerator, model: nn.Module, opt: Any, **arguments: Any) -> Pruner:
    """`issp.attach` for what `prepare` returned; `save_state` and `load_state` include the pruner.

    Call it before `load_state`. A method with a loss needs `pruner.loss()` added before
    `accelerator.backward`.

    Args:
        accelerator: that has prepared model and optimizer.
        model, opt: as prepared; `opt` may be a list.
        arguments: of `issp.attach` other than hook.

    Raises:
        TypeError: an argument that `issp.attach` does not have.
        ValueError: an engine that shards the weights, or as `issp.attach`.
    """
    check_arguments(arguments)
    check_accelerate(accelerator.state)
    pruner = attach_pruner(model, opt, **arguments)
    accelerator.register_for_checkpointing(pruner)
    return pruner
