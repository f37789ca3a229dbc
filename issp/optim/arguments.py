"""The arguments of the optimizer ops, named; each tuple expands once, in the schema's order.

`torch.ops.issp.adam_soft_shrink_(*AdamArgs(...), *PruneArgs(...))`; the schemas and their exact
semantics stand in `issp/ops/schemas/pruning.py`. P weights of N are pruned: the first P.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from issp.ops.schemas import SCRATCH_HEADER


class AdamArgs(NamedTuple):
    """Adam's part.

    Args:
        weights, grads, exp_avgs, exp_avg_sqs: N contiguous tensors each, float32 (gradients also
            bfloat16), one device.
        steps: N float32 tensors of one element.
        lr: used where `lr_tensor` is None.
        decoupled: weight decay as AdamW has it.
        lr_tensor: one element, on the weights' device.
        grad_scale: float32, one element: the gradients are divided by it.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    exp_avgs: list[Tensor]
    exp_avg_sqs: list[Tensor]
    steps: list[Tensor]
    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    maximize: bool
    lr_tensor: Tensor | None
    grad_scale: Tensor | None


class SGDArgs(NamedTuple):
    """SGD's part.

    Args:
        weights, grads, lr, lr_tensor, grad_scale: as in `AdamArgs`.
        momentum_buffers: as `weights`; empty if `momentum` is 0.
        first: per buffer, whether it holds nothing yet.
    """

    weights: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    first: list[bool]
    lr: float
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    lr_tensor: Tensor | None
    grad_scale: Tensor | None


class StepArgs(NamedTuple):
    """What Adam's part and SGD's part share besides their tensors; see `AdamArgs`."""

    lr: float
    lr_tensor: Tensor | None
    weight_decay: float
    maximize: bool
    grad_scale: Tensor | None


class PruneArgs(NamedTuple):
    """The pruning part, the same for all optimizers.

    Args:
        k: int64 [P], how many weights are selected.
        shrink: factor of the selected weights, 0..1.
        thresholds: float32 [P].
        masks: int32, packed.
        flips: int64 [P].
        scratch: int32, working memory.
        found_inf: float32, one element: nothing is modified where it is not 0.
        frozen: apply the masks, select nothing.
        bracket: search around the previous threshold first; never changes the result.
        patterns: as in `ShrinkState`.
    """

    k: Tensor
    shrink: float
    thresholds: Tensor
    masks: Tensor
    flips: Tensor
    scratch: Tensor
    found_inf: Tensor | None
    frozen: bool
    bracket: bool
    patterns: list[int]


class PruneState(NamedTuple):
    """The tensors among `PruneArgs` that are kept from step to step."""

    k: Tensor
    thresholds: Tensor
    masks: Tensor
    flips: Tensor
    scratch: Tensor


def no_state(device: torch.device) -> PruneState:
    """The state of a call that prunes nothing."""
    integers = torch.empty(0, dtype=torch.int64, device=device)
    return PruneState(
        k=integers,
        thresholds=torch.empty(0, device=device),
        masks=torch.empty(0, dtype=torch.int32, device=device),
        flips=integers.clone(),
        scratch=torch.zeros(SCRATCH_HEADER, dtype=torch.int32, device=device),
    )
