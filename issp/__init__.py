"""issp: super-resolution networks that are sparse from the first iteration.

`issp.attach(model, optimizer, sparsity=0.95)` is the whole of it for most users; see the README.
"""

import importlib

from issp import backends

backends.register()

from issp import ops  # noqa: E402  (the ops exist only after registration)
from issp.keep import Keep  # noqa: E402
from issp.ops import num_pruned  # noqa: E402

__version__ = "0.1.0"

# Public names and the module of each, imported at first use: `import issp` needs torch and numpy.
_LAZY = {
    "attach": "issp.pruner",
    "Pruner": "issp.pruner",
    "Constant": "issp.schedules",
    "Cubic": "issp.schedules",
    "Linear": "issp.schedules",
    "save": "issp.checkpoint",
    "load": "issp.checkpoint",
    "info": "issp.about",
    "pack": "issp.pack_model",
}
_MODULES = ("data", "metrics", "models", "nn", "optim")

__all__ = ["Keep", "backends", "num_pruned", "ops", *_LAZY, *_MODULES]


def __getattr__(name: str):
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"issp.{name}")
    else:
        raise AttributeError(f"module 'issp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
