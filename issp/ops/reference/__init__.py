"""The reference: every op in plain torch, on any device, slow and obvious."""

from issp.ops.reference.auxiliary import (
    count_zeros,
    magnitude_statistics,
    regularize_,
    regularized,
)
from issp.ops.reference.pruning import (
    apply_masks_,
    key,
    magnitude_threshold,
    nm_prune,
    nm_selected,
    pack,
    pattern_of,
    selected,
    shrunk,
    soft_shrink_,
    unpack,
)
from issp.ops.reference.sparse import (
    ACTIVATIONS,
    gather_entries,
    sparse_conv2d,
    sparse_conv2d_values_grad,
    sparse_matmul,
    sparse_matmul_values_grad,
    to_dense,
    transpose,
)
from issp.ops.reference.updates import adam_soft_shrink_, sgd_soft_shrink_

__all__ = [
    "ACTIVATIONS",
    "adam_soft_shrink_",
    "apply_masks_",
    "count_zeros",
    "gather_entries",
    "key",
    "magnitude_statistics",
    "magnitude_threshold",
    "nm_prune",
    "nm_selected",
    "pack",
    "pattern_of",
    "regularize_",
    "regularized",
    "selected",
    "sgd_soft_shrink_",
    "shrunk",
    "soft_shrink_",
    "sparse_conv2d",
    "sparse_conv2d_values_grad",
    "sparse_matmul",
    "sparse_matmul_values_grad",
    "to_dense",
    "transpose",
    "unpack",
]
