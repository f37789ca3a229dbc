"""What the fused steps hand from function to function, beside `issp.ops.arguments`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from issp.ops.schemas import SCRATCH_HEADER


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
