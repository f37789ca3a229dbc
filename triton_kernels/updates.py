"""The optimizers' rules for one weight as Triton functions, and the tensors beside a weight.

The same rules, in the same order, stand in issp/ops/reference/updates.py and csrc/update.h. Every
operation rounds once; where torch's fused kernels multiply and add in one rounding it is written
`fused`. Scalars are computed in float64, once per program, and rounded to float32 once.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .apply_masks import pruned_in_tile
from .nm_shrink import TILE as GROUP_TILE
from .nm_shrink import grouped, shrink_all
from .select import radix_search
from .semantics import factor
from .soft_shrink import AXIS, apply
from .tables import RECENT, halves, launch, left, tables, uploaded

# The interpreter rounds tl.fma twice.
INTERPRETED: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")

# 128 registers: weight, gradient and moments of 8 elements, and the quotients' intermediate values.
LAUNCH = {"num_warps": 8, "maxnreg": 128 if RECENT else None, "enable_fp_fusion": False}
COLUMNS = 5  # of the table of what stands beside a weight: gradient, its dtype, moments, step


def rows_beside(
    grads: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor | bool]],
    grouped: Sequence[int] = (),
) -> list[tuple[int, ...]]:
    """Per weight: the gradient's address, what it is, then addresses or flags.

    What it is: 1 if it is bfloat16, plus 2 if the weight is among the `grouped`, which have an N:M
    pattern.
    """
    lists = [[x.data_ptr() if isinstance(x, Tensor) else int(x) for x in c] for c in columns]
    lists += [[0] * len(grads)] * (COLUMNS - 2 - len(lists))
    own = [
        (g.data_ptr(), int(g.element_size() == 2) + 2 * int(t in grouped))
        for t, g in enumerate(grads)
    ]
    return [(*mine, *others) for mine, *others in zip(own, *lists, strict=True)]


@triton.jit
def fused(a, b, c):
    """a * b + c with one rounding."""
    if INTERPRETED:
        # float64 holds the product; the sum rounded to odd, from which rounding on is exact.
        wide = c.to(tl.float64)
        product = a.to(tl.float64) * b.to(tl.float64)
        total = product + wide
        back = total - product
        error = (product - (total - back)) + (wide - back)
        bits = total.to(tl.int64, bitcast=True)
        inexact = (error != 0) & ((bits & 1) == 0) & (total - total == 0)
        towards = tl.where((error > 0) == (total > 0), 1, -1)
        odd = (bits + towards).to(tl.float64, bitcast=True)
        return tl.where(inexact, odd, total).to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def flushed(x):
    """Below the smallest normal number: a zero of x's sign."""
    bits = x.to(tl.int32, bitcast=True)
    zero = bits & -0x80000000
    return tl.where((bits & 0x7F800000) == 0, zero, bits).to(tl.float32, bitcast=True)


@triton.jit
def power(base, n):
    """base**n in float64 by squaring, lowest bit of n first."""
    result = base * 0 + 1.0
    while n > 0:
        result = tl.where((n & 1) == 1, result * base, result)
        base = base * base
        n = n >> 1
    return result


@triton.jit
def rate(lr_tensor, lr_high, lr_low):
    """The learning rate in float64: that of the tensor, if there is one."""
    if lr_tensor is None:
        return factor(lr_high, lr_low, "float64")
    else:
        return tl.load(lr_tensor).to(tl.float64)


@triton.jit
def float_pointer(row, column):
    """The float32 tensor in a column of what stands beside a weight."""
    return tl.load(row + column).to(tl.pointer_type(tl.float32))


@triton.jit
def selects(row):
    """Whether the update's launch counts what is to be selected of a pruned weight."""
    return (tl.load(row + 1) & 2) == 0


@triton.jit
def gradient(row, at, place, inside, grad_scale, MAXIMIZE: tl.constexpr):
    """The tile at `at` of the gradient: widened, unscaled, its sign turned to maximize."""
    address = tl.load(row)
    if (tl.load(row + 1) & 1) == 1:
        narrow = tl.load(address.to(tl.pointer_type(tl.int16)) + at + place, mask=inside, other=0)
        g = (narrow.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        g = tl.load(address.to(tl.pointer_type(tl.float32)) + at + place, mask=inside, other=0)
    if grad_scale is not None:
        g = tl.div_rn(g, tl.load(grad_scale) + tl.zeros_like(g))
    if MAXIMIZE:
        g = -g
    return g


@triton.jit
def adam_updated(
    w, g, m, v, decay, decoupled, lerp, beta2, rest2, eps, bias2_root, step_size,
    COUPLED: tl.constexpr, DECOUPLED: tl.constexpr,
):  # fmt: skip
    """New weight, first and second moment; lerp: 1 - beta1, rest2: 1 - beta2."""
    if COUPLED:
        g = fused(w, decay, g)
    if DECOUPLED:
        w = w * decoupled
    ahead = g - m
    near = lerp < 0.5  # torch's lerp starts from the end that is nearer
    m = flushed(fused(ahead, tl.where(near, lerp, lerp - 1), tl.where(near, m, g)))
    v = flushed(fused(g * rest2, g, v * beta2))
    denominator = tl.div_rn(tl.sqrt_rn(v), bias2_root + tl.zeros_like(v)) + eps
    return w - tl.div_rn(step_size * m, denominator), m, v


@triton.jit
def sgd_updated(
    w, g, buffer, first, decay, momentum, rest, minus_lr,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr,
):  # fmt: skip
    """New weight and momentum buffer; rest: 1 - dampening."""
    if DECAY:
        g = fused(w, decay, g)
    if MOMENTUM:
        buffer = flushed(tl.where(first, g, fused(g, rest, buffer * momentum)))
        if NESTEROV:  # noqa: SIM108 (likewise)
            g = fused(buffer, momentum, g)
        else:
            g = buffer
    return fused(g, minus_lr, w), buffer


@triton.jit
def kept_tile(
    rows, t, masks, n, at, pruned, FROZEN: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Of the tile at `at`, [TILE / 32, 32]: places in it, which exist, which a mask keeps."""
    word = tl.arange(0, TILE // 32)
    local = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = local < left(n, at, TILE)
    kept = inside
    if FROZEN:  # noqa: SIM102 (decided by the compiler)
        if t < pruned:
            _, dropped = pruned_in_tile(rows, t, masks, n, at // TILE, TILE)
            kept = dropped == 0
    return local, inside, kept


def run(
    kernel: Callable, scalars: list[int], rule: dict[str, bool], weights: list[Tensor],
    grads: list[Tensor], columns: list[list], lr_tensor: Tensor | None, grad_scale: Tensor | None,
    k: Tensor, shrink: float, thresholds: Tensor, masks: Tensor, flips: Tensor, scratch: Tensor,
    found_inf: Tensor | None, frozen: bool, bracket: bool, patterns: Sequence[int], tile: int,
    span: int | None,
) -> None:  # fmt: skip
    """Launches an optimizer's kernel, and behind it what it leaves of the selection.

    Args:
        kernel: launch 1.
        scalars: the optimizer's numbers, each as two halves.
        rule: its constants.
        columns: the further lists that stand beside the weights; see `rows_beside`.
        patterns: as in the schemas; what has one is updated only, then selected from by a launch of
            its own, for which the weights are read and written once more.
    """
    if scratch.data_ptr() % 8:
        raise ValueError("scratch does not start on 8 bytes: allocate it as a tensor of its own")
    by_groups = set() if frozen else set(grouped(patterns, k.numel()))
    if frozen:
        tile //= 2  # the masks take what 4 of 8 elements leave
    found = tables(weights, tile, span)
    table, arrivals = uploaded(rows_beside(grads, columns, by_groups), weights[0].device)
    count = k.numel()
    rest = [t for t in range(count) if t not in by_groups]
    select = len(rest) > 0 and not frozen
    bits, factors = thresholds.view(torch.int32), halves(shrink)
    with torch.cuda.device_of(k):
        kernel[found.grid](
            found.rows, found.tiles, table, arrivals, count, lr_tensor, grad_scale, k, bits, masks,
            flips, scratch, found_inf, *factors, *scalars,
            FROZEN=frozen and count > 0, COUNT=select and bracket, SPAN=found.span, TILE=tile,
            AXIS=AXIS, **rule, **LAUNCH,
        )  # fmt: skip
        if select:
            own = tables(weights[:count], tile, span, rest)
            if not bracket:
                radix_search(own, k, thresholds, tile, flips, scratch, found_inf)
            apply[own.grid](
                own.rows, own.tiles, k, masks, flips, scratch, found_inf, *factors,
                DTYPE="float32", SPAN=own.span, TILE=tile, ALIGNED=own.aligned,
                **launch("float32", own.aligned),
            )  # fmt: skip
    if by_groups:
        state = (thresholds, masks, flips, scratch, found_inf)
        shrink_all(weights[:count], patterns, k, shrink, *state, tile=min(tile, GROUP_TILE))
