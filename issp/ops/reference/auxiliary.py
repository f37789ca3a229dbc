"""The reference of the auxiliary ops: ISS-R's rule, statistics of magnitudes, zeros."""

from __future__ import annotations

import torch
from torch import Tensor

from issp.ops.reference.pruning import INTEGER, unpack
from issp.ops.reference.updates import narrow, rounded, widen
from issp.ops.schemas import mask_layout, mask_words


def regularized(g: Tensor, w: Tensor, factor: Tensor) -> Tensor:
    """g + factor * w: the product rounded, then the sum, in float32 (float64 for float64).

    16-bit dtypes are widened before and narrowed once at the end. A NaN result is the positive
    quiet one with an empty payload, on every back end.
    """
    if w.dtype == torch.float64:
        total = g + factor * w
    else:
        total = narrow(rounded(widen(g) + rounded(widen(factor) * widen(w)))).to(w.dtype)
    return total.masked_fill(total.isnan(), float("nan"))


def regularize_(grads: list[Tensor], weights: list[Tensor], factors: Tensor, masks: Tensor) -> None:
    """See `regularize_` in issp/ops/schemas/pruning.py."""
    starts, _ = mask_layout([w.numel() for w in weights])
    for g, w, factor, start in zip(grads, weights, factors, starts, strict=True):
        kept = unpack(masks[start : start + mask_words(w.numel())], w.numel()).view(g.shape)
        g.copy_(torch.where(kept, g, regularized(g, w.view(g.shape), factor)))


def magnitude_statistics(tensors: list[Tensor]) -> Tensor:
    """See `magnitude_statistics` in issp/ops/schemas/pruning.py."""
    return torch.stack(
        [_statistics((x if x.dtype == torch.float64 else widen(x)).abs().view(-1)) for x in tensors]
    )


def _statistics(x: Tensor) -> Tensor:
    """The row of one tensor of magnitudes, float64.

    The mean starts from a guess near it, so that equal values have no variance. A power of two
    keeps the squares in the range of float64.
    """
    largest = x.max()
    scale = torch.ones_like(largest)
    scale = torch.where(largest > 2.0**400, 2.0**-700 * scale, scale)
    scale = torch.where(largest < 2.0**-400, 2.0**700 * scale, scale)
    x = x * scale
    guess = x[0] + (x - x[0]).mean()
    guess = guess.where(guess.isfinite(), 0)
    apart = x - guess
    squares = apart.square().sum() - apart.sum().square() / x.numel()
    variance = squares.clamp(min=0) / (x.numel() - 1)
    norm, mean = x.square().sum().sqrt(), guess + apart.mean()
    return torch.stack([norm, variance / scale, mean, variance.sqrt()]) / scale


def count_zeros(tensors: list[Tensor]) -> Tensor:
    """See `count_zeros` in issp/ops/schemas/pruning.py."""
    # the bits without the sign: where denormals are flushed, they would compare equal to zero
    return torch.stack([(x.view(INTEGER[x.dtype]) << 1 == 0).sum() for x in tensors])
