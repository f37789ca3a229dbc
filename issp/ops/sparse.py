"""Public functions of sparse weights: convolution, matmul and packing."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from issp.ops import validation
from issp.ops.autograd import Conv2d, Matmul, in_transform, refuse_transforms
from issp.ops.formats import NMTensor, PackedWeight, SparseRows
from issp.ops.geometry import Geometry, Pair
from issp.ops.keep import Keep
from issp.ops.reference import ACTIVATIONS
from issp.ops.validation import raise_python_error

Size = int | Sequence[int]

_conv2d = raise_python_error(validation.check_sparse_conv2d, torch.ops.issp.sparse_conv2d)
_matmul = raise_python_error(validation.check_sparse_matmul, torch.ops.issp.sparse_matmul)
_fused_conv2d = raise_python_error(
    validation.check_sparse_conv2d_fused, torch.ops.issp.sparse_conv2d_fused
)
_DIFFERENTIABLE = {
    _conv2d: raise_python_error(validation.check_sparse_conv2d, Conv2d.apply),
    _matmul: raise_python_error(validation.check_sparse_matmul, Matmul.apply),
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
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """activation(convolution of x with the sparse weight + bias) + residual; groups = 1.

    Differentiable once in x, p.values, bias and residual. Where a gradient is wanted, activation
    and residual are torch's own ops after the convolution; otherwise one kernel does everything.
    Under torch.autocast all of them are cast to its dtype, as for F.conv2d. Not for
    torch.func and forward-mode derivatives, which cannot transform ops that a library registers.

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
    _check_is_packed(p, SparseRows, "issp.ops.sparse_pack")
    return conv2d(
        x, p, bias, residual, activation, stride=stride, padding=padding, dilation=dilation
    )


def nm_conv2d(
    x: Tensor,
    p: NMTensor,
    bias: Tensor | None = None,
    stride: Size = 1,
    padding: Size = 0,
    dilation: Size = 1,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """As `sparse_conv2d`, for an N:M weight."""
    _check_is_packed(p, NMTensor, "issp.ops.nm_pack")
    return conv2d(
        x, p, bias, residual, activation, stride=stride, padding=padding, dilation=dilation
    )


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
    _check_is_packed(p, SparseRows, "issp.ops.sparse_pack")
    return matmul(x, p, bias, residual, activation)


def nm_matmul(
    x: Tensor,
    p: NMTensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """As `sparse_matmul`, for an N:M weight."""
    _check_is_packed(p, NMTensor, "issp.ops.nm_pack")
    return matmul(x, p, bias, residual, activation)


def conv2d(
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: str,
    *,
    stride: Size,
    padding: Size,
    dilation: Size,
    scale: float = 1.0,
    shuffle: int = 1,
) -> Tensor:
    """What `sparse_conv2d`, `nm_conv2d` and the sparse layers share.

    Args:
        scale: of what the residual is added to.
        shuffle: the factor of a PixelShuffle of the result.
    """
    validation.check_strided(x, "x")
    geometry = _geometry(x.shape, p.shape, stride, padding, dilation)
    operands: tuple[Any, ...] = (_conv2d, x, p, bias)
    if scale == 1.0 and shuffle == 1:
        return _dispatch(*operands, residual=residual, geometry=(geometry,), activation=activation)
    if x.is_cpu:
        return _dispatch(
            *operands,
            residual=residual,
            geometry=(geometry,),
            activation=activation,
            further=(scale, shuffle),
        )
    # On a GPU the fused op is the reference's, which is slow.
    y = _dispatch(*operands, residual=None, geometry=(geometry,), activation=activation)
    return apply_epilogue(y, residual, "none", scale, shuffle)


def _geometry(
    image: Sequence[int], weight: tuple[int, ...], stride: Size, padding: Size, dilation: Size
) -> tuple[int, ...]:
    """The op's `geometry`, which the layers of a network ask for with few different arguments."""
    if not torch.compiler.is_compiling():
        try:
            return _cached_geometry(image, weight, stride, padding, dilation)
        except TypeError:
            pass  # a list cannot be looked up; what is refused is refused again, without a context
    return _new_geometry(image, weight, stride, padding, dilation)


def _new_geometry(
    image: Sequence[int], weight: tuple[int, ...], stride: Size, padding: Size, dilation: Size
) -> tuple[int, ...]:
    if len(weight) != 4:
        raise ValueError(f"the weight of a convolution is [O, I, kh, kw], not {weight}")
    _check_channels(image, weight, 4, 1)
    by = Geometry(
        kernel=(weight[2], weight[3]),
        stride=_pair(stride, "stride", 1),
        padding=_pair(padding, "padding", 0),
        dilation=_pair(dilation, "dilation", 1),
    )
    return by._replace(size=output_size(image[2:], by)).for_conv2d()


# Typed: 1.0 is equal to 1, but refused.
_cached_geometry: Callable[..., tuple[int, ...]] = functools.lru_cache(maxsize=1024, typed=True)(
    _new_geometry
)


def matmul(
    x: Tensor, p: PackedWeight, bias: Tensor | None, residual: Tensor | None, activation: str
) -> Tensor:
    """What `sparse_matmul`, `nm_matmul` and the sparse layers share."""
    if len(p.shape) != 2:
        raise ValueError(f"the weight of a matmul is [O, I], not {p.shape}")
    validation.check_strided(x, "x")
    _check_channels(x.shape, p.shape, None, -1)
    return _dispatch(_matmul, x, p, bias, residual=residual, geometry=(), activation=activation)


def output_size(image: Sequence[int], by: Geometry) -> Pair:
    """Height and width of a convolution's result.

    Raises:
        ValueError: the kernel does not fit the padded image.
    """
    height, width = [
        (image[i] + 2 * by.padding[i] - by.dilation[i] * (by.kernel[i] - 1) - 1) // by.stride[i] + 1
        for i in (0, 1)
    ]
    if height < 1 or width < 1:  # min() would ask torch.export which of them is smaller
        raise ValueError(
            f"a kernel of {by.kernel} with dilation {by.dilation} does not fit x of "
            f"{tuple(image)} with padding {by.padding}: pad more"
        )
    return height, width


def _dispatch(
    call: Callable[..., Tensor],
    x: Tensor,
    p: PackedWeight,
    bias: Tensor | None,
    *,
    residual: Tensor | None,
    geometry: tuple[tuple[int, ...], ...],
    activation: str,
    further: tuple[float, int] | tuple[()] = (),
) -> Tensor:
    """Calls the op: with its epilogue where no gradient is wanted, else without.

    Args:
        geometry: the arguments of the op that only a convolution has.
        further: scale and shuffle of a convolution.
    """
    validation.check_activation(activation)
    if residual is not None:
        validation.check_strided(residual, "residual")
    values: Tensor = p.values
    traced = torch.compiler.is_compiling()
    if not traced and in_transform():
        refuse_transforms(x, values)
    dtype = _autocast_dtype(x)
    if dtype is not None:
        x, values = _cast(x, dtype), _cast(values, dtype)
        bias = None if bias is None else _cast(bias, dtype)
        residual = None if residual is None else _cast(residual, dtype)
    x = x.contiguous()
    weight = (values, p.col_indices, p.crow_indices)
    if not torch.is_grad_enabled() or not (
        x.requires_grad
        or values.requires_grad
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    ):
        residual = None if residual is None else residual.contiguous()
        args: tuple[Any, ...] = (x, *weight, [], bias, residual, *geometry, activation, *further)
        if further:
            call = _fused_conv2d
        if traced:
            return call(*args)
        # The detour over the registered gradient costs 9 us a call, as much as the rest of it.
        with torch._C._AutoDispatchBelowAutograd():
            return call(*args)
    if traced:
        # No lists that a layer keeps: they may be outdated when the program runs, and an exported
        # one would sort in every call. Its backward makes them.
        transposed = []
    else:
        call = _DIFFERENTIABLE[call]
        transposed = p.transposed if x.requires_grad else []
    y = call(x, *weight, transposed, bias, None, *geometry, "none")
    return apply_epilogue(y, residual, activation, *further)


def apply_epilogue(
    y: Tensor, residual: Tensor | None, activation: str, scale: float = 1.0, shuffle: int = 1
) -> Tensor:
    """activation(y) * scale + residual, shuffled, by torch's ops, which know their gradients."""
    z = ACTIVATIONS[activation](y)
    if scale != 1.0:
        z = z * scale
    if residual is None:
        return z if shuffle == 1 else F.pixel_shuffle(z, shuffle)
    residual = residual.contiguous()
    dtype = _autocast_dtype(residual)
    if dtype is not None:
        residual = _cast(residual, dtype)
    # The sum would broadcast in silence.
    validation.check_like(y, residual, tuple(y.shape), "residual")
    return z + residual


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What torch.autocast computes in on x's device; None where it is off, or there is none."""
    device = "cpu" if x.is_cpu else x.device.type
    if device == "meta":
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch.autocast does to an argument of F.conv2d; register_autocast knows one dtype."""
    return x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x


def _check_is_packed(p: object, kind: type, remedy: str) -> None:
    if not isinstance(p, kind):
        raise TypeError(f"p is {type(p).__name__}, not {kind.__name__}: pack the weight, {remedy}")


def _check_channels(
    x: Sequence[int], weight: tuple[int, ...], dims: int | None, channel: int
) -> None:
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


def _pair(value: Size, name: str, least: int) -> Pair:
    if type(value) is int and value >= least:
        return (value, value)
    pair = (value, value) if isinstance(value, int) else value
    if isinstance(pair, str) or not isinstance(pair, Sequence) or len(pair) != 2:
        raise TypeError(f"{name} is {value!r}: it must be an int or two of them")
    if min(pair) < least:
        raise ValueError(f"{name} is {value}: it must be at least {least}")
    return (int(pair[0]), int(pair[1]))
