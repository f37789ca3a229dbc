"""Argument checks of sparse convolution and sparse matmul, see `issp.ops.validation.pruning`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from issp.ops.arguments import Conv2dArgs, FusedConv2dArgs, MatmulArgs
from issp.ops.geometry import Geometry, Pair
from issp.ops.validation.pruning import check_in_memory, check_is_tensor, check_tensor

ACTIVATIONS = ("none", "relu", "gelu")
# As in csrc/checks_sparse.h: products of sizes fit 64 bits, and a table of positions fits memory.
MAX_SIZE = 2**31 - 1
MAX_POSITIONS = 2**24  # of a row of the weight


def check_sparse_conv2d(*args: Any) -> None:
    """The checks of `sparse_conv2d`."""
    conv = Conv2dArgs(*args)
    x = conv.x
    _check_image(x, "x")
    rows = check_weight(x, conv.values, conv.col_indices, conv.crow_indices)
    by = _check_geometry(conv.geometry, Geometry._fields)
    _check_length(x.shape[1], math.prod(by.kernel))
    check_positions(conv.col_indices, conv.crow_indices, x.shape[1] * math.prod(by.kernel))
    _check_optional(conv, x.shape[1], (x.shape[0], rows, *by.output_size), rows)


def check_sparse_conv2d_fused(*args: Any) -> None:
    """The checks of `sparse_conv2d_fused`."""
    call = FusedConv2dArgs(*args)
    check_sparse_conv2d(*call.conv2d())
    rows = (call.crow_indices.numel() - 1) * call.values.shape[1]
    if call.shuffle < 1 or rows % call.shuffle**2:
        raise ValueError(
            f"shuffle is {call.shuffle}: its square must divide the {rows} channels of the result"
        )
    if call.shuffle > 1 and call.residual is not None:
        raise ValueError("a residual cannot be added before a PixelShuffle: add it afterwards")


def check_sparse_conv2d_values_grad(
    x: Tensor,
    grad: Tensor,
    col_indices: Tensor,
    crow_indices: Tensor,
    v: int,
    geometry: Sequence[int],
) -> None:
    """The checks of `sparse_conv2d_values_grad`."""
    _check_image(x, "x")
    _check_image(grad, "grad")
    by = _check_geometry(geometry, Geometry._fields[:4], size=(grad.shape[2], grad.shape[3]))
    _check_indices(x.device, col_indices, crow_indices, v)
    _check_length(x.shape[1], math.prod(by.kernel))
    check_positions(col_indices, crow_indices, x.shape[1] * math.prod(by.kernel))
    check_like(x, grad, (x.shape[0], (crow_indices.numel() - 1) * v, *grad.shape[2:]), "grad")


def check_sparse_matmul(*args: Any) -> None:
    """The checks of `sparse_matmul`."""
    matmul = MatmulArgs(*args)
    x = matmul.x
    _check_tokens(x)
    rows = check_weight(x, matmul.values, matmul.col_indices, matmul.crow_indices)
    _check_length(x.shape[-1], 1)
    check_positions(matmul.col_indices, matmul.crow_indices, x.shape[-1])
    _check_optional(matmul, x.shape[-1], (*x.shape[:-1], rows), rows)


def check_sparse_matmul_values_grad(
    x: Tensor, grad: Tensor, col_indices: Tensor, crow_indices: Tensor, v: int
) -> None:
    """The checks of `sparse_matmul_values_grad`."""
    _check_tokens(x)
    _check_data(grad, "grad")
    _check_indices(x.device, col_indices, crow_indices, v)
    _check_length(x.shape[-1], 1)
    check_positions(col_indices, crow_indices, x.shape[-1])
    check_like(x, grad, (*x.shape[:-1], (crow_indices.numel() - 1) * v), "grad")


def _check_data(x: Tensor, name: str) -> None:
    check_tensor(x, name)
    check_in_memory(x, name)


def _check_tokens(x: Tensor) -> None:
    _check_data(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have the shape [..., I], not be a single number")


def _check_image(x: Tensor, name: str) -> None:
    _check_data(x, name)
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], not of shape {tuple(x.shape)}")
    if max(x.shape) > MAX_SIZE:
        raise ValueError(f"{name} has the shape {tuple(x.shape)}: no size may exceed {MAX_SIZE}")


def check_transpose(
    col_indices: Tensor, crow_indices: Tensor, v: int, inputs: int, taps: int
) -> None:
    """The checks of `_sparse_transpose`."""
    check_is_tensor(col_indices, "col_indices")
    _check_indices(col_indices.device, col_indices, crow_indices, v)
    if inputs < 0 or taps < 1:
        raise ValueError(
            f"inputs is {inputs} and taps is {taps}: give a number of channels, and 1 tap or more"
        )
    _check_length(inputs, taps)
    check_positions(col_indices, crow_indices, inputs * taps)
    rows = (crow_indices.numel() - 1) * v
    if max(rows * taps, col_indices.numel() * v) > MAX_SIZE:
        raise ValueError(
            f"the transposed weight has {rows * taps} positions and {col_indices.numel() * v} "
            f"entries: at most {MAX_SIZE} are supported"
        )


def check_weight(x: Tensor, values: Tensor, col_indices: Tensor, crow_indices: Tensor) -> int:
    """Refuses a weight that does not fit its input x; returns its number of rows."""
    _check_data(values, "values")
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values must be [entries, v], not of shape {tuple(values.shape)}")
    if values.dtype != x.dtype:
        raise TypeError(f"values are {values.dtype} but x is {x.dtype}: convert one of them")
    if values.device != x.device:
        raise ValueError(f"values are on {values.device} but x is on {x.device}")
    _check_indices(x.device, col_indices, crow_indices, values.shape[1])
    if values.shape[0] != col_indices.numel():
        raise ValueError(
            f"{values.shape[0]} rows of values for {col_indices.numel()} entries of col_indices"
        )
    return (crow_indices.numel() - 1) * values.shape[1]


def _check_length(inputs: int, taps: int) -> None:
    if inputs * taps > MAX_POSITIONS or taps > MAX_POSITIONS:
        raise ValueError(
            f"a row of the weight has {inputs} channels of {taps} positions: {MAX_POSITIONS} "
            "positions at most are supported"
        )


def _check_indices(device: torch.device, col_indices: Tensor, crow_indices: Tensor, v: int) -> None:
    if v < 1:
        raise ValueError(f"v is {v}: it must be at least 1")
    for name, tensor in (("col_indices", col_indices), ("crow_indices", crow_indices)):
        _check_integers(tensor, name, device)
    if crow_indices.numel() < 2:
        raise ValueError(
            "crow_indices has no block: it must hold one entry more than the weight has block rows"
        )
    if v > MAX_SIZE // (crow_indices.numel() - 1):
        raise ValueError(f"v is {v}: the weight would have more than {MAX_SIZE} rows")


def _check_integers(tensor: Tensor, name: str, device: torch.device) -> None:
    check_is_tensor(tensor, name)
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {tensor.dtype}: it must be int32")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {device}")
    if tensor.dim() != 1:
        raise ValueError(f"{name} must be contiguous and of one dimension")
    check_in_memory(tensor, name)


def can_read(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be read without waiting for a device, and are there."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def check_positions(col_indices: Tensor, crow_indices: Tensor, length: int) -> None:
    """Refuses positions outside 0..length - 1 or out of order, and crow_indices that do not fit.

    Checks tensors on the CPU only: reading those of a GPU would wait for it.
    """
    if not can_read(col_indices):
        return
    entries = col_indices.numel()
    ascending = bool((crow_indices.diff() >= 0).all())
    if int(crow_indices[0]) != 0 or int(crow_indices[-1]) != entries or not ascending:
        raise ValueError(f"crow_indices must ascend from 0 to the {entries} entries of col_indices")
    if not entries:
        return
    if int(col_indices.min()) < 0 or int(col_indices.max()) >= length:
        raise ValueError(
            f"col_indices must lie in 0..{length - 1}, the positions of one row: do the weight and "
            "x have the same number of channels?"
        )
    first = torch.zeros(entries + 1, dtype=torch.bool, device=col_indices.device)
    first[crow_indices.long()] = True
    if bool(((col_indices.diff() <= 0) & ~first[1:-1]).any()):
        raise ValueError("col_indices must ascend strictly within each block row: sort the entries")


def _check_optional(
    call: Conv2dArgs | MatmulArgs, inputs: int, result: tuple[int, ...], rows: int
) -> None:
    """Refuses what does not fit the weight's rows and inputs, or the shape of the result."""
    if len(call.transposed) not in (0, 3):
        raise ValueError("transposed must be empty or hold col_indices, crow_indices and order")
    entries = call.col_indices.numel() * call.values.shape[1]
    lengths = {"col_indices": entries, "crow_indices": inputs + 1, "order": entries}
    for tensor, (name, length) in zip(call.transposed, lengths.items(), strict=False):
        _check_integers(tensor, f"transposed {name}", call.x.device)
        if tensor.numel() != length:
            raise ValueError(
                f"transposed {name} has {tensor.numel()} elements, not {length}: it belongs to "
                "another weight"
            )
    check_like(call.x, call.bias, (rows,), "bias")
    check_like(call.x, call.residual, result, "residual")
    check_activation(call.activation)


def _check_geometry(
    numbers: Sequence[int], names: Sequence[str], size: Pair | None = None
) -> Geometry:
    if len(numbers) != 2 * len(names):
        raise ValueError(
            f"geometry has {len(numbers)} numbers: it must have {2 * len(names)}, the height and "
            f"width of {', '.join(names)}"
        )
    by = Geometry.of(numbers)
    if size is not None:
        by = by._replace(size=size)
    for name, pair in by._asdict().items():
        if name != "padding" and pair is not None and min(pair) < 1:
            raise ValueError(f"{name} is {pair}: it must be two numbers of at least 1")
        if pair is not None and max(map(abs, pair)) > MAX_SIZE:
            raise ValueError(f"{name} is {pair}: numbers up to {MAX_SIZE} are supported")
    return by


def check_like(x: Tensor, other: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """Refuses a tensor that has not x's dtype and device and this shape; None passes."""
    if other is None:
        return
    _check_data(other, name)
    if other.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {other.dtype} but x {x.dtype}: convert one of them")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
    if tuple(other.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(other.shape)}: it must be {shape}")


def check_activation(activation: str) -> None:
    """Refuses what is none of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation is "{activation}": use one of {", ".join(ACTIVATIONS)}')
