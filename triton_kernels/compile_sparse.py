"""What compile.py compiles of the sparse ops: one variant per path through their rules."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .sparse import SUM_TILE, grad_sizes, sum_splits, tile_sizes
from .sparse_conv2d import convolve, convolve_values_grad
from .sparse_matmul import multiply, multiply_values_grad

SPARSE_KERNELS = (convolve, convolve_values_grad, multiply, multiply_values_grad, sum_splits)
SPARSE_ARGUMENTS = {
    "x": "values", "values": "values", "bias": "values", "residual": "values", "y": "values",
    "grad": "values", "target": "values", "partial": "sums", "columns": "*i32", "starts": "*i32",
}  # fmt: skip

_GEOMETRY = {"KERNEL": (3, 3), "STRIDE": (1, 1), "PADDING": (1, 1), "DILATION": (1, 1)}
_OPTIONS = ("num_warps", "num_stages", "maxnreg")
# v by dtype and precision; float32 in tensor cores where TF32 is allowed.
_BLOCKS = {
    ("float32", "ieee"): (4, 32),
    ("float32", "tf32"): (16, 32),
    ("float64", "ieee"): (32,),
    ("float16", "ieee"): (16,),
    ("bfloat16", "ieee"): (32,),
}


def sparse_variants(dtype: str) -> Iterator[tuple[triton.JITFunction, dict, dict]]:
    """Kernel, constants and options of what the sparse ops launch for this dtype."""
    for (name, precision), blocks in _BLOCKS.items():
        for v in blocks if name == dtype else ():
            common = {"PRECISION": precision, "V": v, "INDEX": tl.int32}
            yield from _forward(getattr(torch, dtype), v, common)
            sizes, options = _split(grad_sizes(getattr(torch, dtype), v))
            yield convolve_values_grad, common | sizes | _GEOMETRY, options
            yield multiply_values_grad, common | sizes, options
    yield sum_splits, {"TILE": SUM_TILE}, {}


def _forward(dtype: torch.dtype, v: int, common: dict):
    # Of a large image, with the whole epilogue or none.
    for epilogue in (True, False):
        constants, options = _split(
            tile_sizes(dtype, common["PRECISION"], v, 1, 2**30, 1, epilogue)
        )
        constants |= common | {"ACTIVATION": "gelu" if epilogue else "relu"}
        constants |= {} if epilogue else {"residual": None}
        yield convolve, constants | _GEOMETRY | {"UPSAMPLE": (1, 1)}, options
        if epilogue == (v != 32):
            yield multiply, constants, options


def _split(sizes: dict) -> tuple[dict, dict]:
    """A tile's constants, and its launch options."""
    constants = {name: x for name, x in sizes.items() if name not in _OPTIONS}
    return constants, {name: sizes[name] for name in _OPTIONS if name in sizes}
