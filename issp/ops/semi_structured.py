"""Plain 2:4 in float16 and bfloat16 by torch's semi-structured tensors, where torch can do it.

Its cuSPARSELt path compresses a linear layer's weight once and multiplies by sparse tensor cores:
forward only, no convolution, no float32, both sizes of the weight multiples of 16 (hence not 60 or
180). Whether it is faster than dense is for the autotuner to measure.
Source: torch/sparse/semi_structured.py (`_DTYPE_SHAPE_CONSTRAINTS`); https://pytorch.org/docs/stable/sparse.html#sparse-semi-structured-tensors
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)
MULTIPLE = 16  # of both sizes of the weight
CAPABILITY = (8, 0)  # sparse tensor cores came with sm_80


def unsupported_reason(x: Tensor, weight_shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why torch cannot multiply x by a 2:4 weight of this shape and dtype; None where it can.

    Args:
        x: [..., I] input.
        weight_shape: of the dense weight, (O, I).
        dtype: of the weight, and of x.
    """
    if len(weight_shape) != 2:
        return "torch has no 2:4 convolution, only the matmul of a linear layer"
    if dtype not in DTYPES:
        return f"torch has no 2:4 matmul in {dtype}: only in float16 and bfloat16"
    if x.dtype != dtype:
        return f"the weight is {dtype} but x is {x.dtype}"
    if any(size < 1 or size % MULTIPLE for size in weight_shape):
        return (
            f"both sizes of a 2:4 weight must be multiples of {MULTIPLE}, not {tuple(weight_shape)}"
        )
    if not x.dim() or x.shape[-1] != weight_shape[1]:
        return f"x {tuple(x.shape)} does not end in the weight's {weight_shape[1]} inputs"
    if x.requires_grad and torch.is_grad_enabled():
        return "torch's 2:4 matmul has no derivative: it serves inference only"
    if x.device.type != "cuda":
        return f"torch's 2:4 matmul runs on an NVIDIA GPU, and x is on {x.device}"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < CAPABILITY:
        return f"a GPU of capability {capability[0]}.{capability[1]} has no sparse tensor cores"
    if torch.version.hip is not None or not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return None


def pack(weight: Tensor) -> Tensor:
    """A 2:4 weight, compressed once for `linear`.

    Args:
        weight: [O, I] float16 or bfloat16 on a GPU; of every 4 consecutive inputs 2 at most are
            not zero.

    Raises:
        ValueError: the weight is not 2:4, or not one that torch compresses.
    """
    weight = weight.detach()
    reason = unsupported_reason(weight, weight.shape, weight.dtype)
    if weight.dim() == 2 and weight.shape[1] % 4 == 0 and not _is_two_four(weight):
        raise ValueError("more than 2 of 4 weights are kept: prune with nm_prune(Keep(2, of=4))")
    if reason is not None:
        raise ValueError(reason)
    # By name: to_sparse_semi_structured may be told to take CUTLASS, which stops at sm_8x.
    return torch.sparse.SparseSemiStructuredTensorCUSPARSELT.from_dense(weight.contiguous())


def _is_two_four(weight: Tensor) -> bool:
    # torch compresses any weight, and drops what does not fit.
    return bool((weight.reshape(-1, 4).ne(0).sum(1) <= 2).all())


@torch.no_grad()
def linear(x: Tensor, packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias, without a graph.

    Args:
        x: [..., I] of the weight's dtype.
        packed: what `pack` returned, for a weight [O, I].
        bias: [O] of the weight's dtype, or none.

    Returns:
        [..., O].

    Raises:
        ValueError: x does not fit; see `unsupported_reason`.
    """
    reason = unsupported_reason(x.detach(), packed.shape, packed.dtype)
    if reason is not None:
        raise ValueError(reason)
    if not x.numel():
        return x.new_zeros(*x.shape[:-1], packed.shape[0])
    return F.linear(x.contiguous(), packed, bias)
