"""The optimizers' rules for one weight as Triton functions, and the table of a weight's state.

The same rules, in the same order, stand in issp/ops/reference/updates.py and csrc/update.h. Every
operation rounds once; where torch's fused kernels multiply and add in one rounding it is written
`fused`. Scalars are computed in float64, once per program, and rounded to float32 once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .apply_masks import pruned_in_tile
from .select import radix_search
from .semantics import factor
from .soft_shrink import AXIS, apply, patterned, shrink_apart
from .tables import RECENT, addressed, elements_in_tile, launch, split_f64, tables, uploaded
from .target import INTERPRETED, registers

# 128 registers: weight, gradient and moments of 8 elements, and the quotients' intermediate values.
LAUNCH = {"num_warps": 8, **registers(128 if RECENT else None), "enable_fp_fusion": False}
COLUMNS = 5  # of the state table: gradient, its flags, moments, step


def state_table(
    grads: Sequence[Tensor],
    columns: Sequence[Sequence[Tensor | bool]],
    grouped: Collection[int],
) -> tuple[Tensor, Tensor]:
    """The state table, and a counter for every weight, at 0.

    A row has the gradient's address, its flags, then addresses or booleans. Flags: 1 if the
    gradient is bfloat16, plus 2 if the weight is among the `grouped`, which have an N:M pattern.
    """
    rows = []
    for t, grad in enumerate(grads):
        state = [column[t] for column in columns]
        numbers = [x.data_ptr() if isinstance(x, Tensor) else int(x) for x in state]
        flags = int(grad.element_size() == 2) + 2 * int(t in grouped)
        rows.append((0, flags, *numbers, *[0] * (COLUMNS - 2 - len(numbers))))
    device = grads[0].device
    table, arrivals = uploaded(rows, device)
    return addressed(("state", *rows), table, [g.data_ptr() for g in grads]), arrivals


@triton.jit
def fused(a, b, c):
    """a * b + c with one rounding."""
    if INTERPRETED:
        # It rounds tl.fma twice. The product is exact in float64; the sum is rounded to odd, so
        # that rounding it again to float32 equals one rounding.
        wide = c.to(tl.float64)
        product = a.to(tl.float64) * b.to(tl.float64)
        total = product + wide
        back = total - product
        error = (product - (total - back)) + (wide - back)
        bits = total.to(tl.int64, bitcast=True)
        inexact = (error != 0) & ((bits & 1) == 0) & (total - total == 0)
        towards = tl.where((error > 0) == (total > 0), 1, -1)
        rounded_to_odd = (bits + towards).to(tl.float64, bitcast=True)
        return tl.where(inexact, rounded_to_odd, total).to(tl.float32)
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
    """The float32 tensor in a column of the state table."""
    return tl.load(row + column).to(tl.pointer_type(tl.float32))


@triton.jit
def selects(row):
    """Whether the update's launch counts for the selection: not for weights with an N:M pattern."""
    return (tl.load(row + 1) & 2) == 0


@triton.jit
def gradient(row, start, local, inside, grad_scale, MAXIMIZE: tl.constexpr):
    """The gradient's tile at `start`: widened, unscaled, its sign inverted to maximize."""
    address = tl.load(row)
    if (tl.load(row + 1) & 1) == 1:
        narrow = tl.load(
            address.to(tl.pointer_type(tl.int16)) + start + local, mask=inside, other=0
        )
        g = (narrow.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        g = tl.load(address.to(tl.pointer_type(tl.float32)) + start + local, mask=inside, other=0)
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
    difference = g - m
    from_start = lerp < 0.5  # torch's lerp starts from the end that is nearer
    m = flushed(fused(difference, tl.where(from_start, lerp, lerp - 1), tl.where(from_start, m, g)))
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
    rows, t, masks, n, start, pruned, FROZEN: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Of the tile at `start`, [TILE / 32, 32]: offsets, which exist, which the mask keeps."""
    word = tl.arange(0, TILE // 32)
    local = word[:, None] * 32 + tl.arange(0, 32)[None, :]
    inside = local < elements_in_tile(n, start, TILE)
    kept = inside
    if FROZEN:  # noqa: SIM102 (decided by the compiler)
        if t < pruned:
            _, dropped = pruned_in_tile(rows, t, masks, n, start // TILE, TILE)
            kept = dropped == 0
    return local, inside, kept


def launch_update(
    kernel: Callable, scalars: list[int], rule: dict[str, bool], weights: list[Tensor],
    grads: list[Tensor], columns: list[list], lr_tensor: Tensor | None, grad_scale: Tensor | None,
    k: Tensor, shrink: float, thresholds: Tensor, masks: Tensor, flips: Tensor, scratch: Tensor,
    found_inf: Tensor | None, frozen: bool, bracket: bool, patterns: Sequence[int], tile: int,
    tiles_per_program: int | None,
) -> None:  # fmt: skip
    """Launches an optimizer's kernel, then the launches that complete the selection.

    Args:
        kernel: launch 1.
        scalars: the optimizer's numbers, each as two int32 (`split_f64`).
        rule: the kernel's constants.
        columns: the further columns of the state table; see `state_table`.
        patterns: as in the schemas; a weight with a pattern or units is only updated here. Separate
            launches prune it, which read and write the weights once more.
    """
    apart = set() if frozen else patterned(patterns, k.numel())
    if frozen:
        tile //= 2  # the masks need the registers of 4 of 8 elements
    table = tables(weights, tile, tiles_per_program)
    state, arrivals = state_table(grads, columns, apart)
    count = k.numel()
    rest = [t for t in range(count) if t not in apart]
    select = len(rest) > 0 and not frozen
    bits, factors = thresholds.view(torch.int32), split_f64(shrink)
    with torch.cuda.device_of(k):
        kernel[table.grid](
            table.rows, table.tiles, state, arrivals, count, lr_tensor, grad_scale, k, bits,
            masks, flips, scratch, found_inf, *factors, *scalars,
            FROZEN=frozen and count > 0, COUNT=select and bracket,
            NUM_TILES=table.tiles_per_program, TILE=tile, AXIS=AXIS, **rule, **LAUNCH,
        )  # fmt: skip
        if select:
            select_table = tables(weights[:count], tile, tiles_per_program, rest)
            if not bracket:
                radix_search(select_table, k, thresholds, tile, flips, scratch, found_inf)
            apply[select_table.grid](
                select_table.rows, select_table.tiles, k, masks, flips, scratch, found_inf,
                *factors, DTYPE="float32", NUM_TILES=select_table.tiles_per_program, TILE=tile,
                ALIGNED=select_table.aligned,
                **launch("float32", select_table.aligned),
            )  # fmt: skip
    if apart:
        rest_of_call = (k, shrink, thresholds, masks, flips, scratch, found_inf)
        shrink_apart(weights[:count], patterns, *rest_of_call, bracket, tile)
