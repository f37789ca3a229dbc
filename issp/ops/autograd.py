"""First derivatives of sparse convolution and sparse matmul in x, values and bias.

The gradient of x is the same op with the transposed weight, its taps turned by 180 degrees; that of
the values is computed at the stored positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp.ops.formats import transpose
from issp.ops.geometry import Geometry
from issp.ops.schemas import library

_op = torch.ops.issp


class _FirstOrder(torch.autograd.Function):
    """Returns gradients as they are; differentiating them again raises an error that says why."""

    @staticmethod
    def forward(ctx: Any, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise NotImplementedError(
            "sparse ops have no second derivatives: leave create_graph=True out, or use the "
            "dense weight, p.to_dense()"
        )


def first_order(gradients: Sequence[Tensor | None], *sources: Tensor) -> list[Tensor | None]:
    """The gradients, made so that differentiating them again raises an error that says why."""
    if not torch.is_grad_enabled():
        return list(gradients)
    return [None if g is None else _FirstOrder.apply(g, *sources) for g in gradients]


def _refuse(op: str, residual: Tensor | None, activation: str) -> None:
    if activation != "none" or (residual is not None and residual.requires_grad):
        raise RuntimeError(
            f"torch.ops.issp.{op} has no gradient through activation and residual: use "
            f"issp.ops.{op}, which composes them, or torch.no_grad()"
        )


class _Gradients(NamedTuple):
    x: Tensor | None
    values: Tensor | None
    bias: Tensor | None


class _Inputs(NamedTuple):
    """The arguments of both ops in the order of their schemas; a matmul has no geometry."""

    x: Tensor
    values: Tensor
    col_indices: Tensor
    crow_indices: Tensor
    transposed: Sequence[Tensor]
    bias: Tensor | None
    residual: Tensor | None


_BIAS = _Inputs._fields.index("bias")


def _save(ctx: Any, inputs: _Inputs, channels: int) -> None:
    """Keeps what the gradients that are wanted will read, nothing else."""
    x, values = inputs.x, inputs.values
    ctx.x_needs_grad, ctx.values_need_grad = x.requires_grad, values.requires_grad
    ctx.v, ctx.channels = values.shape[1], channels
    ctx.save_for_backward(
        *(x if values.requires_grad else None, values if x.requires_grad else None),
        *(inputs.col_indices, inputs.crow_indices),
        *(inputs.transposed if x.requires_grad else ()),
    )


def _transposed_weight(ctx: Any, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, col_indices and crow_indices of the transposed weight."""
    _, values, col_indices, crow_indices, *transposed = ctx.saved_tensors
    if not transposed:
        transposed = transpose(col_indices, crow_indices, ctx.v, (0, ctx.channels, *kernel))
    columns, rows, order = transposed
    return values.reshape(-1).index_select(0, order).view(-1, 1), columns, rows


def _scatter_grads(ctx: Any, grad: Tensor, gradients: _Gradients) -> tuple:
    """The gradients in the order of the op's arguments; `transposed` has a list of None."""
    x, values, *_ = ctx.saved_tensors
    sources = [t for t in (x, values) if t is not None]
    checked = _Gradients(*first_order(gradients, grad, *sources))
    result: list[Any] = [
        [None] * len(n) if isinstance(n, list) else None for n in ctx.needs_input_grad
    ]
    for name, gradient in checked._asdict().items():
        result[_Inputs._fields.index(name)] = gradient
    return tuple(result)


def _conv2d_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *first, geometry, activation = inputs
    arguments = _Inputs(*first)
    _refuse("sparse_conv2d", arguments.residual, activation)
    ctx.geometry = Geometry.of(geometry)
    if arguments.values.requires_grad and ctx.geometry.upsample != (1, 1):
        raise RuntimeError(
            f"the gradient of values needs upsample 1, not {ctx.geometry.upsample}: spread x by "
            "zeros"
        )
    ctx.image = tuple(arguments.x.shape[2:])
    _save(ctx, arguments, channels=arguments.x.shape[1])


def _conv2d_backward(ctx: Any, grad: Tensor) -> tuple:
    with torch.no_grad():
        gradients = _conv2d_gradients(ctx, grad.contiguous())
    return _scatter_grads(ctx, grad, gradients)


def _conv2d_gradients(ctx: Any, grad: Tensor) -> _Gradients:
    by = ctx.geometry
    grad_x = grad_values = grad_bias = None
    if ctx.x_needs_grad:
        mirrored = Geometry(
            kernel=by.kernel,
            stride=by.upsample,
            padding=_grad_padding(by),
            dilation=by.dilation,
            upsample=by.stride,
            size=ctx.image,
        )
        grad_x = _op.sparse_conv2d(
            grad, *_transposed_weight(ctx, by.kernel), [], None, None, mirrored.for_conv2d()
        )
    if ctx.values_need_grad:
        x, _, col_indices, crow_indices, *_ = ctx.saved_tensors
        grad_values = _op.sparse_conv2d_values_grad(
            x, grad, col_indices, crow_indices, ctx.v, by.for_values_grad()
        )
    if ctx.needs_input_grad[_BIAS]:
        grad_bias = grad.sum((0, 2, 3))
    return _Gradients(grad_x, grad_values, grad_bias)


def _grad_padding(by: Geometry) -> tuple[int, int]:
    """Padding of the convolution that computes the gradient of x; it may be negative."""
    top, left = (
        d * (k - 1) - p for k, p, d in zip(by.kernel, by.padding, by.dilation, strict=True)
    )
    return top, left


def _matmul_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *first, activation = inputs
    arguments = _Inputs(*first)
    _refuse("sparse_matmul", arguments.residual, activation)
    _save(ctx, arguments, channels=arguments.x.shape[-1])


def _matmul_backward(ctx: Any, grad: Tensor) -> tuple:
    with torch.no_grad():
        gradients = _matmul_gradients(ctx, grad.contiguous())
    return _scatter_grads(ctx, grad, gradients)


def _matmul_gradients(ctx: Any, grad: Tensor) -> _Gradients:
    grad_x = grad_values = grad_bias = None
    if ctx.x_needs_grad:
        grad_x = _op.sparse_matmul(grad, *_transposed_weight(ctx, ()), [], None, None)
    if ctx.values_need_grad:
        x, _, col_indices, crow_indices, *_ = ctx.saved_tensors
        grad_values = _op.sparse_matmul_values_grad(x, grad, col_indices, crow_indices, ctx.v)
    if ctx.needs_input_grad[_BIAS]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return _Gradients(grad_x, grad_values, grad_bias)


class Conv2d(torch.autograd.Function):
    """The op and its registered gradient without the detour that makes the op traceable.

    Of a training step of 60 channels on 48x48 pixels that detour is half the time.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = _op.sparse_conv2d(*args)
        _conv2d_context(ctx, args, y)
        return y

    backward = staticmethod(_conv2d_backward)


class Matmul(torch.autograd.Function):
    """As `Conv2d`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = _op.sparse_matmul(*args)
        _matmul_context(ctx, args, y)
        return y

    backward = staticmethod(_matmul_backward)


torch.library.register_autograd(
    "issp::sparse_conv2d", _conv2d_backward, setup_context=_conv2d_context, lib=library
)
torch.library.register_autograd(
    "issp::sparse_matmul", _matmul_backward, setup_context=_matmul_context, lib=library
)
