"""The sparse ops of csrc/cuda in the emulator; see `implementations`."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable

from torch import Tensor

from issp.ops import validation
from issp.ops.geometry import Geometry
from tests.kernels import cuda_emulator as emulator

_FINISHES = validation.ACTIVATIONS  # in the order of enum Finish


class _Window(ctypes.Structure):
    """struct Window of csrc/cuda/product_image.cuh."""

    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("batch", "channels", "rows")),
        *((name, ctypes.c_uint32 * 2) for name in ("input", "output", "kernel")),
        *((name, ctypes.c_uint32 * 2) for name in ("stride", "dilation", "upsample")),
        ("padding", ctypes.c_int32 * 2),
    )


class _Lists(ctypes.Structure):
    """struct Lists of csrc/cuda/product.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("columns", "starts")),
        *((name, ctypes.c_uint32) for name in ("entries", "v", "rows", "length")),
    )


class _Ends(ctypes.Structure):
    """struct Ends of csrc/cuda/product.cuh."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("bias", "residual", "result")),
        ("finish", ctypes.c_uint32),
    )


def _window(x, rows, by: Geometry) -> _Window:
    def pair(numbers, kind=ctypes.c_uint32):
        return (kind * 2)(*numbers)

    n, channels, *image = x.shape
    pairs = map(pair, (image, by.size, by.kernel, by.stride, by.dilation, by.upsample))
    return _Window(n, channels, rows, *pairs, pair(by.padding, ctypes.c_int32))


def _lists(columns: Tensor, starts: Tensor, v: int, length: int) -> _Lists:
    rows = (starts.numel() - 1) * v
    return _Lists(columns.data_ptr(), starts.data_ptr(), columns.numel(), v, rows, length)


def _ends(bias: Tensor | None, residual: Tensor | None, y: Tensor, activation: str) -> _Ends:
    pointers = [None if t is None else t.data_ptr() for t in (bias, residual, y)]
    return _Ends(*pointers, _FINISHES.index(activation))


def _run(op: str, sizes, lists: _Lists, x: Tensor, *rest) -> None:
    by_value = isinstance(sizes, int)
    first = ctypes.c_uint64(sizes) if by_value else ctypes.byref(sizes)
    dtype = emulator.DTYPE_CODES[x.dtype]
    emulator.run(op, first, ctypes.byref(lists), dtype, emulator.pointer(x), *rest, sparse=True)


def sparse_conv2d(
    x, values, columns, starts, transposed, bias, residual, geometry, activation="none"
) -> Tensor:
    """See issp/ops/schemas."""
    if emulator.options["checked"]:
        validation.check_sparse_conv2d(
            x, values, columns, starts, transposed, bias, residual, geometry, activation
        )
    by, rows = Geometry.of(geometry), (starts.numel() - 1) * values.shape[1]
    y = x.new_empty((x.shape[0], rows, *by.size))
    lists = _lists(columns, starts, values.shape[1], x.shape[1] * math.prod(by.kernel))
    ends = ctypes.byref(_ends(bias, residual, y, activation))
    _run("sparse_conv2d", _window(x, rows, by), lists, x, emulator.pointer(values), ends)
    return y


def sparse_matmul(
    x, values, columns, starts, transposed, bias, residual, activation="none"
) -> Tensor:
    """See issp/ops/schemas."""
    if emulator.options["checked"]:
        validation.check_sparse_matmul(
            x, values, columns, starts, transposed, bias, residual, activation
        )
    rows = (starts.numel() - 1) * values.shape[1]
    y = x.new_empty((*x.shape[:-1], rows))
    lists = _lists(columns, starts, values.shape[1], x.shape[-1])
    ends = ctypes.byref(_ends(bias, residual, y, activation))
    tokens = math.prod(x.shape[:-1])
    _run("sparse_matmul", tokens, lists, x, emulator.pointer(values), ends)
    return y


def sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry) -> Tensor:
    """See issp/ops/schemas."""
    if emulator.options["checked"]:
        validation.check_sparse_conv2d_values_grad(x, grad, columns, starts, v, geometry)
    by = Geometry.of(geometry)._replace(size=grad.shape[2:])
    values_grad = x.new_empty((columns.numel(), v))
    window = _window(x, grad.shape[1], by)
    lists = _lists(columns, starts, v, x.shape[1] * math.prod(by.kernel))
    pointers = map(emulator.pointer, (grad, values_grad))
    _run("sparse_conv2d_values_grad", window, lists, x, *pointers)
    return values_grad


def sparse_matmul_values_grad(x, grad, columns, starts, v) -> Tensor:
    """See issp/ops/schemas."""
    if emulator.options["checked"]:
        validation.check_sparse_matmul_values_grad(x, grad, columns, starts, v)
    values_grad = x.new_empty((columns.numel(), v))
    lists = _lists(columns, starts, v, x.shape[-1])
    pointers = map(emulator.pointer, (grad, values_grad))
    _run("sparse_matmul_values_grad", math.prod(x.shape[:-1]), lists, x, *pointers)
    return values_grad


def implementations() -> dict[str, Callable]:
    """The ops by name, with the arguments of their schemas."""
    return {
        "sparse_conv2d": sparse_conv2d,
        "sparse_conv2d_values_grad": sparse_conv2d_values_grad,
        "sparse_matmul": sparse_matmul,
        "sparse_matmul_values_grad": sparse_matmul_values_grad,
    }
