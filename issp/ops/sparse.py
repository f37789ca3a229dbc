"""Public products of sparse weights, their autograd, and packing."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from issp.ops import autograd as products_autograd
from issp.ops.formats import NMTensor, SparseRows
from issp.ops.geometry import Geometry
from issp.ops.keep import Keep
from issp.ops.reference.sparse import ACTIVATIONS
from issp.ops.validation import raise_python_error
from issp.ops.validation import sparse as checks_products

Shape = tuple[int, ...]

_op = torch.ops.issp
_conv2d = raise_python_error(checks_products.sparse_conv2d)(_op.sparse_conv2d)
_matmul = raise_python_error(checks_products.sparse_matmul)(_op.sparse_matmul)
_DIFFERENTIABLE = {
    _conv2d: raise_python_error(checks_products.sparse_conv2d)(products_autograd.Conv2d.apply),
    _matmul: raise_python_error(checks_products.sparse_matmul)(products_autograd.Matmul.apply),
}


def nm_pack(weight: Tensor, keep: Keep) -> NMTensor:
    """Packs a weight that is N:M already; see `NMTensor.from_dense`."""
    return NMTensor.from_dense(weight, keep)


def sparse_pack(weight: Tensor, v: int = 1) -> SparseRows:
    """Packs what is not zero in a weight; see `SparseRows.from_dense`."""
    return SparseRows.from_dense(weight, v)


def sparse_conv2d(
    x: Tensor,
    p: SparseRows,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(convolution of x with the sparse weight + bias) + residual; groups = 1.

    Differentiable once in x, p.values, bias and residual. Where a gradient is wanted, activation
    and residual follow the product as torch's own ops; otherwise one kernel does everything. Under
    torch.autocast all of them are cast to its dtype, as for F.conv2d. Not for torch.func, which
    cannot differentiate ops that a library registers.

    Args:
        x: [N, I, H, W]; copied with .contiguous() where it is not (channels_last, slices).
        p: packed weight of shape (O, I, kh, kw), of x's dtype and device.
        bias: [O] or none.
        stride, padding, dilation: int or two, for height and width; padding with zeros.
        residual: of the result's shape, or none.
        activation: "none", "relu" or "gelu" (by erf).

    Returns:
        [N, O, oh, ow], contiguous.

    Raises:
        TypeError, ValueError: what does not fit, named.
    """
    _is(p, SparseRows, "issp.ops.sparse_pack")
    return conv2d(x, p, bias, stride, padding, dilation, residual, activation)


def nm_conv2d(
    x: Tensor,
    p: NMTensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """As `sparse_conv2d`, for an N:M weight."""
    _is(p, NMTensor, "issp.ops.nm_pack")
    return conv2d(x, p, bias, stride, padding, dilation, residual, activation)


def sparse_matmul(
    x: Tensor,
    p: SparseRows,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(x W^T + bias) + residual with the sparse weight W, as torch.nn.functional.linear.

    Gradients, autocast and memory format: see `sparse_conv2d`.

    Args:
        x: [..., I].
        p: packed weight of shape (O, I), of x's dtype and device.
        bias: [O] or none.
        residual: [..., O] or none.
        activation: "none", "relu" or "gelu" (by erf).

    Returns:
        [..., O], contiguous.

    Raises:
        TypeError, ValueError: what does not fit, named.
    """
    _is(p, SparseRows, "issp.ops.sparse_pack")
    return matmul(x, p, bias, residual, activation)


def nm_matmul(
    x: Tensor,
    p: NMTensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """As `sparse_matmul`, for an N:M weight."""
    _is(p, NMTensor, "issp.ops.nm_pack")
    return matmul(x, p, bias, residual, activation)


def conv2d(x, p, bias, stride, padding, dilation, residual, activation) -> Tensor:
    """What `sparse_conv2d` and `nm_conv2d` share."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    geometry = _geometry(x.shape, p.shape, stride, padding, dilation)
    return _finished(_conv2d, x, p, bias, residual, (geometry,), activation)


def _geometry(image, weight, stride, padding, dilation) -> tuple[int, ...]:
    """The op's `geometry`, which the layers of a network ask for with few different arguments."""
    if not torch.compiler.is_compiling():
        try:
            return _known_geometry(image, weight, stride, padding, dilation)
        except TypeError:
            pass  # a list cannot be looked up; what is refused is refused again, without a context
    return _new_geometry(image, weight, stride, padding, dilation)


def _new_geometry(image, weight, stride, padding, dilation) -> tuple[int, ...]:
    if len(weight) != 4:
        raise ValueError(f"the weight of a convolution is [O, I, kh, kw], not {weight}")
    _has_channels(image, weight, 4, 1)
    stride, padding = _pair(stride, "stride", 1), _pair(padding, "padding", 0)
    dilation = _pair(dilation, "dilation", 1)
    given = (weight[2:], stride, padding, dilation)
    return Geometry(*given, size=output_size(image[2:], *given)).for_product()


# Typed: 1.0 is equal to 1, but refused.
_known_geometry = functools.lru_cache(maxsize=1024, typed=True)(_new_geometry)


def matmul(x, p, bias, residual, activation) -> Tensor:
    """What `sparse_matmul` and `nm_matmul` share."""
    if len(p.shape) != 2:
        raise ValueError(f"the weight of a matrix product is [O, I], not {p.shape}")
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, not {type(x).__name__}")
    _has_channels(x.shape, p.shape, None, -1)
    return _finished(_matmul, x, p, bias, residual, (), activation)


def output_size(image, kernel, stride, padding, dilation) -> tuple[int, int]:
    """Height and width of a convolution's result.

    Raises:
        ValueError: the kernel does not fit the padded image.
    """
    size = tuple(
        (image[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )
    if min(size) < 1:
        raise ValueError(
            f"a kernel of {tuple(kernel)} with dilation {dilation} does not fit x of "
            f"{tuple(image)} with padding {padding}: pad more"
        )
    return size


def _finished(call, x, p, bias, residual, geometry, activation) -> Tensor:
    checks_products.known_activation(activation)
    values = p.values
    if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
        x, values, bias, residual = _autocast(x, values, bias, residual)
    x = x.contiguous()
    weight = (values, p.columns, p.starts)
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or values.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        residual = None if residual is None else residual.contiguous()
        args = (x, *weight, [], bias, residual, *geometry, activation)
        if torch.compiler.is_compiling():
            return call(*args)
        # The detour over the registered gradient costs 9 us a call, as much as the rest of it.
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)
    if not torch.compiler.is_compiling():
        call = _DIFFERENTIABLE[call]
    y = call(x, *weight, p.transposed if x.requires_grad else [], bias, None, *geometry, "none")
    return composed(y, residual, activation)


def composed(y: Tensor, residual: Tensor | None, activation: str) -> Tensor:
    """activation(y) + residual by torch's ops, which know their gradients."""
    z = ACTIVATIONS[activation](y)
    if residual is None:
        return z
    (residual,) = _autocast(residual.contiguous())
    # The sum would broadcast in silence.
    checks_products.beside(y, residual, tuple(y.shape), "residual")
    return z + residual


def _autocast(x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """What torch.autocast does to the arguments of F.conv2d; register_autocast knows one dtype."""
    tensors = [x, *others]
    if not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return [
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    ]


def _is(p, kind: type, remedy: str) -> None:
    if not isinstance(p, kind):
        raise TypeError(f"p is {type(p).__name__}, not {kind.__name__}: pack the weight, {remedy}")


def _has_channels(x: Shape, weight: Shape, dims: int | None, channel: int) -> None:
    if dims is not None and len(x) == dims - 1:
        raise ValueError(f"x has shape {tuple(x)}, without a batch: pass x[None]")
    if len(x) < 1 or dims is not None and len(x) != dims:
        wanted = "[..., I]" if dims is None else "[N, C, H, W]"
        raise ValueError(f"x has shape {tuple(x)}: it must be {wanted}")
    if x[channel] != weight[1]:
        raise ValueError(
            f"x of shape {tuple(x)} has {x[channel]} channels, but the weight of shape "
            f"{weight} needs {weight[1]}"
        )


def _pair(value: int | Sequence[int], name: str, least: int) -> tuple[int, int]:
    if type(value) is int and value >= least:
        return (value, value)
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} is {value!r}: it must be an int or two of them")
    if min(pair) < least:
        raise ValueError(f"{name} is {value}: it must be at least {least}")
    return (int(pair[0]), int(pair[1]))
