"""Public names of `issp.sr.models`: super-resolution networks."""

from issp.sr.models import (
    CAT,
    EDSR,
    SuperResolver,
    SwinIR,
    build,
    from_config,
    names,
    pad,
    upscale,
)

__all__ = [
    "CAT",
    "EDSR",
    "SuperResolver",
    "SwinIR",
    "build",
    "from_config",
    "names",
    "pad",
    "upscale",
]
