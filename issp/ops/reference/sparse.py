"""The oracle of the products: the dense weight is put together and torch does the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from issp.ops.geometry import Geometry
from issp.ops.validation import sparse as checks

ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}


def dense(values: Tensor, columns: Tensor, starts: Tensor, length: int) -> Tensor:
    """The weight [O, length] of a block list; see schemas_products.py."""
    blocks, v = starts.numel() - 1, values.shape[1]
    block = torch.repeat_interleave(
        torch.arange(blocks, device=values.device), starts.diff().long(), output_size=len(columns)
    )
    weight = values.new_zeros(blocks, v, length)
    weight[block, :, columns.long()] = values
    return weight.view(blocks * v, length)


def transpose(columns: Tensor, starts: Tensor, v: int, inputs: int, taps: int) -> list[Tensor]:
    """`transposed` of schemas_products.py: columns, starts, order, all int32."""
    counts = starts.diff().long()
    block = torch.repeat_interleave(torch.arange(len(counts), device=columns.device), counts)
    row = (block[:, None] * v + torch.arange(v, device=columns.device)).flatten()
    column = columns.long()[:, None].expand(-1, v).flatten()
    channel, tap = column // taps, taps - 1 - column % taps
    position = channel * (len(counts) * v * taps) + row * taps + tap
    order = torch.sort(position).indices
    fresh = (row * taps + tap)[order]
    begins = F.pad(torch.bincount(channel, minlength=inputs).cumsum(0), (1, 0))
    return [x.to(torch.int32) for x in (fresh, begins, order)]


def sparse_conv2d(
    x, values, columns, starts, transposed, bias, residual, geometry, activation="none"
) -> Tensor:
    """See `sparse_conv2d` in schemas_products.py."""
    checks.sparse_conv2d(
        x, values, columns, starts, transposed, bias, residual, geometry, activation
    )
    by, wide = Geometry.of(geometry), _wide(x)
    taps = by.kernel[0] * by.kernel[1]
    weight = dense(values, columns, starts, x.shape[1] * taps).to(wide)
    weight = weight.view(-1, x.shape[1], *by.kernel)
    y = F.conv2d(
        _placed(x.to(wide), by),
        weight,
        None if bias is None else bias.to(wide),
        by.stride,
        0,
        by.dilation,
    )
    return _finished(y, residual, activation, x.dtype)


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _placed(x: Tensor, by: Geometry) -> Tensor:
    """The input with its zeros in place: all that a convolution without padding reads."""
    n, channels, height, width = x.shape
    kernel, stride, padding, dilation, upsample, size = by
    spread = x.new_zeros(n, channels, height * upsample[0], width * upsample[1])
    spread[:, :, :: upsample[0], :: upsample[1]] = x
    extent = [(size[i] - 1) * stride[i] + (kernel[i] - 1) * dilation[i] + 1 for i in (0, 1)]
    after = [extent[i] - padding[i] - spread.shape[2 + i] for i in (0, 1)]
    return F.pad(spread, (padding[1], after[1], padding[0], after[0]))


def _finished(y: Tensor, residual: Tensor | None, activation: str, dtype: torch.dtype) -> Tensor:
    y = ACTIVATIONS[activation](y)
    return (y if residual is None else y + residual.to(y.dtype)).to(dtype)


def sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry) -> Tensor:
    """See `sparse_conv2d_values_grad` in schemas_products.py."""
    checks.sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry)
    by, wide = Geometry.of(geometry)._replace(size=tuple(grad.shape[2:])), _wide(x)
    shape = (grad.shape[1], x.shape[1], *by.kernel)
    weight = torch.nn.grad.conv2d_weight(
        _placed(x.to(wide), by), shape, grad.to(wide), by.stride, 0, by.dilation
    )
    return _taken(weight.flatten(1), columns, starts, v).to(x.dtype)


def _taken(weight: Tensor, columns: Tensor, starts: Tensor, v: int) -> Tensor:
    counts = starts.diff().long()
    block = torch.repeat_interleave(torch.arange(len(counts), device=columns.device), counts)
    return weight.view(len(counts), v, -1)[block, :, columns.long()]


def sparse_matmul(
    x, values, columns, starts, transposed, bias, residual, activation="none"
) -> Tensor:
    """See `sparse_matmul` in schemas_products.py."""
    checks.sparse_matmul(x, values, columns, starts, transposed, bias, residual, activation)
    wide = _wide(x)
    weight = dense(values, columns, starts, x.shape[-1]).to(wide)
    y = F.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    return _finished(y, residual, activation, x.dtype)


def sparse_matmul_values_grad(x, grad, columns, starts, v) -> Tensor:
    """See `sparse_matmul_values_grad` in schemas_products.py."""
    checks.sparse_matmul_values_grad(x, grad, columns, starts, v)
    wide = _wide(x)
    weight = grad.to(wide).view(-1, grad.shape[-1]).t() @ x.to(wide).view(-1, x.shape[-1])
    return _taken(weight, columns, starts, v).to(x.dtype)
