"""issp: super-resolution networks that are sparse from the first iteration.

`issp.attach(model, optimizer, sparsity=0.95)` is all that most users need; see the README.
"""

import importlib
from typing import TYPE_CHECKING, Any

from issp.utils.process import is_issp_command

if TYPE_CHECKING:
    from issp import data, metrics, models, nn, ops, optim
    from issp.deploy.pack import pack, unpack
    from issp.ops import backends
    from issp.ops.info import info
    from issp.ops.keep import Keep, Unit
    from issp.ops.pruning import num_pruned
    from issp.pruning import methods
    from issp.pruning.attach import attach
    from issp.pruning.pruner import Pruner
    from issp.pruning.rank_check import RankCheck, check_ranks
    from issp.pruning.recorder import Recorder
    from issp.pruning.schedules import Constant, Cubic, Linear
    from issp.sr.checkpoint import load, save

__version__ = "0.1.0"

# Module of each public name, imported at first use: `import issp` needs torch and numpy alone.
_LAZY = {
    "Keep": "issp.ops.keep",
    "Unit": "issp.ops.keep",
    "num_pruned": "issp.ops.pruning",
    "attach": "issp.pruning.attach",
    "Pruner": "issp.pruning.pruner",
    "RankCheck": "issp.pruning.rank_check",
    "Recorder": "issp.pruning.recorder",
    "check_ranks": "issp.pruning.rank_check",
    "Constant": "issp.pruning.schedules",
    "Cubic": "issp.pruning.schedules",
    "Linear": "issp.pruning.schedules",
    "save": "issp.sr.checkpoint",
    "load": "issp.sr.checkpoint",
    "info": "issp.ops.info",
    "pack": "issp.deploy.pack",
    "unpack": "issp.deploy.pack",
}
_MODULES = {name: f"issp.{name}" for name in ("data", "metrics", "models", "nn", "ops", "optim")}
_MODULES["backends"] = "issp.ops.backends"
_MODULES["methods"] = "issp.pruning.methods"
# Scripts call the application's modules by these names too: `from issp import builders, config`.
_APPLICATION = ("builders", "checkpoint", "config", "evaluate", "train")
_MODULES.update((name, f"issp.sr.{name}") for name in _APPLICATION)

__all__ = ["backends", "data", "methods", "metrics", "models", "nn", "ops", "optim"]
__all__ += ["Constant", "Cubic", "Keep", "Linear", "Pruner", "RankCheck", "Recorder", "attach"]
__all__ += ["Unit", "check_ranks", "info", "load", "num_pruned", "pack", "save", "unpack"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module(_LAZY[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(_MODULES[name])
    else:
        raise AttributeError(f"module 'issp' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


# `import issp` registers `torch.ops.issp`. The command does so when it computes: its help and its
# version need no torch, and how threads wait must be set before torch is loaded.
if not is_issp_command():
    importlib.import_module("issp.ops")
