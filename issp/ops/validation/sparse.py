"""Argument checks of the products: one clear sentence with the remedy, before anything is done.

csrc/checks_products.h makes the same checks at native speed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from issp.ops.geometry import Geometry
from issp.ops.validation.pruning import DTYPES

ACTIVATIONS = ("none", "relu", "gelu")


def sparse_conv2d(
    x, values, columns, starts, transposed, bias, residual, geometry, activation="none"
) -> None:
    """Checks of `sparse_conv2d`."""
    _image(x, "x")
    rows = weight(x, values, columns, starts)
    by = _geometry(geometry, Geometry._fields)
    positions(columns, starts, x.shape[1] * by.kernel[0] * by.kernel[1])
    _transposed(transposed, columns.numel() * values.shape[1], x.shape[1], x.device)
    beside(x, bias, (rows,), "bias")
    beside(x, residual, (x.shape[0], rows, *by.size), "residual")
    known_activation(activation)


def sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry) -> None:
    """Checks of `sparse_conv2d_values_grad`."""
    _image(x, "x")
    _image(grad, "grad")
    by = _geometry(geometry, Geometry._fields[:4], size=tuple(grad.shape[2:]))
    _lists(x, columns, starts, v)
    positions(columns, starts, x.shape[1] * by.kernel[0] * by.kernel[1])
    beside(x, grad, (x.shape[0], (starts.numel() - 1) * v, *grad.shape[2:]), "grad")


def sparse_matmul(
    x, values, columns, starts, transposed, bias, residual, activation="none"
) -> None:
    """Checks of `sparse_matmul`."""
    _data(x, "x")
    if x.dim() < 1:
        raise ValueError("x must have the shape [..., I], not be a single number")
    rows = weight(x, values, columns, starts)
    positions(columns, starts, x.shape[-1])
    _transposed(transposed, columns.numel() * values.shape[1], x.shape[-1], x.device)
    beside(x, bias, (rows,), "bias")
    beside(x, residual, (*x.shape[:-1], rows), "residual")
    known_activation(activation)


def sparse_matmul_values_grad(x, grad, columns, starts, v) -> None:
    """Checks of `sparse_matmul_values_grad`."""
    _data(x, "x")
    _data(grad, "grad")
    _lists(x, columns, starts, v)
    positions(columns, starts, x.shape[-1])
    beside(x, grad, (*x.shape[:-1], (starts.numel() - 1) * v), "grad")


def _data(x: Tensor, name: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}: use float32, float16, bfloat16, float64")
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass {name}.contiguous()")


def _image(x: Tensor, name: str) -> None:
    _data(x, name)
    if x.dim() != 4:
        raise ValueError(f"{name} must be [N, C, H, W], not of shape {tuple(x.shape)}")


def weight(x: Tensor, values: Tensor, columns: Tensor, starts: Tensor) -> int:
    """Checks the weight beside its input; returns its number of rows."""
    _data(values, "values")
    if values.dim() != 2 or values.shape[1] < 1:
        raise ValueError(f"values must be [entries, v], not of shape {tuple(values.shape)}")
    if values.dtype != x.dtype:
        raise TypeError(f"values are {values.dtype} but x is {x.dtype}: convert one of them")
    if values.device != x.device:
        raise ValueError(f"values are on {values.device} but x is on {x.device}")
    _lists(x, columns, starts, values.shape[1])
    if values.shape[0] != columns.numel():
        raise ValueError(f"{values.shape[0]} rows of values for {columns.numel()} columns")
    return (starts.numel() - 1) * values.shape[1]


def _lists(x: Tensor, columns: Tensor, starts: Tensor, v: int) -> None:
    if v < 1:
        raise ValueError(f"v is {v}: it must be at least 1")
    for name, tensor in (("columns", columns), ("starts", starts)):
        _integers(tensor, name, x.device)
    if starts.numel() < 2:
        raise ValueError("starts has no block: it must hold one entry more than the weight blocks")


def _integers(tensor: Tensor, name: str, device: torch.device) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(tensor).__name__}")
    if tensor.dtype != torch.int32:
        raise TypeError(f"{name} has dtype {tensor.dtype}: it must be int32")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device} but x is on {device}")
    if tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous and of one dimension")


def positions(columns: Tensor, starts: Tensor, length: int) -> None:
    """Positions within 0..length - 1, ascending in each block, and starts that fit them.

    Read on the CPU only: a GPU's cannot be read without waiting for it.
    """
    if columns.device.type != "cpu":
        return
    counts = starts.diff()
    if int(starts[0]) != 0 or int(starts[-1]) != columns.numel() or bool((counts < 0).any()):
        raise ValueError(f"starts must ascend from 0 to the {columns.numel()} entries of columns")
    if not columns.numel():
        return
    if int(columns.min()) < 0 or int(columns.max()) >= length:
        raise ValueError(
            f"columns must lie in 0..{length - 1}, the positions of one row: do the weight and x "
            "have the same number of channels?"
        )
    first = torch.zeros(columns.numel() + 1, dtype=torch.bool)
    first[starts.long()] = True
    if bool(((columns.diff() <= 0) & ~first[1:-1]).any()):
        raise ValueError("columns must ascend strictly within each block: sort the entries")


def _transposed(tensors: Sequence[Tensor], entries: int, inputs: int, device) -> None:
    if len(tensors) not in (0, 3):
        raise ValueError("transposed must be empty or hold columns, starts and order")
    lengths = (entries, inputs + 1, entries)
    for tensor, length, name in zip(tensors, lengths, ("columns", "starts", "order"), strict=False):
        _integers(tensor, f"transposed {name}", device)
        if tensor.numel() != length:
            raise ValueError(
                f"transposed {name} has {tensor.numel()} elements, not {length}: it belongs to "
                "another weight"
            )


def _geometry(numbers: Sequence[int], names: tuple[str, ...], **known) -> Geometry:
    if len(numbers) != 2 * len(names):
        raise ValueError(
            f"geometry has {len(numbers)} numbers: it must have {2 * len(names)}, the height and "
            f"width of {', '.join(names)}"
        )
    by = Geometry.of(numbers)._replace(**known)
    for name, pair in by._asdict().items():
        if name != "padding" and min(pair) < 1:
            raise ValueError(f"{name} is {pair}: it must be two numbers of at least 1")
    return by


def beside(x: Tensor, other: Tensor | None, shape: tuple[int, ...], name: str) -> None:
    """A tensor (or none) of x's dtype and device and of a given shape."""
    if other is None:
        return
    _data(other, name)
    if other.dtype != x.dtype:
        raise TypeError(f"{name} has dtype {other.dtype} but x {x.dtype}: convert one of them")
    if other.device != x.device:
        raise ValueError(f"{name} is on {other.device} but x is on {x.device}")
    if tuple(other.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(other.shape)}: it must be {shape}")


def known_activation(activation: str) -> None:
    """One of `ACTIVATIONS`."""
    if activation not in ACTIVATIONS:
        raise ValueError(f'activation is "{activation}": use one of {", ".join(ACTIVATIONS)}')
