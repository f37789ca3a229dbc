"""The reference of the pruning step, of thresholds, masks and N:M: plain torch on any device.

Rules, in the order of csrc/semantics.h and triton_kernels/semantics.py: key, selected, shrunk.
Source: ISS-P, "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution", figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from issp.ops.schemas import mask_layout, mask_words

# The integer dtype of the same size.
INTEGER = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}


def key(w: Tensor) -> Tensor:
    """The order of magnitudes as integers: the bits without the sign; NaN above infinity."""
    bits = w.view(INTEGER[w.dtype])
    return bits & torch.iinfo(bits.dtype).max


def selected(w: Tensor, k: int) -> Tensor:
    """True for the k smallest keys of a flat tensor; equal keys: lowest index first."""
    chosen = torch.zeros(w.numel(), dtype=torch.bool, device=w.device)
    chosen[torch.sort(key(w), stable=True).indices[:k]] = True
    return chosen


def shrunk(w: Tensor, shrink: float) -> Tensor:
    """w * shrink, rounded to nearest even; 16-bit dtypes are widened to float32, rounded again.

    shrink = 0 gives a zero of w's sign (no multiplication: infinity becomes zero as well). A
    product below the smallest normal number becomes a zero of w's sign (bfloat16: judged in
    float32), except for float16, whose denormals carry information. NaN stays as it is.
    """
    bits = w.view(INTEGER[w.dtype])
    zero = (bits & torch.iinfo(bits.dtype).min).view(w.dtype)
    tiny = torch.finfo(w.dtype).tiny
    if w.dtype != torch.float64:
        shrink = torch.tensor(shrink, dtype=torch.float32, device="cpu").item()
    if shrink == 0:
        product = zero
    elif w.dtype == torch.float64:
        product = w * shrink
        product = torch.where(product.abs() < tiny, zero, product)
    else:
        # float64 holds the product of two float32 exactly, so the bound is judged the same way in
        # every floating-point mode: from half a denormal step (2**-150) below, rounding turns up.
        exact = w.double() * shrink
        product = exact.float().to(w.dtype)
        if w.dtype != torch.float16:
            product = torch.where(exact.abs() < tiny, (exact.sign() * tiny).to(w.dtype), product)
            product = torch.where(exact.abs() < tiny - 2.0**-150, zero, product)
    return torch.where(w.isnan(), w, product)


def pack(kept: Tensor) -> Tensor:
    """Packs a flat bool tensor into int32 words, lowest element in the lowest bit."""
    bits = torch.zeros(mask_words(kept.numel()) * 32, dtype=torch.uint8, device=kept.device)
    bits[: kept.numel()] = kept
    shifts = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits.view(-1, 8) << shifts).sum(1, dtype=torch.uint8).view(torch.int32)


def unpack(words: Tensor, numel: int) -> Tensor:
    """The inverse of `pack`: flat bool tensor, True = kept."""
    shifts = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = words.view(torch.uint8)[:, None] >> shifts
    return (bits & 1).bool().flatten()[:numel]


def soft_shrink_(
    weights: list[Tensor],
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    bracket: bool = True,
    patterns: Sequence[int] = (),
) -> None:
    """See `soft_shrink_` in issp/ops/schemas/pruning.py; bracket and scratch are not used here."""
    if found_inf is not None and found_inf.item() != 0:
        return
    starts, _ = mask_layout([w.numel() for w in weights])
    for t, (w, start, count) in enumerate(zip(weights, starts, k.tolist(), strict=True)):
        n, m, v = pattern_of(patterns, t)
        if not (count in (0, w.numel() // m * (m - n)) if m else 0 <= count <= w.numel()):
            continue
        flat = w.view(-1)
        if m and count:
            chosen = nm_selected(w, n, m, max(1, v), "channels" if v else "flat").view(-1)
        else:
            chosen = selected(flat, count)
        mask = masks[start : start + mask_words(w.numel())]
        old = unpack(mask, w.numel())
        mask.copy_(pack(~chosen))
        flips[t] = (old == chosen).sum()
        largest = key(flat).masked_fill(~chosen, 0).max()
        thresholds[t] = largest.view(w.dtype)
        flat.copy_(torch.where(chosen, shrunk(flat, shrink), flat))


def pattern_of(patterns: Sequence[int], t: int) -> tuple[int, int, int]:
    """(n, m, v) of tensor t; m == 0: it is unstructured."""
    if not patterns:
        return 0, 0, 0
    n, m, v = patterns[3 * t : 3 * t + 3]
    return n, m, v


def magnitude_threshold(weights: list[Tensor], k: list[int]) -> Tensor:
    """See `magnitude_threshold` in issp/ops/schemas/pruning.py."""
    thresholds = torch.zeros(len(weights), dtype=weights[0].dtype, device=weights[0].device)
    for t, (w, count) in enumerate(zip(weights, k, strict=True)):
        if count:
            ordered = torch.sort(key(w.view(-1))).values
            thresholds[t] = ordered[count - 1].view(w.dtype)
    return thresholds


def apply_masks_(tensors: list[Tensor], masks: Tensor, sets: int = 1) -> None:
    """See `apply_masks_` in issp/ops/schemas/pruning.py."""
    numels = [x.numel() for x in tensors]
    starts, _ = mask_layout(numels[: len(tensors) // sets])
    for x, n, start in zip(tensors, numels, starts * sets, strict=True):
        x.view(-1)[~unpack(masks[start : start + mask_words(n)], n)] = 0


def nm_prune(
    weight: Tensor, n: int, m: int, v: int, layout: str, shrink: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `nm_prune` in issp/ops/schemas/pruning.py."""
    chosen = nm_selected(weight, n, m, v, layout)
    return torch.where(chosen, shrunk(weight, shrink), weight), pack(~chosen.flatten())


def nm_selected(weight: Tensor, n: int, m: int, v: int, layout: str) -> Tensor:
    """True, in the weight's shape, for the m - n smallest of every group; see `nm_prune`."""
    if layout == "flat":
        groups = weight.view(1, -1, m, 1)
    else:
        groups = weight.view(weight.shape[0] // v, v, weight.shape[1] // m, m, -1)
        groups = groups.permute(0, 2, 4, 3, 1)  # [O/v, I/m, kernel, m, v]
    score = key(groups[..., 0]) if v == 1 else _l1_key(groups)
    order = torch.sort(score.reshape(*groups.shape[:-1]), dim=-1, stable=True).indices
    chosen = torch.zeros(groups.shape[:-1], dtype=torch.bool, device=weight.device)
    chosen.scatter_(-1, order[..., : m - n], True)
    if layout == "channels":
        chosen = chosen[..., None].expand(groups.shape).permute(0, 4, 1, 3, 2)
    return chosen.reshape(weight.shape).contiguous()


def _l1_key(groups: Tensor) -> Tensor:
    """Keys of the |w| summed over the last dimension, one row after the other."""
    wide = groups.abs() if groups.dtype == torch.float64 else groups.float().abs()
    total = wide[..., 0].clone()
    for row in range(1, wide.shape[-1]):
        total += wide[..., row]
    return torch.where(total.isnan(), torch.iinfo(INTEGER[total.dtype]).max, key(total))
