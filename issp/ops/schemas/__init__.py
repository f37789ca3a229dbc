"""The op schemas: names, arguments, exact semantics and fakes of every op."""

from issp.ops.schemas import sparse  # defines the sparse ops
from issp.ops.schemas.pruning import (
    LINE_WORDS,
    SCRATCH_HEADER,
    library,
    mask_layout,
    mask_words,
    one_device,
    scratch_region,
    scratch_words,
)

__all__ = [
    "LINE_WORDS",
    "SCRATCH_HEADER",
    "library",
    "mask_layout",
    "mask_words",
    "one_device",
    "scratch_region",
    "scratch_words",
    "sparse",
]
