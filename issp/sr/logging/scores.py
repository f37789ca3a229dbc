"""Which model a row's PSNR is of: while pruning there are two, the masked and the soft one.

The masked model is the one that a freeze in that iteration would give: the selected weights are
zero. In the soft model, which trains on, they are small, and its PSNR varies a lot.
"""

from __future__ import annotations

from typing import Any


def is_soft(row: dict[str, Any]) -> bool:
    """Selected weights are not zero yet: `psnr` is of a model that is not sparse."""
    return (row.get("zeros") or 0) < (row.get("selected") or 0)


def sparse_psnr(row: dict[str, Any]) -> float | None:
    """PSNR with the mask applied, or of a dense training; None where it was not taken."""
    masked = row.get("psnr_masked")
    if masked is not None:
        return masked
    return None if is_soft(row) else row.get("psnr")


def soft_psnr(row: dict[str, Any]) -> float | None:
    """PSNR of the soft model; None where it was not taken, or where there is none."""
    psnr = row.get("psnr")
    return None if psnr == sparse_psnr(row) else psnr


def psnr_parts(row: dict[str, Any]) -> list[str]:
    """The PSNRs of a row in words, that of the sparse model first."""
    sparse, soft = sparse_psnr(row), soft_psnr(row)
    # Masked for the score alone: the model itself is soft.
    is_masked = sparse is not None and sparse != row.get("psnr")
    parts = [] if sparse is None else [f"{sparse:.2f} dB{' masked' * is_masked}"]
    return parts if soft is None else [*parts, f"{soft:.2f} dB soft"]
