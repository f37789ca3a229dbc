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
        thresholds=torch.empty(0, dtype=torch.float32, device=device),
        masks=torch.empty(0, dtype=torch.int32, device=device),
        flips=integers.clone(),
        scratch=torch.zeros(SCRATCH_HEADER, dtype=torch.int32, device=device),
    )
