"""First derivatives of sparse convolution and sparse matmul in x, values and bias.

The gradient of x is the same op with the transposed weight, its taps turned by 180 degrees; that of
the values is computed at the stored positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from issp.ops.arguments import Conv2dArgs, MatmulArgs
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


def in_transform() -> bool:
    """Whether `refuse_transforms` has to look at the tensors of a call."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def refuse_transforms(*tensors: Tensor) -> None:
    """Refuses torch.func's transforms, batched gradients and tensors of forward-mode derivatives.

    The ops would fail in torch's words, or drop a tangent in silence.
    """
    if (
        torch._C._are_functorch_transforms_active()
        or any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))
        or any(map(_has_tangent, tensors))
    ):
        raise NotImplementedError(
            "sparse layers and ops have no vmap, torch.func or forward-mode derivatives: use the "
            "dense model, issp.unpack(model), or the dense weight, p.to_dense()"
        )


def _has_tangent(t: Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(t).tangent is not None


def _refuse(op: str, residual: Tensor | None, activation: str) -> None:
    if activation != "none" or (residual is not None and residual.requires_grad):
        raise RuntimeError(
            f"torch.ops.issp.{op} has no gradient through activation and residual: use "
            f"issp.ops.{op}, which composes them, or torch.no_grad()"
        )


# Where the inputs that may want a gradient stand, in both ops.
_X, _VALUES, _BIAS = map(MatmulArgs._fields.index, ("x", "values", "bias"))


def _save(ctx: Any, inputs: Conv2dArgs | MatmulArgs, channels: int) -> None:
    """Keeps what the gradients that are wanted will read, nothing else."""
    x, values = inputs.x, inputs.values
    ctx.x_needs_grad, ctx.values_need_grad = x.requires_grad, values.requires_grad
    ctx.v, ctx.channels = values.shape[1], channels
    ctx.save_for_backward(
        *(x if values.requires_grad else None, values if x.requires_grad else None),
        *(inputs.col_indices, inputs.crow_indices),
        *(inputs.transposed if x.requires_grad else ()),
    )


def _transposed_weight(
    ctx: Any, saved: tuple[Any, ...], kernel: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, col_indices and crow_indices of the transposed weight."""
    _, values, col_indices, crow_indices, *transposed = saved
    if not transposed:
        transposed = transpose(col_indices, crow_indices, ctx.v, (0, ctx.channels, *kernel))
    columns, rows, order = transposed
    return values.reshape(-1).index_select(0, order).view(-1, 1), columns, rows


def _conv2d_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    arguments = Conv2dArgs(*inputs)
    _refuse("sparse_conv2d", arguments.residual, arguments.activation)
    ctx.geometry = Geometry.of(arguments.geometry)
    if arguments.values.requires_grad and ctx.geometry.upsample != (1, 1):
        raise RuntimeError(
            f"the gradient of values needs upsample 1, not {ctx.geometry.upsample}: spread x by "
            "zeros"
        )
    ctx.image = tuple(arguments.x.shape[2:])
    _save(ctx, arguments, channels=arguments.x.shape[1])


def _matmul_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    arguments = MatmulArgs(*inputs)
    _refuse("sparse_matmul", arguments.residual, arguments.activation)
    ctx.geometry = None
    _save(ctx, arguments, channels=arguments.x.shape[-1])


def _backward(ctx: Any, grad: Tensor) -> tuple:
    """The gradients in the order of the op's arguments; `transposed` has a list of None."""
    if not torch.compiler.is_compiling():
        refuse_transforms(grad)
    saved = ctx.saved_tensors  # unpacked anew at every access
    with torch.no_grad():
        gradients = _gradients(ctx, saved, grad.contiguous())
    sources = [t for t in saved[:2] if t is not None]
    result: list[Any] = [
        [None] * len(n) if isinstance(n, list) else None for n in ctx.needs_input_grad
    ]
    checked = first_order(gradients, grad, *sources)
    for place, gradient in zip((_X, _VALUES, _BIAS), checked, strict=True):
        result[place] = gradient
    return tuple(result)


def _gradients(
    ctx: Any, saved: tuple[Any, ...], grad: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Those of x, values and bias, where they are wanted."""
    by: Geometry | None = ctx.geometry
    grad_x = grad_values = grad_bias = None
    if ctx.x_needs_grad:
        weight = _transposed_weight(ctx, saved, () if by is None else by.kernel)
        if by is None:
            grad_x = _op.sparse_matmul(grad, *weight, [], None, None)
        else:
            geometry = _mirrored(by, ctx.image).for_conv2d()
            grad_x = _op.sparse_conv2d(grad, *weight, [], None, None, geometry)
    if ctx.values_need_grad:
        x, _, col_indices, crow_indices, *_ = saved
        arguments = (x, grad, col_indices, crow_indices, ctx.v)
        if by is None:
            grad_values = _op.sparse_matmul_values_grad(*arguments)
        else:
            grad_values = _op.sparse_conv2d_values_grad(*arguments, by.for_values_grad())
    if ctx.needs_input_grad[_BIAS]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if by is None else grad.sum((0, 2, 3))
    return grad_x, grad_values, grad_bias


def _mirrored(by: Geometry, image: tuple[int, int]) -> Geometry:
    """The convolution that computes the gradient of x, an image of this size.

    Its padding may be negative.
    """
    top, left = (
        d * (k - 1) - p for k, p, d in zip(by.kernel, by.padding, by.dilation, strict=True)
    )
    return Geometry(by.kernel, by.upsample, (top, left), by.dilation, by.stride, image)


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

    backward = staticmethod(_backward)


class Matmul(torch.autograd.Function):
    """As `Conv2d`."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            y = _op.sparse_matmul(*args)
        _matmul_context(ctx, args, y)
        return y

    backward = staticmethod(_backward)


for _name, _context in (("sparse_conv2d", _conv2d_context), ("sparse_matmul", _matmul_context)):
    torch.library.register_autograd(
        f"issp::{_name}", _backward, setup_context=_context, lib=library
    )
