"""The rounding of float16 convolutions on AVX512-FP16, by numpy: slow and obvious.

See "float16" in issp/ops/schemas/sparse.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SUM_BLOCK = 64


def fused(weight: np.ndarray, x: np.ndarray, total: np.ndarray) -> np.ndarray:
    """weight * x + total in float16, rounded once.

    The product is exact in float64. Where the sum is not, one of the two is too small to matter.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        return (weight.astype(np.float64) * x + total).astype(np.float16)


def sparse_sums(image: Tensor, case, p) -> Tensor:
    """float32 [N, O, oh, ow]: bias and sums, before the epilogue.

    Args:
        image: float16, what a convolution without padding reads.
        case: a `ConvCase`.
        p: what `case.build(torch.float16)` returns.
    """
    pixels, values = image.numpy(), p.values.numpy()
    columns, starts = p.columns.tolist(), p.starts.tolist()
    (kh, kw), (oh, ow) = case.weight.kernel, case.outputs()
    totals = np.zeros((len(pixels), case.weight.rows, oh, ow), np.float32)
    if p.bias is not None:
        totals += p.bias.numpy().astype(np.float32)[:, None, None]
    for row in range(case.weight.rows):
        block, i = divmod(row, case.weight.v)
        entries = range(starts[block], starts[block + 1])
        for first in range(entries.start, max(entries.stop, entries.start + 1), SUM_BLOCK):
            total = np.zeros((len(pixels), oh, ow), np.float16)
            for e in entries[first - entries.start :][:SUM_BLOCK]:
                channel, tap = divmod(columns[e], kh * kw)
                ky, kx = (t * d for t, d in zip(divmod(tap, kw), case.dilation, strict=True))
                rows = slice(ky, ky + (oh - 1) * case.stride[0] + 1, case.stride[0])
                across = slice(kx, kx + (ow - 1) * case.stride[1] + 1, case.stride[1])
                total = fused(values[e, i], pixels[:, channel, rows, across], total)
            with np.errstate(invalid="ignore"):
                totals[:, row] += total.astype(np.float32)
    return torch.from_numpy(totals)
