"""adam_soft_shrink_: Adam's update of a parameter group, then soft_shrink_ on its first weights.

Launches, as soft_shrink_ but for the update in front:

1. update  a program per NUM_TILES tiles: updates weight and moments, and for a weight to prune
           counts and collects candidates as soft_shrink's `count` does, from the weights that it
           has just written (read from L1 or L2). The last program of a weight adds 1 to its step.
2. apply   soft_shrink's.

With fixed masks, or without a weight to prune, the first launch does everything. Traffic per weight
by launch 1: 16 bytes read (weight, gradient, moments; 14 with a bfloat16 gradient), 12 written.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .select import last_to_arrive
from .semantics import factor
from .soft_shrink import count_tiles
from .tables import TILE, locate, overflowed, pointer, split_f64
from .updates import (
    adam_updated,
    float_pointer,
    gradient,
    kept_tile,
    launch_update,
    power,
    rate,
    selects,
)

LAST_STEP = tl.constexpr(4294967040.0)  # the largest float32 below 2**32


@triton.jit(
    do_not_specialize=[
        "pruned", "lr_high", "lr_low", "beta1_high", "beta1_low", "beta2_high", "beta2_low",
        "eps_high", "eps_low", "decay_high", "decay_low", "shrink_high", "shrink_low",
    ]
)  # fmt: skip
def adam(
    rows, tiles, state_table, arrivals, pruned, lr_tensor, grad_scale, k, thresholds, masks, flips,
    scratch, found_inf, shrink_high, shrink_low, lr_high, lr_low, beta1_high, beta1_low,
    beta2_high, beta2_low, eps_high, eps_low, decay_high, decay_low,
    COUPLED: tl.constexpr, DECOUPLED: tl.constexpr, MAXIMIZE: tl.constexpr,
    FROZEN: tl.constexpr, COUNT: tl.constexpr, NUM_TILES: tl.constexpr, TILE: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """Launch 1."""
    if overflowed(found_inf):
        return
    t, address, n, index, programs = locate(rows, tiles, tl.program_id(0))
    state_row = state_table + t.to(tl.int64) * 5
    weight = address.to(tl.pointer_type(tl.float32))
    exp_avg = float_pointer(state_row, 2)
    exp_avg_sq = float_pointer(state_row, 3)
    step = float_pointer(state_row, 4)
    new_step = tl.load(step) + 1
    lr = rate(lr_tensor, lr_high, lr_low)
    beta1 = factor(beta1_high, beta1_low, "float64")
    beta2 = factor(beta2_high, beta2_low, "float64")
    decay = factor(decay_high, decay_low, "float64")
    eps = factor(eps_high, eps_low, "float64").to(tl.float32)
    counted = tl.where(new_step > 0, tl.minimum(new_step, LAST_STEP), 0.0)  # NaN counts as 0
    step_number = counted.to(tl.int64)
    bias2_root = tl.sqrt(1.0 - power(beta2, step_number)).to(tl.float32)
    step_size = (lr / (1.0 - power(beta1, step_number))).to(tl.float32)
    start = index * (NUM_TILES * TILE)
    for at in range(start, tl.minimum(n, start + NUM_TILES * TILE), TILE):
        local, inside, kept = kept_tile(rows, t, masks, n, at, pruned, FROZEN, TILE)
        w = tl.load(weight + at + local, mask=inside, other=0.0)
        m = tl.load(exp_avg + at + local, mask=inside, other=0.0)
        v = tl.load(exp_avg_sq + at + local, mask=inside, other=0.0)
        g = gradient(state_row, at, local, inside, grad_scale, MAXIMIZE)
        w, m, v = adam_updated(
            w, g, m, v, decay.to(tl.float32), (1.0 - lr * decay).to(tl.float32),
            (1.0 - beta1).to(tl.float32), beta2.to(tl.float32), (1.0 - beta2).to(tl.float32), eps,
            bias2_root, step_size, COUPLED, DECOUPLED,
        )  # fmt: skip
        tl.store(weight + at + local, tl.where(kept, w, 0.0), mask=inside)
        tl.store(exp_avg + at + local, tl.where(kept, m, 0.0), mask=inside)
        tl.store(exp_avg_sq + at + local, tl.where(kept, v, 0.0), mask=inside)
    # All programs of the weight have read its step when the last one arrives.
    if last_to_arrive(arrivals + t, programs):
        tl.store(step, new_step)
        if FROZEN:  # noqa: SIM102 (decided by the compiler)
            if t < pruned:
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
    *,
    tile: int = TILE,
    tiles_per_program: int | None = None,
) -> None:
    """See `adam_soft_shrink_` in the schemas."""
    scalars = [x for value in (lr, beta1, beta2, eps, weight_decay) for x in split_f64(value)]
    rule = {
        "COUPLED": weight_decay != 0 and not decoupled,
        "DECOUPLED": weight_decay != 0 and decoupled,
        "MAXIMIZE": maximize,
    }
    launch_update(
        adam, scalars, rule, weights, grads, [exp_avgs, exp_avg_sqs, steps], lr_tensor,
        grad_scale, k, shrink, thresholds, masks, flips, scratch, found_inf, frozen, bracket,
        patterns, tile, tiles_per_program,
    )  # fmt: skip
