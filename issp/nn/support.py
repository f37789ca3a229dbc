"""Why a layer cannot have a sparse weight: what torch's layer or the pattern itself rules out."""

from __future__ import annotations

from torch import Tensor, nn

from issp.ops import validation
from issp.ops.keep import Keep


def unsupported_reason(module: nn.Module) -> str:
    """Why sparse layers cannot compute what a Conv2d or Linear computes, or ""."""
    groups = getattr(module, "groups", 1)
    if groups != 1:
        return f"sparse layers have groups = 1 only, not {groups}"
    padding_mode = getattr(module, "padding_mode", "zeros")
    if padding_mode != "zeros":
        return f'sparse layers pad by zeros only, not by "{padding_mode}"'
    return ""


def indivisible_reason(weight: Tensor, keep: Keep) -> str:
    """Why a weight [O, I, ...] does not divide into the groups of a pattern, or ""."""
    try:
        validation.check_pattern_divides(weight, "weight", keep)
    except ValueError as error:
        return str(error)
    return ""
