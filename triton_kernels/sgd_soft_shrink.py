"""sgd_soft_shrink_: SGD's update of a parameter group, then soft_shrink_ on its first weights.

Launches as in adam_soft_shrink.py. Traffic per weight by launch 1: 12 bytes read (weight, gradient,
momentum), 8 written; without momentum 8 and 4.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .semantics import factor
from .soft_shrink import count_tiles
from .tables import TILE, locate, overflowed, pointer, split_f64
from .updates import float_pointer, gradient, kept_tile, launch_update, rate, selects, sgd_updated


@triton.jit(
    do_not_specialize=[
        "pruned", "lr_high", "lr_low", "momentum_high", "momentum_low", "damping_high",
        "damping_low", "decay_high", "decay_low", "shrink_high", "shrink_low",
    ]
)  # fmt: skip
def sgd(
    rows, tiles, state_table, arrivals, pruned, lr_tensor, grad_scale, k, thresholds, masks, flips,
    scratch, found_inf, shrink_high, shrink_low, lr_high, lr_low, momentum_high, momentum_low,
    damping_high, damping_low, decay_high, decay_low,
    DECAY: tl.constexpr, MOMENTUM: tl.constexpr, NESTEROV: tl.constexpr, MAXIMIZE: tl.constexpr,
    FROZEN: tl.constexpr, COUNT: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Launch 1. `arrivals` is not used: there is no step to count."""
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    state_row = state_table + t.to(tl.int64) * 5
    weight = address.to(tl.pointer_type(tl.float32))
    momenta = float_pointer(state_row, 2)
    is_first_step = tl.load(state_row + 3) == 1
    minus_lr = -(rate(lr_tensor, lr_high, lr_low).to(tl.float32))
    momentum = factor(momentum_high, momentum_low, "float32")
    rest = (1.0 - factor(damping_high, damping_low, "float64")).to(tl.float32)
    decay = factor(decay_high, decay_low, "float32")
    start = index * (NUM_TILES * TILE)
    for at in range(start, tl.minimum(n, start + NUM_TILES * TILE), TILE):
        local, inside, kept = kept_tile(rows, t, masks, n, at, pruned, FROZEN, TILE)
        w = tl.load(weight + at + local, mask=inside, other=0.0)
        buffer = w
        if MOMENTUM:
            buffer = tl.load(momenta + at + local, mask=inside, other=0.0)
        g = gradient(state_row, at, local, inside, grad_scale, MAXIMIZE)
        w, buffer = sgd_updated(
            w, g, buffer, is_first_step, decay, momentum, rest, minus_lr, DECAY, MOMENTUM, NESTEROV
        )
        tl.store(weight + at + local, tl.where(kept, w, 0.0), mask=inside)
        if MOMENTUM:
            tl.store(momenta + at + local, tl.where(kept, buffer, 0.0), mask=inside)
    if FROZEN:  # noqa: SIM102 (decided by the compiler)
        if (t < pruned) & (index == 0):
            tl.store(flips + t, 0)
    if COUNT:
        tl.debug_barrier()  # count_tiles reads the tiles in another layout than they were written
        if (t < pruned) & selects(state_row):
            wanted = tl.load(k + t)
            if (wanted >= 0) & (wanted <= n):
                source = pointer(address, "float32", False)
                shrink = factor(shrink_high, shrink_low, "float32")
                count_tiles(
                    rows, t, source, n, index, programs, wanted, thresholds, flips, scratch,
                    shrink, "float32", NUM_TILES, TILE, AXIS,
                )  # fmt: skip


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
    *,
    tile: int = TILE,
    tiles_per_program: int | None = None,
) -> None:
    """See `sgd_soft_shrink_` in the schemas."""
    scalars = [x for value in (lr, momentum, dampening, weight_decay) for x in split_f64(value)]
    rule = {
        "DECAY": weight_decay != 0,
        "MOMENTUM": momentum != 0,
        "NESTEROV": nesterov,
        "MAXIMIZE": maximize,
    }
    columns = [momentum_buffers, first] if momentum else []
    launch_update(
        sgd, scalars, rule, weights, grads, columns, lr_tensor, grad_scale, k, shrink, thresholds,
        masks, flips, scratch, found_inf, frozen, bracket, patterns, tile, tiles_per_program,
    )  # fmt: skip
