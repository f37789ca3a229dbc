"""The reference of sparse convolution and sparse matmul: torch computes with the dense weight."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as conv_gradients

from issp.ops.arguments import Conv2dArgs, FusedConv2dArgs, MatmulArgs
from issp.ops.geometry import Geometry

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda y: y,
    "relu": F.relu,
    "gelu": F.gelu,
}


def to_dense(values: Tensor, col_indices: Tensor, crow_indices: Tensor, length: int) -> Tensor:
    """The dense weight [O, length]; see issp/ops/schemas/sparse.py for the format."""
    blocks, v = crow_indices.numel() - 1, values.shape[1]
    # The block of an entry: how many have begun. ONNX cannot repeat numbers by counts.
    starts = crow_indices[1:-1].long()
    begun = starts.new_zeros(len(col_indices) + 1)
    begun.scatter_add_(0, starts, torch.ones_like(starts))
    block = begun.cumsum(0)[:-1]
    weight = values.new_zeros(blocks, v, length)
    weight[block, :, col_indices.long()] = values
    return weight.view(blocks * v, length)


def transpose(
    col_indices: Tensor, crow_indices: Tensor, v: int, inputs: int, taps: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`transposed` of issp/ops/schemas/sparse.py: col_indices, crow_indices, order, all int32."""
    counts = crow_indices.diff().long()
    block = torch.repeat_interleave(counts)
    row = (block[:, None] * v + torch.arange(v, device=col_indices.device)).flatten()
    column = col_indices.long()[:, None].expand(-1, v).flatten()
    channel, tap = column // taps, taps - 1 - column % taps
    position = channel * (len(counts) * v * taps) + row * taps + tap
    order = torch.sort(position).indices
    columns = (row * taps + tap)[order]
    starts = F.pad(torch.bincount(channel, minlength=inputs).cumsum(0), (1, 0))
    return columns.to(torch.int32), starts.to(torch.int32), order.to(torch.int32)


def sparse_conv2d(*args: Any) -> Tensor:
    """See `sparse_conv2d` in issp/ops/schemas/sparse.py."""
    conv = Conv2dArgs(*args)
    return _apply_epilogue(_conv2d_sums(conv), conv)


def sparse_conv2d_fused(*args: Any) -> Tensor:
    """See `sparse_conv2d_fused` in issp/ops/schemas/sparse.py."""
    call = FusedConv2dArgs(*args)
    conv = call.conv2d()
    return F.pixel_shuffle(_apply_epilogue(_conv2d_sums(conv), conv, call.scale), call.shuffle)


def _conv2d_sums(conv: Conv2dArgs) -> Tensor:
    """W x + bias, not rounded to the dtype of x."""
    by, wide = Geometry.of(conv.geometry), _sum_dtype(conv.x)
    image = _padded(conv.x.to(wide), by)
    weight = _weight(conv, image.shape[1] * by.kernel[0] * by.kernel[1])
    return F.conv2d(
        image,
        weight.view(-1, image.shape[1], *by.kernel),
        None if conv.bias is None else conv.bias.to(wide),
        stride=by.stride,
        dilation=by.dilation,
    )


def _weight(call: Conv2dArgs | MatmulArgs, length: int) -> Tensor:
    weight = to_dense(call.values, call.col_indices, call.crow_indices, length)
    return weight.to(_sum_dtype(call.x))


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _padded(x: Tensor, by: Geometry) -> Tensor:
    """x with upsampling's and padding's zeros: what a convolution without padding reads.

    It has one channel at least, because torch convolves no image without channels.
    """
    n, channels, *sizes = x.shape
    extents = [
        (by.output_size[i] - 1) * by.stride[i] + (by.kernel[i] - 1) * by.dilation[i] + 1
        for i in (0, 1)
    ]
    image = x.new_zeros(n, max(1, channels), *extents)
    to, of = [], []
    for size, extent, padding, upsample in zip(
        sizes, extents, by.padding, by.upsample, strict=True
    ):
        # Pixel p lies at p * upsample + padding: from the first to the last that is inside.
        first = max(0, -(padding // upsample))
        end = max(first, min(size, -((padding - extent) // upsample)))
        of.append(slice(first, end))
        to.append(slice(first * upsample + padding, end * upsample + padding, upsample))
    seen = x[:, :, of[0], of[1]]
    if seen.numel():
        image[:, :channels, to[0], to[1]] = seen
    return image


def _apply_epilogue(y: Tensor, call: Conv2dArgs | MatmulArgs, scale: float = 1.0) -> Tensor:
    y = ACTIVATIONS[call.activation](y) * scale
    return (y if call.residual is None else y + call.residual.to(y.dtype)).to(call.x.dtype)


def sparse_conv2d_values_grad(
    x: Tensor,
    grad: Tensor,
    col_indices: Tensor,
    crow_indices: Tensor,
    v: int,
    geometry: Sequence[int],
) -> Tensor:
    """See `sparse_conv2d_values_grad` in issp/ops/schemas/sparse.py."""
    by, wide = Geometry.of(geometry)._replace(size=(grad.shape[2], grad.shape[3])), _sum_dtype(x)
    image = _padded(x.to(wide), by)
    weight = conv_gradients.conv2d_weight(
        image,
        (grad.shape[1], image.shape[1], *by.kernel),
        grad.to(wide),
        stride=by.stride,
        dilation=by.dilation,
    )
    return gather_entries(weight.flatten(1), col_indices, crow_indices, v).to(x.dtype)


def gather_entries(weight: Tensor, col_indices: Tensor, crow_indices: Tensor, v: int) -> Tensor:
    """[E, v]: the stored positions of a dense weight [O, length of a row]."""
    counts = crow_indices.diff().long()
    block = torch.repeat_interleave(counts)
    return weight.view(len(counts), v, weight.shape[1])[block, :, col_indices.long()]


def sparse_matmul(*args: Any) -> Tensor:
    """See `sparse_matmul` in issp/ops/schemas/sparse.py."""
    matmul = MatmulArgs(*args)
    x, bias, wide = matmul.x, matmul.bias, _sum_dtype(matmul.x)
    weight = _weight(matmul, x.shape[-1])
    y = F.linear(x.to(wide), weight, None if bias is None else bias.to(wide))
    return _apply_epilogue(y, matmul)


def sparse_matmul_values_grad(
    x: Tensor, grad: Tensor, col_indices: Tensor, crow_indices: Tensor, v: int
) -> Tensor:
    """See `sparse_matmul_values_grad` in issp/ops/schemas/sparse.py."""
    wide = _sum_dtype(x)
    tokens = math.prod(x.shape[:-1])
    by_row, by_input = (t.to(wide).view(tokens, t.shape[-1]) for t in (grad, x))
    weight = by_row.t() @ by_input
    return gather_entries(weight, col_indices, crow_indices, v).to(x.dtype)
