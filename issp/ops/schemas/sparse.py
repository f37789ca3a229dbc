"""The op schemas: sparse convolution and sparse matmul, with their semantics and fakes.

One format for N:M and unstructured weights: torch's BSR with blocks of (v, 1), the v rows of a
block row share their positions
    values        [E, v]: entry e holds one weight for each of its v rows.
    col_indices   int32 [E]: position in a row of the dense weight, (channel * kh + ky) * kw + kx;
                  strictly ascending within a block row.
    crow_indices  int32 [O / v + 1], ascending from 0 to E: block row b (output rows
                  b*v .. b*v + v - 1) owns the entries crow_indices[b] .. crow_indices[b + 1].
    transposed    none, or the weight transposed and its taps turned by 180 degrees,
                  [I, O, kh, kw], with v = 1: col_indices int32 [E * v], crow_indices int32 [I + 1]
                  and order int32 [E * v], which says where each value stands in values.view(-1).
                  Backward uses it; when it is left out, backward computes it.
Common to all sparse ops
    dtypes        float32, float64, bfloat16, float16, the same for all tensors of values; sums in
                  float32 (float64 for float64), rounded once. Contiguous tensors, one device.
    float16       on a CPU with AVX512-FP16, sparse_conv2d (and so its gradient of x) sums in
                  float16: the entries of a row in stored order, each by a multiply-add that rounds
                  once, to nearest even. After every 64 entries of a row, and after its last, the
                  sum is added to the row's float32 total, which begins with the bias. Activation
                  and residual follow in float32. Denormals are kept in every floating-point mode;
                  a sum of up to 64 products beyond 65504 becomes infinity. Without AVX512-FP16,
                  and in all other ops and back ends, sums are those of the other dtypes.
    result        activation(W x + bias) + residual; activation: none, relu, gelu (by erf).
                  Gradients flow to x, values and bias of calls without activation and residual.
    order         sums are taken in an order that depends on shapes and positions alone: the same
                  bits in every run and for any number of threads. Back ends differ in rounding.
    geometry      of a convolution, height and width of each: kernel, stride, padding, dilation
                  and, but for the gradient of values, upsample, size. One list of 12 (8) numbers,
                  because every list adds 0.7 us to a call; issp/ops/geometry.py names them. They
                  may be symbols: one traced program then serves images of every size.
    errors        everything is checked first. Positions are checked on the CPU; on a GPU, where a
                  check would wait for the device, a position outside the weight counts as zero.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from issp.ops.arguments import Conv2dArgs, FusedConv2dArgs, MatmulArgs
from issp.ops.geometry import Geometry
from issp.ops.schemas.pruning import library, one_device

# x [N, I, H, W] -> [N, O, size[0], size[1]]. Output (y, x) sees, at tap (ky, kx), the input at
# u = y * stride - padding + ky * dilation (same for x) divided by `upsample`: zero where u is not
# divisible, or lies outside. padding may be negative. upsample > 1 and stride = 1 make the
# gradient of a strided convolution. residual: of the result's shape. geometry: 12 numbers.
library.define(
    "sparse_conv2d(Tensor x, Tensor values, Tensor col_indices, Tensor crow_indices, "
    "Tensor[] transposed, Tensor? bias, Tensor? residual, SymInt[] geometry, "
    'str activation="none") -> Tensor'
)
# pixel_shuffle(activation(W x + bias) * scale + residual, shuffle): [N, O / shuffle^2,
# size[0] * shuffle, size[1] * shuffle]. Without a gradient, and fast on CPUs alone. shuffle: 1, or
# above where there is no residual.
library.define(
    "sparse_conv2d_fused(Tensor x, Tensor values, Tensor col_indices, Tensor crow_indices, "
    "Tensor[] transposed, Tensor? bias, Tensor? residual, SymInt[] geometry, "
    "str activation, float scale, int shuffle) -> Tensor"
)
# [E, v]: the gradient of sum(grad * sparse_conv2d(x, values, ...)) with upsample 1, for every
# entry; grad [N, O, oh, ow]. geometry: 8 numbers.
library.define(
    "sparse_conv2d_values_grad(Tensor x, Tensor grad, Tensor col_indices, Tensor crow_indices, "
    "int v, SymInt[] geometry) -> Tensor"
)
# x [..., I] -> [..., O]; a convolution's op with one tap and the channels innermost in memory.
library.define(
    "sparse_matmul(Tensor x, Tensor values, Tensor col_indices, Tensor crow_indices, "
    'Tensor[] transposed, Tensor? bias, Tensor? residual, str activation="none") -> Tensor'
)
# [E, v]; grad [..., O].
library.define(
    "sparse_matmul_values_grad(Tensor x, Tensor grad, Tensor col_indices, Tensor crow_indices, "
    "int v) -> Tensor"
)
# `transposed` of a weight [O, inputs, kh, kw] with taps = kh * kw. An op of its own because
# torch.compile cannot trace the sizes in between.
library.define(
    "_sparse_transpose(Tensor col_indices, Tensor crow_indices, int v, int inputs, int taps) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("issp::sparse_conv2d", lib=library)
def _(*args: Any) -> Tensor:
    conv = Conv2dArgs(*args)
    size = Geometry.of(conv.geometry).output_size
    return conv.x.new_empty((conv.x.shape[0], _rows_on_one_device(conv), *size))


@torch.library.register_fake("issp::sparse_conv2d_fused", lib=library)
def _(*args: Any) -> Tensor:
    call = FusedConv2dArgs(*args)
    height, width = Geometry.of(call.geometry).output_size
    rows, by = _rows_on_one_device(call.conv2d()), call.shuffle
    return call.x.new_empty((call.x.shape[0], rows // by**2, height * by, width * by))


@torch.library.register_fake("issp::sparse_matmul", lib=library)
def _(*args: Any) -> Tensor:
    matmul = MatmulArgs(*args)
    return matmul.x.new_empty((*matmul.x.shape[:-1], _rows_on_one_device(matmul)))


def _rows_on_one_device(call: Conv2dArgs | MatmulArgs) -> int:
    """The rows of the weight, after a check that all tensors are on one device."""
    one_device(*call)
    return (call.crow_indices.shape[0] - 1) * call.values.shape[1]


@torch.library.register_fake("issp::sparse_conv2d_values_grad", lib=library)
@torch.library.register_fake("issp::sparse_matmul_values_grad", lib=library)
def _(
    x: Tensor, grad: Tensor, col_indices: Tensor, crow_indices: Tensor, v: int, *_: Any
) -> Tensor:
    one_device(x, grad, col_indices, crow_indices)
    return x.new_empty((col_indices.shape[0], v))


@torch.library.register_fake("issp::_sparse_transpose", lib=library)
def _(
    col_indices: Tensor, crow_indices: Tensor, v: int, inputs: int, taps: int
) -> tuple[Tensor, Tensor, Tensor]:
    one_device(col_indices, crow_indices)
    entries = col_indices.shape[0] * v
    columns, rows = col_indices.new_empty(entries), col_indices.new_empty(inputs + 1)
    return columns, rows, col_indices.new_empty(entries)
