"""The oracle: every op in plain torch, on any device, slow and obvious.

Rules, in the order of csrc/semantics.h and triton_kernels/semantics.py: key, selected, shrunk.
Source: ISS-P, "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution", figure 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from issp.ops.reference import updates as reference_updates
from issp.ops.reference.auxiliary import count_zeros as count_zeros
from issp.ops.reference.auxiliary import magnitude_statistics as magnitude_statistics
from issp.ops.reference.auxiliary import regularized
from issp.ops.schemas import mask_layout, mask_words
from issp.ops.validation import pruning as checks
from issp.ops.validation import updates as checks_update

_INTEGER = {
    torch.float32: torch.int32,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float64: torch.int64,
}


def key(w: Tensor) -> Tensor:
    """The order of magnitudes as integers: the bits without the sign; NaN above infinity."""
    bits = w.view(_INTEGER[w.dtype])
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
    bits = w.view(_INTEGER[w.dtype])
    zero = (bits & torch.iinfo(bits.dtype).min).view(w.dtype)
    tiny = torch.finfo(w.dtype).tiny
    if shrink == 0:
        product = zero
    elif w.dtype == torch.float64:
        product = w * shrink
        product = torch.where(product.abs() < tiny, zero, product)
    else:
        # float64 holds the product of two float32 exactly, so the bound is judged the same way in
        # every floating-point mode: from half a denormal step (2**-150) below, rounding turns up.
        exact = w.double() * torch.tensor(shrink, dtype=torch.float32).item()
        product = exact.float().to(w.dtype)
        if w.dtype != torch.float16:
            product = torch.where(exact.abs() < tiny, (exact.sign() * tiny).to(w.dtype), product)
            product = torch.where(exact.abs() < tiny - 2.0**-150, zero, product)
    return torch.where(w.isnan(), w, product)


def pack(kept: Tensor) -> Tensor:
    """Packs a flat bool tensor into int32 words, lowest element in the lowest bit."""
    bits = torch.zeros(mask_words(kept.numel()) * 32, dtype=torch.uint8, device=kept.device)
    bits[: kept.numel()] = kept
    places = torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bits.view(-1, 8) << places).sum(1, dtype=torch.uint8).view(torch.int32)


def unpack(words: Tensor, numel: int) -> Tensor:
    """The inverse of `pack`: flat bool tensor, True = kept."""
    places = torch.arange(8, dtype=torch.uint8, device=words.device)
    bits = words.view(torch.uint8)[:, None] >> places
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
    """See `soft_shrink_` in schemas.py. Neither the bracket nor the scratch is used here."""
    state = (k, shrink, thresholds, masks, flips, scratch)
    checks.soft_shrink(weights, *state, found_inf, bracket, patterns)
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
    return tuple(patterns[3 * t : 3 * t + 3]) if patterns else (0, 0, 0)


def adam_soft_shrink_(
    weights: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
    maximize: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    frozen: bool = False,
    bracket: bool = True,
    patterns: Sequence[int] = (),
) -> None:
    """See `adam_soft_shrink_` in schemas.py; the rule stands in reference_updates.py."""
    state = (k, shrink, thresholds, masks, flips, scratch, found_inf)
    scalars = (lr, beta1, beta2, eps, weight_decay, decoupled)
    checks_update.adam_soft_shrink(
        *(weights, grads, exp_avgs, exp_avg_sqs, steps),
        *(*scalars, maximize, lr_tensor, grad_scale, *state, frozen, bracket, patterns),
    )
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    for w, grad, m, v, step in zip(weights, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        g = reference_updates.gradient(grad, grad_scale, maximize)
        wide_w, wide_m, wide_v = map(reference_updates.widen, (w, m, v))
        updated = reference_updates.adam_updated(
            wide_w, g, wide_m, wide_v, max(0, int(step.item())), rate, *scalars[1:]
        )
        _store((w, m, v), updated)
    _after_update(weights, [exp_avgs, exp_avg_sqs], *state[:-1], frozen, patterns)


def sgd_soft_shrink_(
    weights: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first: list[bool],
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    maximize: bool,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    frozen: bool = False,
    bracket: bool = True,
    patterns: Sequence[int] = (),
) -> None:
    """See `sgd_soft_shrink_` in schemas.py; the rule stands in reference_updates.py."""
    state = (k, shrink, thresholds, masks, flips, scratch, found_inf)
    scalars = (lr, momentum, dampening, weight_decay, nesterov)
    checks_update.sgd_soft_shrink(
        *(weights, grads, momentum_buffers, first),
        *(*scalars, maximize, lr_tensor, grad_scale, *state, frozen, bracket, patterns),
    )
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
        g = reference_updates.gradient(grad, grad_scale, maximize)
        buffer = reference_updates.widen(momentum_buffers[i]) if momentum else None
        updated = reference_updates.sgd_updated(
            reference_updates.widen(w), g, buffer, bool(momentum) and first[i], rate, *scalars[1:]
        )
        _store((w, momentum_buffers[i]) if momentum else (w,), updated)
    moments = [momentum_buffers] if momentum else []
    _after_update(weights, moments, *state[:-1], frozen, patterns)


def _store(tensors: tuple[Tensor, ...], values: tuple[Tensor | None, ...]) -> None:
    for tensor, value in zip(tensors, values, strict=False):
        tensor.copy_(reference_updates.narrow(value))


def _after_update(
    weights: list[Tensor],
    moments: list[list[Tensor]],
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    frozen: bool,
    patterns: Sequence[int],
) -> None:
    """What follows the optimizer's update on the first weights, as many as k has entries."""
    count = k.numel()
    if not count:
        return
    if frozen:
        for tensors in (weights, *moments):
            apply_masks_(tensors[:count], masks)
        flips.zero_()
    else:
        state = (k, shrink, thresholds, masks, flips, scratch)
        soft_shrink_(weights[:count], *state, patterns=patterns)


def magnitude_threshold(weights: list[Tensor], k: list[int]) -> Tensor:
    """See `magnitude_threshold` in schemas.py."""
    checks.magnitude_threshold(weights, k)
    found = torch.zeros(len(weights), dtype=weights[0].dtype, device=weights[0].device)
    for t, (w, count) in enumerate(zip(weights, k, strict=True)):
        if count:
            ordered = torch.sort(key(w.view(-1))).values
            found[t] = ordered[count - 1].view(w.dtype)
    return found


def apply_masks_(tensors: list[Tensor], masks: Tensor, sets: int = 1) -> None:
    """See `apply_masks_` in schemas.py."""
    checks.apply_masks(tensors, masks, sets)
    numels = [x.numel() for x in tensors]
    starts, _ = mask_layout(numels[: len(tensors) // sets])
    for x, n, start in zip(tensors, numels, starts * sets, strict=True):
        x.view(-1)[~unpack(masks[start : start + mask_words(n)], n)] = 0


def regularize_(grads: list[Tensor], weights: list[Tensor], factors: Tensor, masks: Tensor) -> None:
    """See `regularize_` in schemas.py."""
    checks.regularize(grads, weights, factors, masks)
    starts, _ = mask_layout([w.numel() for w in weights])
    for g, w, factor, start in zip(grads, weights, factors, starts, strict=True):
        kept = unpack(masks[start : start + mask_words(w.numel())], w.numel()).view(g.shape)
        g.copy_(torch.where(kept, g, regularized(g, w.view(g.shape), factor)))


def nm_prune(
    weight: Tensor, n: int, m: int, v: int, layout: str, shrink: float = 0.0
) -> tuple[Tensor, Tensor]:
    """See `nm_prune` in schemas.py."""
    checks.nm_prune(weight, n, m, v, layout, shrink)
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
    return torch.where(total.isnan(), torch.iinfo(_INTEGER[total.dtype]).max, key(total))
