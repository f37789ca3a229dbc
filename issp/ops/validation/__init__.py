"""Argument checks of the ops: each refusal is one sentence with the remedy.

Everything is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from issp.ops.validation.pruning import (
    DTYPES,
    check_apply_masks,
    check_count_zeros,
    check_is_tensor,
    check_magnitude_statistics,
    check_magnitude_threshold,
    check_matching,
    check_nm_prune,
    check_no_overlap,
    check_pattern_divides,
    check_patterns_divide,
    check_ranks,
    check_regularize,
    check_shrink_factor,
    check_soft_shrink,
    check_tensor,
    check_tensor_list,
    check_vector,
)
from issp.ops.validation.sparse import (
    ACTIVATIONS,
    check_activation,
    check_like,
    check_positions,
    check_sparse_conv2d,
    check_sparse_conv2d_values_grad,
    check_sparse_matmul,
    check_sparse_matmul_values_grad,
    check_weight,
)
from issp.ops.validation.updates import check_adam_soft_shrink, check_sgd_soft_shrink

__all__ = [
    "ACTIVATIONS",
    "DTYPES",
    "PRUNING_OPS",
    "SPARSE_OPS",
    "check_activation",
    "check_adam_soft_shrink",
    "check_apply_masks",
    "check_count_zeros",
    "check_is_tensor",
    "check_like",
    "check_magnitude_statistics",
    "check_magnitude_threshold",
    "check_matching",
    "check_nm_prune",
    "check_no_overlap",
    "check_pattern_divides",
    "check_patterns_divide",
    "check_positions",
    "check_ranks",
    "check_regularize",
    "check_sgd_soft_shrink",
    "check_shrink_factor",
    "check_soft_shrink",
    "check_sparse_conv2d",
    "check_sparse_conv2d_values_grad",
    "check_sparse_matmul",
    "check_sparse_matmul_values_grad",
    "check_tensor",
    "check_tensor_list",
    "check_vector",
    "check_weight",
    "raise_python_error",
]

# Name of each op -> its check, which takes the arguments of the op's schema.
PRUNING_OPS: dict[str, Callable[..., None]] = {
    "soft_shrink_": check_soft_shrink,
    "magnitude_threshold": check_magnitude_threshold,
    "apply_masks_": check_apply_masks,
    "nm_prune": check_nm_prune,
    "regularize_": check_regularize,
    "magnitude_statistics": check_magnitude_statistics,
    "count_zeros": check_count_zeros,
    "adam_soft_shrink_": check_adam_soft_shrink,
    "sgd_soft_shrink_": check_sgd_soft_shrink,
}
SPARSE_OPS: dict[str, Callable[..., None]] = {
    "sparse_conv2d": check_sparse_conv2d,
    "sparse_conv2d_values_grad": check_sparse_conv2d_values_grad,
    "sparse_matmul": check_sparse_matmul,
    "sparse_matmul_values_grad": check_sparse_matmul_values_grad,
}


def raise_python_error(check: Callable[..., None]) -> Callable[[Callable], Callable]:
    """Wraps a native op: when it refuses, `check` raises the exact sentence and kind of error.

    Native ops know RuntimeError only. The check runs after a refusal alone, so that a call that
    succeeds does not pay for it.
    """

    def wrap(call: Callable) -> Callable:
        def checked(*args: Any) -> Any:
            try:
                return call(*args)
            except (RuntimeError, TypeError):
                check(*args)
                raise

        return checked

    return wrap
