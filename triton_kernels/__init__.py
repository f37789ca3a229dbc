"""The ops of issp in Triton: multi-tensor, deterministic, one file per op.

Arguments have been checked by the caller; nothing here imports issp. Results equal the
reference's bit by bit, those of the sparse ops up to the rounding of their sums. semantics.py
has the scalar rules, tables.py the multi-tensor launch, select.py the exact search, sparse.py the
common functions of the sparse ops, target.py all that depends on the vendor of the GPU; compile.py
compiles every kernel without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

from .adam_soft_shrink import adam_soft_shrink_
from .apply_masks import apply_masks_
from .count_zeros import count_zeros
from .magnitude_statistics import magnitude_statistics
from .magnitude_threshold import magnitude_threshold
from .nm_prune import nm_prune
from .regularize import regularize_
from .sgd_soft_shrink import sgd_soft_shrink_
from .soft_shrink import soft_shrink_
from .sparse import prefers_tensor_cores
from .sparse_conv2d import sparse_conv2d, sparse_conv2d_values_grad
from .sparse_matmul import sparse_matmul, sparse_matmul_values_grad

__all__ = [
    "adam_soft_shrink_",
    "apply_masks_",
    "count_zeros",
    "implementations",
    "magnitude_statistics",
    "magnitude_threshold",
    "nm_prune",
    "prefers_tensor_cores",
    "regularize_",
    "sgd_soft_shrink_",
    "soft_shrink_",
    "sparse_conv2d",
    "sparse_conv2d_values_grad",
    "sparse_matmul",
    "sparse_matmul_values_grad",
]


def implementations() -> dict[str, Callable]:
    """The callables by op name, with the signatures of the schemas."""
    return {
        "soft_shrink_": soft_shrink_,
        "magnitude_threshold": magnitude_threshold,
        "apply_masks_": apply_masks_,
        "nm_prune": nm_prune,
        "regularize_": regularize_,
        "magnitude_statistics": magnitude_statistics,
        "count_zeros": count_zeros,
        "adam_soft_shrink_": adam_soft_shrink_,
        "sgd_soft_shrink_": sgd_soft_shrink_,
        "sparse_conv2d": sparse_conv2d,
        "sparse_conv2d_values_grad": sparse_conv2d_values_grad,
        "sparse_matmul": sparse_matmul,
        "sparse_matmul_values_grad": sparse_matmul_values_grad,
    }
