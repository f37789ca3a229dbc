"""What torch.compile leaves to Python: the pruner counts, looks at memory and calls ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_REASON = "the pruner works in Python, between the compiled parts: leave out fullgraph=True"


def untraced(call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a compiled caller calls as it is; elsewhere it is called without a detour."""
    disabled = torch.compiler.disable(call, reason=_REASON)

    def called(*args: Any, **kwargs: Any) -> Any:
        return (disabled if torch.compiler.is_compiling() else call)(*args, **kwargs)

    return called
