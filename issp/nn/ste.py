"""Masks that are chosen again in every forward; gradients pass straight through (STE, SR-STE).

Source: Zhou et al., "Learning N:M fine-grained structured sparse neural networks from scratch",
ICLR 2021.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import grad as conv_gradients

from issp import ops
from issp.ops import reference
from issp.ops.autograd import first_order
from issp.ops.keep import Keep


def kept_nm(weight: Tensor, keep: Keep) -> Tensor:
    """Bool [O / v, length of a row]: the n largest of every m, chosen by `issp.ops.nm_prune`."""
    _, mask = ops.nm_prune_with_mask(weight.detach().contiguous(), keep)
    return mask.reshape(weight.shape[0] // keep.v, keep.v, -1)[:, 0]


def kept_magnitudes(weight: Tensor, kept: int, v: int) -> Tensor:
    """Bool [O / v, length of a row]: the `kept` positions of the largest magnitudes, exactly.

    For v > 1 the magnitudes of the rows are added. Ties: the lowest index is pruned first.
    """
    scores = weight.detach().reshape(weight.shape[0] // v, v, -1).abs()
    scores = scores[:, 0] if v == 1 else scores.sum(1)
    flat = scores.flatten()
    threshold = reference.key(ops.magnitude_threshold([flat], [flat.numel() - kept]))
    keys = reference.key(flat)
    above, ties = keys > threshold, keys == threshold
    surplus = ties.sum() + above.sum() - kept
    return (above | (ties & (ties.cumsum(0, dtype=torch.int32) > surplus))).view_as(scores)


class StraightThrough(torch.autograd.Function):
    """Returns y; backward adds the gradient of the dense weight as if nothing were pruned.

    Args of `apply`:
        y: W' x with the pruned weight W', before bias or after.
        weight: [O, I] or [O, I, kh, kw], dense.
        x: what W' was applied to, detached; the gradient of x comes through y.
        kept: bool [O / v, length of a row] for SR-STE, which adds decay * weight where it is
            False; None for STE.
        decay: lambda_W of SR-STE.
        geometry: stride, padding, dilation of a convolution, or nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        weight: Tensor,
        x: Tensor,
        kept: Tensor | None,
        decay: float,
        geometry: dict[str, tuple[int, int]],
    ) -> Tensor:
        ctx.save_for_backward(x, weight, kept)
        ctx.decay, ctx.geometry = decay, geometry
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x, weight, kept = ctx.saved_tensors
        dense = None
        if ctx.needs_input_grad[1]:
            with torch.no_grad():
                x = x.to(grad.dtype)
                if ctx.geometry:
                    images, grads = (t.reshape(-1, *t.shape[-3:]) for t in (x, grad))
                    dense = conv_gradients.conv2d_weight(
                        images, weight.shape, grads, **ctx.geometry
                    )
                else:
                    outputs, inputs = weight.shape
                    dense = grad.reshape(-1, outputs).t() @ x.reshape(-1, inputs)
                dense = dense.to(weight.dtype)
                if kept is not None:
                    v = weight.shape[0] // kept.shape[0]
                    pruned = ~kept[:, None].expand(-1, v, -1).reshape(weight.shape)
                    dense = dense + ctx.decay * weight * pruned
            (dense,) = first_order([dense], grad)
        return grad, dense, None, None, None, None
