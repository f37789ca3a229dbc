"""First derivatives of the sparse products in x, values and bias.

The gradient of x is the product with the transposed weight, its taps turned by 180 degrees; that of
the values is sampled at the stored positions only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from issp.ops.formats import transpose
from issp.ops.geometry import Geometry
from issp.ops.schemas import library

_op = torch.ops.issp


class _FirstOrder(torch.autograd.Function):
    """Passes gradients through; whoever differentiates them again is told why it fails."""

    @staticmethod
    def forward(ctx, result: Tensor, *sources: Tensor) -> Tensor:
        return result.view_as(result)

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "sparse products have no second derivatives: leave create_graph=True out, or use the "
            "dense weight, p.to_dense()"
        )


def first_order(gradients: list[Tensor | None], *sources: Tensor) -> list[Tensor | None]:
    """The gradients; where they could be differentiated again, so that doing it says why not."""
    if not torch.is_grad_enabled():
        return gradients
    return [None if g is None else _FirstOrder.apply(g, *sources) for g in gradients]


def _refuse(op: str, residual: Tensor | None, activation: str) -> None:
    if activation != "none" or (residual is not None and residual.requires_grad):
        raise RuntimeError(
            f"torch.ops.issp.{op} has no gradient through activation and residual: use "
            f"issp.ops.{op}, which composes them, or torch.no_grad()"
        )


def _save(ctx, x, values, columns, starts, transposed, channels) -> None:
    """Keeps what the gradients that are wanted will read, nothing else."""
    ctx.wanted = (x.requires_grad, values.requires_grad)
    ctx.v, ctx.channels = values.shape[1], channels
    given = len(transposed) if x.requires_grad else 0
    ctx.save_for_backward(
        *(x if values.requires_grad else None, values if x.requires_grad else None),
        *(columns, starts, *transposed[:given]),
    )


def _gradient_weight(ctx, kernel: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Values, columns and starts of the transposed weight."""
    _, values, columns, starts, *transposed = ctx.saved_tensors
    if not transposed:
        transposed = transpose(columns, starts, ctx.v, (0, ctx.channels, *kernel))
    fresh, begins, order = transposed
    return values.reshape(-1).index_select(0, order).view(-1, 1), fresh, begins


def _placed(ctx, gradients: list[Tensor | None]) -> tuple:
    """The gradients of x, values and bias among the op's arguments, of which one is a list."""
    result = [[None] * len(n) if isinstance(n, list) else None for n in ctx.needs_input_grad]
    result[0], result[1], result[5] = gradients
    return tuple(result)


def _conv2d_context(ctx, inputs, output) -> None:
    x, values, columns, starts, transposed, bias, residual, geometry, activation = inputs
    _refuse("sparse_conv2d", residual, activation)
    ctx.geometry = Geometry.of(geometry)
    if values.requires_grad and ctx.geometry.upsample != (1, 1):
        raise RuntimeError(
            f"the gradient of values needs upsample 1, not {ctx.geometry.upsample}: spread x by "
            "zeros"
        )
    ctx.image = tuple(x.shape[2:])
    _save(ctx, x, values, columns, starts, transposed, x.shape[1])


def _conv2d_backward(ctx, grad: Tensor):
    with torch.no_grad():
        gradients = _conv2d_gradients(ctx, grad.contiguous())
    gradients = first_order(gradients, grad, *(t for t in ctx.saved_tensors[:2] if t is not None))
    return _placed(ctx, gradients)


def _conv2d_gradients(ctx, grad: Tensor) -> list[Tensor | None]:
    kernel, stride, padding, dilation, upsample, _ = ctx.geometry
    grad_x = grad_values = grad_bias = None
    if ctx.wanted[0]:
        turned = [d * (k - 1) - p for k, p, d in zip(kernel, padding, dilation, strict=True)]
        mirrored = Geometry(kernel, upsample, turned, dilation, stride, ctx.image)
        grad_x = _op.sparse_conv2d(
            grad, *_gradient_weight(ctx, kernel), [], None, None, mirrored.for_product()
        )
    if ctx.wanted[1]:
        x, _, columns, starts = ctx.saved_tensors[:4]
        grad_values = _op.sparse_conv2d_values_grad(
            x, grad, columns, starts, ctx.v, ctx.geometry.for_gradient()
        )
    if ctx.needs_input_grad[5]:
        grad_bias = grad.sum((0, 2, 3))
    return [grad_x, grad_values, grad_bias]


def _matmul_context(ctx, inputs, output) -> None:
    x, values, columns, starts, transposed, bias, residual, activation = inputs
    _refuse("sparse_matmul", residual, activation)
    _save(ctx, x, values, columns, starts, transposed, x.shape[-1])


def _matmul_backward(ctx, grad: Tensor):
    with torch.no_grad():
        gradients = _matmul_gradients(ctx, grad.contiguous())
    gradients = first_order(gradients, grad, *(t for t in ctx.saved_tensors[:2] if t is not None))
    return _placed(ctx, gradients)


def _matmul_gradients(ctx, grad: Tensor) -> list[Tensor | None]:
    grad_x = grad_values = grad_bias = None
    if ctx.wanted[0]:
        grad_x = _op.sparse_matmul(grad, *_gradient_weight(ctx, ()), [], None, None)
    if ctx.wanted[1]:
        x, _, columns, starts = ctx.saved_tensors[:4]
        grad_values = _op.sparse_matmul_values_grad(x, grad, columns, starts, ctx.v)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return [grad_x, grad_values, grad_bias]


class Conv2d(torch.autograd.Function):
    """The op and its registered gradient without the detour that makes the op traceable.

    Of a training step of 60 channels on 48x48 pixels that detour is half the time.
    """

    @staticmethod
    def forward(ctx, *args) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = _op.sparse_conv2d(*args)
        _conv2d_context(ctx, args, y)
        return y

    backward = staticmethod(_conv2d_backward)


class Matmul(torch.autograd.Function):
    """As `Conv2d`."""

    @staticmethod
    def forward(ctx, *args) -> Tensor:
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
