"""Argument checks of the optimizer ops, see `issp.ops.validation.pruning`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from issp.ops.arguments import AdamArgs, PruneArgs, SGDArgs, split_update
from issp.ops.schemas import mask_layout, scratch_words
from issp.ops.validation.pruning import (
    DTYPES,
    check_matching,
    check_no_overlap,
    check_patterns_divide,
    check_ranks,
    check_scalar,
    check_shrink_factor,
    check_tensor_list,
    check_vector,
    check_words,
    numbered,
)


def check_adam_soft_shrink(*args: Any) -> None:
    """The checks of `adam_soft_shrink_`."""
    adam, prune = split_update(AdamArgs, args)
    for beta, name in ((adam.beta1, "beta1"), (adam.beta2, "beta2")):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} is {beta}: it must lie in 0..1, 1 excluded")
    _check_not_negative(adam.eps, "eps")
    moments = {"exp_avgs": adam.exp_avgs, "exp_avg_sqs": adam.exp_avg_sqs}
    _check_update(adam, prune, moments)


def check_sgd_soft_shrink(*args: Any) -> None:
    """The checks of `sgd_soft_shrink_`."""
    sgd, prune = split_update(SGDArgs, args)
    _check_not_negative(sgd.momentum, "momentum")
    if not math.isfinite(sgd.dampening):
        raise ValueError(f"dampening is {sgd.dampening}: it must be finite")
    if sgd.nesterov and not sgd.momentum:
        raise ValueError("nesterov needs a momentum above 0")
    if len(sgd.first) != len(sgd.momentum_buffers):
        raise ValueError(
            f"first has {len(sgd.first)} entries for {len(sgd.momentum_buffers)} momentum buffers"
        )
    if not sgd.momentum and sgd.momentum_buffers:
        raise ValueError("momentum is 0: momentum_buffers and first must be empty lists")
    _check_update(sgd, prune, {"momentum_buffers": sgd.momentum_buffers} if sgd.momentum else {})


def _check_not_negative(value: float, name: str) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: it must be 0 or a positive number")


def _check_update(
    update: AdamArgs | SGDArgs, prune: PruneArgs, moments: Mapping[str, Sequence[Tensor]]
) -> None:
    """The checks that the optimizer ops share; `decoupled`, `maximize` and `bracket` need none."""
    weights = update.weights
    _check_not_negative(update.lr, "lr")
    _check_not_negative(update.weight_decay, "weight_decay")
    check_shrink_factor(prune.shrink)
    check_tensor_list(weights, "weights")
    device = weights[0].device
    if weights[0].dtype != torch.float32:
        raise TypeError(f"weights have dtype {weights[0].dtype}: the optimizer ops take float32")
    check_matching(weights, update.grads, "grads", (torch.float32, torch.bfloat16))
    for name, values in moments.items():
        check_matching(weights, values, name, (torch.float32,))
    steps = update.steps if isinstance(update, AdamArgs) else None
    if steps is not None:
        check_matching(weights, steps, "steps", (torch.float32,), numel=1)
    optional = {
        "lr_tensor": update.lr_tensor,
        "grad_scale": update.grad_scale,
        "found_inf": prune.found_inf,
    }
    scalars = {name: x for name, x in optional.items() if x is not None}
    for name, x in scalars.items():
        if name == "lr_tensor" and x.dtype not in DTYPES:
            raise TypeError(f"lr_tensor has dtype {x.dtype}: use a float dtype")
        dtype = x.dtype if name == "lr_tensor" else torch.float32
        check_scalar(x, name, dtype, device)
    count = prune.k.numel()
    if count > len(weights):
        raise ValueError(f"k has {count} entries but there are {len(weights)} weights")
    numels = [w.numel() for w in weights[:count]]
    check_vector(prune.k, "k", torch.int64, count, device)
    check_vector(prune.thresholds, "thresholds", torch.float32, count, device)
    check_words(prune.masks, "masks", mask_layout(numels)[1], device)
    check_vector(prune.flips, "flips", torch.int64, count, device)
    check_words(prune.scratch, "scratch", scratch_words(numels), device)
    check_patterns_divide(weights[:count], prune.patterns)
    if device.type == "cpu" and not prune.frozen:
        check_ranks(prune.k.tolist(), numels, "weights", prune.patterns)
    lists = {"weights": weights, **moments, "steps": steps or ()}
    written = [pair for name, values in lists.items() for pair in numbered(values, name)]
    written += [(getattr(prune, n), n) for n in ("thresholds", "masks", "flips", "scratch")]
    read = [*numbered(update.grads, "grads"), (prune.k, "k"), *((x, n) for n, x in scalars.items())]
    check_no_overlap(written, read)
