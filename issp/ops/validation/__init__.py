"""Argument checks of the ops: each refusal is one sentence with the remedy.

Everything is checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from issp.ops.validation import pruning, sparse, tiles, updates
from issp.ops.validation.pruning import *  # noqa: F403
from issp.ops.validation.sparse import *  # noqa: F403
from issp.ops.validation.tiles import *  # noqa: F403
from issp.ops.validation.updates import *  # noqa: F403

# Name of each op -> its check, which takes the arguments of the op's schema.
PRUNING_OPS: dict[str, Callable[..., None]] = {
    "soft_shrink_": pruning.check_soft_shrink,
    "magnitude_threshold": pruning.check_magnitude_threshold,
    "apply_masks_": pruning.check_apply_masks,
    "nm_prune": pruning.check_nm_prune,
    "regularize_": pruning.check_regularize,
    "magnitude_statistics": pruning.check_magnitude_statistics,
    "count_zeros": pruning.check_count_zeros,
    "adam_soft_shrink_": updates.check_adam_soft_shrink,
    "sgd_soft_shrink_": updates.check_sgd_soft_shrink,
}
SPARSE_OPS: dict[str, Callable[..., None]] = {
    "sparse_conv2d": sparse.check_sparse_conv2d,
    "sparse_conv2d_values_grad": sparse.check_sparse_conv2d_values_grad,
    "sparse_matmul": sparse.check_sparse_matmul,
    "sparse_matmul_values_grad": sparse.check_sparse_matmul_values_grad,
}
# Those that are fast on CPUs alone.
CPU_OPS: dict[str, Callable[..., None]] = {
    "sparse_conv2d_fused": sparse.check_sparse_conv2d_fused,
    "to_tiles": tiles.check_to_tiles,
    "from_tiles": tiles.check_from_tiles,
    "tiled_conv2d": tiles.check_tiled_conv2d,
    "tiled_conv2d_out": tiles.check_tiled_conv2d_out,
    "tiled_conv2d_by_taps": tiles.check_tiled_conv2d_by_taps,
    "tiled_chain": tiles.check_tiled_chain,
}


def raise_python_error(check: Callable[..., None], call: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a native op: when it refuses, `check` raises the exact sentence and kind of error.

    Native ops know RuntimeError only. The check runs after a refusal alone, so that a call that
    succeeds does not pay for it.
    """

    def checked(*args: Any) -> Any:
        try:
            return call(*args)
        except (RuntimeError, TypeError):
            check(*args)
            raise

    return checked
