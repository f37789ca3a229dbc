"""Argument checks of the ops: one clear sentence with the remedy, before anything is written.

csrc/checks.h makes the same checks at native speed; `issp.ops` comes here for the exact sentence
and kind of error when a native op refuses. The optimizer ops' stand in checks_update.py, the
products' in checks_products.py.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor

from issp.ops.schemas import mask_layout, mask_words, scratch_words

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def tensors(
    values: Sequence[Tensor], name: str, same_dtype: bool = True, written: bool = True
) -> None:
    """A non-empty list of non-empty, contiguous tensors of one device (and dtype).

    Those that are written lie in separate memory; what is only read may be listed twice.
    """
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of tensors, not {type(values).__name__}")
    if not values:
        raise ValueError(f"{name} is an empty list: pass at least one tensor")
    first = values[0]
    for i, x in enumerate(values):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, not {type(x).__name__}")
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name}[{i}] has dtype {x.dtype}: use float32, float16, bfloat16, float64"
            )
        if same_dtype and x.dtype != first.dtype:
            raise TypeError(
                f"{name}[{i}] has dtype {x.dtype} but {name}[0] has {first.dtype}: group by dtype"
            )
        if x.device != first.device:
            raise ValueError(
                f"{name}[{i}] is on {x.device} but {name}[0] is on {first.device}: group by device"
            )
        if not x.is_contiguous():
            raise ValueError(
                f"{name}[{i}] is not contiguous: pass {name}[{i}].contiguous() and copy back"
            )
        if x.numel() == 0:
            raise ValueError(f"{name}[{i}] is empty: leave it out")
    if written:
        _separate([(x, f"{name}[{i}]") for i, x in enumerate(values)])


def _separate(named: Sequence[tuple[Tensor, str]]) -> None:
    if not torch.compiler.is_compiling():
        spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for x, name in named)
        for (_, end, left), (begin, _, right) in zip(spans, spans[1:], strict=False):
            if begin < end:
                raise ValueError(f"{left} and {right} overlap in memory: pass shared weights once")


def vector(x: Tensor, name: str, dtype: torch.dtype, length: int, device: torch.device) -> None:
    """One contiguous dimension of so many elements, on the weights' device."""
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}: it must be {dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the weights are on {device}: move it there")
    if x.dim() != 1 or x.numel() != length or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous with {length} elements, not shape {tuple(x.shape)}: "
            "build it with issp.ops.ShrinkState"
        )


def shrink_factor(shrink: float) -> None:
    """Whether alpha lies in 0..1."""
    if not 0.0 <= shrink <= 1.0:
        raise ValueError(f"shrink is {shrink}: it must lie in 0..1 (0 is hard thresholding)")


def soft_shrink(
    weights,
    k,
    shrink,
    thresholds,
    masks,
    flips,
    scratch,
    found_inf=None,
    bracket=True,
    patterns=(),
):
    """Checks of `soft_shrink_`; `bracket` needs none."""
    tensors(weights, "weights")
    shrink_factor(shrink)
    numels = [w.numel() for w in weights]
    device, count = weights[0].device, len(weights)
    vector(k, "k", torch.int64, count, device)
    vector(thresholds, "thresholds", weights[0].dtype, count, device)
    vector(masks, "masks", torch.int32, mask_layout(numels)[1], device)
    vector(flips, "flips", torch.int64, count, device)
    vector(scratch, "scratch", torch.int32, scratch_words(numels), device)
    if found_inf is not None:
        vector(found_inf.view(-1), "found_inf", torch.float32, 1, device)
    state = {"k": k, "thresholds": thresholds, "masks": masks, "flips": flips, "scratch": scratch}
    _separate(
        [(w, f"weights[{i}]") for i, w in enumerate(weights)] + [(x, n) for n, x in state.items()]
    )
    divisible(weights, patterns)
    if device.type == "cpu":
        ranks(k.tolist(), numels, "weights", patterns)


def beside(weights, values, name, dtypes, numel=None) -> None:
    """One contiguous tensor per weight, on its device and (unless `numel` says) of its size."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of tensors, not {type(values).__name__}")
    if len(values) != len(weights):
        raise ValueError(f"{name} has {len(values)} entries for {len(weights)} weights")
    for i, (w, x) in enumerate(zip(weights, values, strict=True)):
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}[{i}] must be a tensor, not {type(x).__name__}")
        if x.dtype not in dtypes:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}: use {' or '.join(map(str, dtypes))}")
        if x.device != w.device:
            raise ValueError(f"{name}[{i}] is on {x.device} but the weight is on {w.device}")
        if x.numel() != (w.numel() if numel is None else numel):
            raise ValueError(
                f"{name}[{i}] has {x.numel()} elements: it needs "
                f"{w.numel() if numel is None else numel}, for weights[{i}]"
            )
        if not x.is_contiguous():
            raise ValueError(f"{name}[{i}] is not contiguous: pass {name}[{i}].contiguous()")


def separate_from(
    written: Sequence[tuple[Tensor, str]], read: Sequence[tuple[Tensor, str]]
) -> None:
    """What is written overlaps nothing; what is only read may be shared."""
    _separate(written)
    if torch.compiler.is_compiling():
        return
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for x, name in written)
    starts = [begin for begin, _, _ in spans]
    for x, name in read:
        begin, end = x.data_ptr(), x.data_ptr() + x.nbytes
        last = bisect.bisect_left(starts, end) - 1
        if last >= 0 and spans[last][1] > begin:
            raise ValueError(f"{name} and {spans[last][2]} overlap in memory: pass a copy")


def ranks(k: Sequence[int], numels: Sequence[int], name: str, patterns: Sequence[int] = ()) -> None:
    """One k per tensor, each in 0..n; that of an N:M tensor is 0 or all that its pattern prunes."""
    if len(k) != len(numels):
        raise ValueError(f"k has {len(k)} entries for {len(numels)} tensors: give one per tensor")
    for i, (count, numel) in enumerate(zip(k, numels, strict=True)):
        if not 0 <= count <= numel:
            raise ValueError(
                f"k[{i}] is {count} but {name}[{i}] has {numel} elements: use 0..{numel}"
            )
    for i in range(len(patterns) // 3):
        n, m, _ = patterns[3 * i : 3 * i + 3]
        if m and k[i] not in (0, numels[i] // m * (m - n)):
            raise ValueError(
                f"k[{i}] is {k[i]} but {name}[{i}] keeps {n} of {m}: use 0 or "
                f"{numels[i] // m * (m - n)}"
            )


def divisible(weights: Sequence[Tensor], patterns: Sequence[int]) -> None:
    """Whether the ops' `patterns` divide the weights."""
    if patterns and len(patterns) != 3 * len(weights):
        raise ValueError(
            f"patterns has {len(patterns)} numbers for {len(weights)} pruned weights: give n, m, v "
            "of each, or none"
        )
    for i in range(len(patterns) // 3):
        n, m, v = patterns[3 * i : 3 * i + 3]
        if m:
            pattern(weights[i], f"weights[{i}]", n, m, v or 1, "channels" if v else "flat")


def magnitude_threshold(weights, k) -> None:
    """Checks of `magnitude_threshold`."""
    tensors(weights, "weights")
    ranks(k, [w.numel() for w in weights], "weights")


def apply_masks(values, masks, sets=1) -> None:
    """Checks of `apply_masks_`."""
    tensors(values, "tensors", same_dtype=False)
    if sets < 1 or len(values) % sets:
        raise ValueError(
            f"{len(values)} tensors do not make {sets} sets: give one tensor per weight and set"
        )
    numels = [x.numel() for x in values]
    count = len(values) // sets
    for i, numel in enumerate(numels):
        if numel != numels[i % count]:
            raise ValueError(
                f"tensors[{i}] has {numel} elements but shares the mask of tensors[{i % count}] "
                f"with {numels[i % count]}: give the sets in the order of the weights"
            )
    vector(masks, "masks", torch.int32, mask_layout(numels[:count])[1], values[0].device)
    _separate([(x, f"tensors[{i}]") for i, x in enumerate(values)] + [(masks, "masks")])


def regularize(grads, weights, factors, masks) -> None:
    """Checks of `regularize_`."""
    tensors(weights, "weights")
    dtype, device = weights[0].dtype, weights[0].device
    beside(weights, grads, "grads", (dtype,))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    if not isinstance(factors, Tensor):
        raise TypeError(f"factors must be a tensor, not {type(factors).__name__}")
    if factors.dtype != wide:
        raise TypeError(f"factors has dtype {factors.dtype}: it must be {wide} for {dtype} weights")
    if factors.device != device:
        raise ValueError(f"factors is on {factors.device} but the weights are on {device}")
    if factors.shape != (len(weights),) or not factors.is_contiguous():
        raise ValueError(
            f"factors must be contiguous with {len(weights)} elements, one per weight, not shape "
            f"{tuple(factors.shape)}"
        )
    vector(masks, "masks", torch.int32, mask_layout([w.numel() for w in weights])[1], device)
    read = [(w, f"weights[{i}]") for i, w in enumerate(weights)]
    separate_from(
        [(g, f"grads[{i}]") for i, g in enumerate(grads)],
        [*read, (factors, "factors"), (masks, "masks")],
    )


def magnitude_statistics(values) -> None:
    """Checks of `magnitude_statistics`."""
    tensors(values, "tensors", written=False)


def count_zeros(values) -> None:
    """Checks of `count_zeros`."""
    tensors(values, "tensors", same_dtype=False, written=False)


def nm_prune(weight, n, m, v, layout, shrink=0.0) -> None:
    """Checks of `nm_prune`; a dimension that the pattern does not divide is an error."""
    tensors([weight], "weight")
    shrink_factor(shrink)
    pattern(weight, "weight", n, m, v, layout)


def pattern(weight, name, n, m, v, layout) -> None:
    """Whether an N:M pattern divides a weight."""
    if not 1 <= n <= m:
        raise ValueError(f"keep n = {n} of m = {m}: n must lie in 1..m")
    if v < 1:
        raise ValueError(f"v is {v}: it must be at least 1")
    shape = tuple(weight.shape)
    if layout == "flat":
        if v != 1:
            raise ValueError(f'layout "flat" has no rows to share a pattern (v = {v}): use v = 1')
        if weight.numel() % m:
            raise ValueError(
                f"m = {m} does not divide the {weight.numel()} elements of {name} {shape}: choose "
                "another"
            )
    elif layout == "channels":
        if weight.dim() < 2:
            raise ValueError(
                f'layout "channels" needs a weight [O, I, ...], not {name} {shape}: use "flat"'
            )
        if weight.shape[1] % m or weight.shape[0] % v:
            raise ValueError(
                f"{name} {shape} does not divide into groups of m = {m} input channels and "
                f"v = {v} output rows: choose other numbers or leave the layer dense"
            )
    else:
        raise ValueError(f'layout is "{layout}": use "channels" or "flat"')
    if mask_words(weight.numel()) >= 2**31:
        raise ValueError(f"{name} of shape {shape} is too large for one packed mask")
