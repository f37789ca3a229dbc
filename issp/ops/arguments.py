"""The long argument lists of the ops, named; each tuple has the order and defaults of its schema.

An optimizer op takes two of them, one behind the other:
`torch.ops.issp.adam_soft_shrink_(*AdamArgs(...), *PruneArgs(...))`. The exact semantics stand in
`issp/ops/schemas`. P weights of N are pruned: the first P.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

from torch import Tensor


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
    found_inf: Tensor | None = None
    frozen: bool = False
    bracket: bool = True
    patterns: Sequence[int] = ()


class Conv2dArgs(NamedTuple):
    """The arguments of `sparse_conv2d`."""

    x: Tensor
    values: Tensor
    col_indices: Tensor
    crow_indices: Tensor
    transposed: Sequence[Tensor]
    bias: Tensor | None
    residual: Tensor | None
    geometry: Sequence[int]
    activation: str = "none"


class FusedConv2dArgs(NamedTuple):
    """The arguments of `sparse_conv2d_fused`: those of `sparse_conv2d` and two more."""

    x: Tensor
    values: Tensor
    col_indices: Tensor
    crow_indices: Tensor
    transposed: Sequence[Tensor]
    bias: Tensor | None
    residual: Tensor | None
    geometry: Sequence[int]
    activation: str
    scale: float
    shuffle: int

    def conv2d(self) -> Conv2dArgs:
        """The arguments of the convolution."""
        weight = (self.values, self.col_indices, self.crow_indices, self.transposed)
        return Conv2dArgs(self.x, *weight, self.bias, self.residual, self.geometry, self.activation)


class MatmulArgs(NamedTuple):
    """The arguments of `sparse_matmul`: those of `sparse_conv2d`, without a geometry."""

    x: Tensor
    values: Tensor
    col_indices: Tensor
    crow_indices: Tensor
    transposed: Sequence[Tensor]
    bias: Tensor | None
    residual: Tensor | None
    activation: str = "none"


UpdateArgs = TypeVar("UpdateArgs", AdamArgs, SGDArgs)


def split_update(kind: type[UpdateArgs], args: Sequence[Any]) -> tuple[UpdateArgs, PruneArgs]:
    """The arguments of an optimizer op as torch passes them: without trailing defaults."""
    count = len(kind._fields)
    return kind(*args[:count]), PruneArgs(*args[count:])
