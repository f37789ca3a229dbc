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
        n, m, v, c = pattern_of(patterns, t)
        if not (count in (0, w.numel() // m * (m - n)) if m else 0 <= count <= w.numel()):
            continue
        if v and not m and count % (v * c):
            continue
        flat = w.view(-1)
        if m and count:
            layout = "channels" if v else "flat"
            chosen = nm_selected(w, n, m, max(1, v), layout, c).view(-1)
        elif v and count:
            chosen = units_selected(w, count, v, c).view(-1)
        else:
            chosen = selected(flat, count)
        mask = masks[start : start + mask_words(w.numel())]
        old = unpack(mask, w.numel())
        mask.copy_(pack(~chosen))
        flips[t] = (old == chosen).sum()
        largest = key(flat).masked_fill(~chosen, 0).max()
        thresholds[t] = largest.view(w.dtype)
        flat.copy_(torch.where(chosen, shrunk(flat, shrink), flat))


def pattern_of(patterns: Sequence[int], t: int) -> tuple[int, int, int, int]:
    """(n, m, v, c) of tensor t; m == 0: it has no groups, and if v == 0, no units."""
    if not patterns:
        return 0, 0, 0, 0
    n, m, v, c = patterns[4 * t : 4 * t + 4]
    return n, m, v, c


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
    weight: Tensor, n: int, m: int, v: int, layout: str, shrink: float = 0.0, c: int = 1
) -> tuple[Tensor, Tensor]:
    """See `nm_prune` in issp/ops/schemas/pruning.py."""
    chosen = nm_selected(weight, n, m, v, layout, c)
    return torch.where(chosen, shrunk(weight, shrink), weight), pack(~chosen.flatten())


def nm_selected(weight: Tensor, n: int, m: int, v: int, layout: str, c: int = 1) -> Tensor:
    """True, in the weight's shape, for the m - n smallest of every group; see `nm_prune`."""
    if layout == "flat":
        scores = key(weight).view(1, -1, m, 1)
    else:
        scores = unit_scores(weight, v, c)
        scores = scores.view(len(scores), weight.shape[1] // m, m // c, -1)
    order = torch.sort(scores, dim=2, stable=True).indices
    chosen = torch.zeros(scores.shape, dtype=torch.bool, device=weight.device)
    chosen.scatter_(2, order[:, :, : (m - n) // c], True)
    return chosen.view(weight.shape) if layout == "flat" else _of_units(chosen, weight, v, c)


def units_selected(weight: Tensor, k: int, v: int, c: int) -> Tensor:
    """True, in the weight's shape, for the k weights of the units of the smallest scores."""
    scores = unit_scores(weight, v, c).view(-1)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool, device=weight.device)
    chosen[torch.sort(scores, stable=True).indices[: k // (v * c)]] = True
    return _of_units(chosen, weight, v, c)


def unit_scores(weight: Tensor, v: int, c: int) -> Tensor:
    """Keys of the units' summed |w|, integers [O / v, I / c, kernel]; see `nm_prune`."""
    rows, channels = weight.shape[:2]
    if v == c == 1:
        return key(weight).view(rows, channels, -1)
    wide = weight.abs() if weight.dtype == torch.float64 else weight.float().abs()
    total = _added(_added(wide.view(rows // v, v, channels // c, c, -1), 1), 2).contiguous()
    return torch.where(total.isnan(), torch.iinfo(INTEGER[total.dtype]).max, key(total))


def _added(x: Tensor, dim: int) -> Tensor:
    """The sum over a dimension, one term after the other."""
    first, *others = x.unbind(dim)
    total = first.clone()
    for term in others:
        total += term
    return total


def _of_units(chosen: Tensor, weight: Tensor, v: int, c: int) -> Tensor:
    """What is chosen of the units, for each of their weights, in the weight's shape."""
    rows, channels = weight.shape[:2]
    each = chosen.view(rows // v, 1, channels // c, 1, -1)
    return each.expand(-1, v, -1, c, -1).reshape(weight.shape).contiguous()
