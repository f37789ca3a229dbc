"""Sparse layers that compute in float16 from one to the next."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from issp.deploy.derived import DerivedLayer, derive
from issp.nn.padding import numeric_padding
from issp.ops import sparse
from issp.ops.formats import SparseRows

# Rows that may share positions, the widest first: they take the fewest loads.
ROWS_PER_BLOCK = (8, 4, 2, 1)
# Rows that share positions may store this many times the weights that are not zero.
MAX_FILL = 1.25


class HalfLayer(DerivedLayer):
    """A sparse layer in float16. Where a gradient may be wanted, torch computes it.

    Args of a call:
        input: float16, then the result is; of another dtype, then it is of that one.
        residual, activation: see `issp.ops.sparse_conv2d`.
        further: scale and shuffle of a convolution, see `issp.ops.sparse.conv2d`.
    """

    def _make_form(self, weight: Tensor, bias: Tensor | None) -> tuple[SparseRows, Tensor | None]:
        rows = SparseRows.from_dense(weight.half(), self.v)
        return rows, None if bias is None else bias.half()


class HalfConv2d(HalfLayer, nn.Conv2d):
    """A convolution; see `HalfLayer`."""

    def forward(
        self,
        input: Tensor,
        residual: Tensor | None = None,
        activation: str = "none",
        **further: Any,
    ) -> Tensor:
        if torch.is_grad_enabled() or input.dim() != 4:
            return super().forward(input)
        weight, bias = self._derived()
        y = sparse.conv2d(
            *(input.half(), weight, bias, residual, activation),
            stride=self.stride,
            padding=numeric_padding(self),
            dilation=self.dilation,
            **further,
        )
        return y.to(input.dtype)


class HalfLinear(HalfLayer, nn.Linear):
    """A linear layer; see `HalfLayer`."""

    def forward(
        self, input: Tensor, residual: Tensor | None = None, activation: str = "none"
    ) -> Tensor:
        if torch.is_grad_enabled():
            return super().forward(input)
        weight, bias = self._derived()
        y = sparse.matmul(input.half(), weight, bias, residual, activation)
        return y.to(input.dtype)


def half_layer(module: nn.Module, weight: Tensor) -> HalfConv2d | HalfLinear:
    """The same layer in float16, with the same parameters, of as many rows per block as fit.

    Args:
        module: an nn.Conv2d or nn.Linear that a sparse layer could replace.
        weight: its own.
    """
    v = rows_per_block(weight)
    if isinstance(module, nn.Linear):
        return derive(module, HalfLinear, v)
    return derive(module, HalfConv2d, v)


def rows_per_block(weight: Tensor) -> int:
    """The most rows that share their positions without too many stored zeros."""
    kept = int(weight.count_nonzero())
    for v in ROWS_PER_BLOCK:
        if weight.shape[0] % v == 0:
            stored = weight.detach().reshape(weight.shape[0] // v, v, -1).ne(0).any(1).sum() * v
            if stored <= MAX_FILL * kept:
                return v
    return 1
