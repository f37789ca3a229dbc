"""The reference: every op in plain torch, on any device, slow and obvious."""

from issp.ops.reference.auxiliary import count_zeros, magnitude_statistics
from issp.ops.reference.pruning import (
    adam_soft_shrink_,
    apply_masks_,
    key,
    magnitude_threshold,
    nm_prune,
    nm_selected,
    pack,
    pattern_of,
    regularize_,
    selected,
    sgd_soft_shrink_,
    shrunk,
    soft_shrink_,
    unpack,
)
from issp.ops.reference.sparse import (
    sparse_conv2d,
    sparse_conv2d_values_grad,
    sparse_matmul,
    sparse_matmul_values_grad,
)

__all__ = [
    "adam_soft_shrink_",
    "apply_masks_",
    "count_zeros",
    "key",
    "magnitude_statistics",
    "magnitude_threshold",
    "nm_prune",
    "nm_selected",
    "pack",
    "pattern_of",
    "regularize_",
    "selected",
    "sgd_soft_shrink_",
    "shrunk",
    "soft_shrink_",
    "sparse_conv2d",
    "sparse_conv2d_values_grad",
    "sparse_matmul",
    "sparse_matmul_values_grad",
    "unpack",
]
