"""The ops: the pruning step, the auxiliary ops, sparse convolution and sparse matmul.

Importing this package loads the back ends and registers the ops, see `issp.ops.backends`.
"""

from issp.ops import backends, flops
from issp.ops.formats import NMTensor, SparseRows
from issp.ops.keep import Keep
from issp.ops.pruning import (
    ShrinkState,
    adam_soft_shrink_,
    apply_masks_,
    count_zeros,
    magnitude_statistics,
    magnitude_threshold,
    nm_prune,
    nm_prune_with_mask,
    num_pruned,
    regularize_,
    sgd_soft_shrink_,
    soft_shrink_,
)
from issp.ops.sparse import nm_conv2d, nm_matmul, nm_pack, sparse_conv2d, sparse_matmul, sparse_pack
from issp.ops.tiles import (
    TiledImage,
    TiledWeight,
    from_tiles,
    tiled_chain,
    tiled_conv2d,
    tiled_conv2d_by_taps,
    tiles_supported,
    to_tiles,
)

__all__ = [
    "Keep",
    "NMTensor",
    "ShrinkState",
    "SparseRows",
    "TiledImage",
    "TiledWeight",
    "Unit",
    "adam_soft_shrink_",
    "apply_masks_",
    "count_zeros",
    "from_tiles",
    "magnitude_statistics",
    "magnitude_threshold",
    "nm_conv2d",
    "nm_matmul",
    "nm_pack",
    "nm_prune",
    "nm_prune_with_mask",
    "num_pruned",
    "regularize_",
    "sgd_soft_shrink_",
    "soft_shrink_",
    "sparse_conv2d",
    "sparse_matmul",
    "sparse_pack",
    "tiled_chain",
    "tiled_conv2d",
    "tiled_conv2d_by_taps",
    "tiles_supported",
    "to_tiles",
]

backends.register()
flops.register()
