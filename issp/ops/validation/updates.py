"""Argument checks of the optimizer ops: one clear sentence, before anything is written.

csrc/checks_update.h makes the same checks at native speed.
"""

from __future__ import annotations

import math

import torch

from issp.ops.schemas import mask_layout, scratch_words
from issp.ops.validation.pruning import (
    DTYPES,
    beside,
    divisible,
    ranks,
    separate_from,
    shrink_factor,
    tensors,
    vector,
)


def adam_soft_shrink(
    weights,
    grads,
    exp_avgs,
    exp_avg_sqs,
    steps,
    lr,
    beta1,
    beta2,
    eps,
    weight_decay,
    decoupled,
    maximize,
    lr_tensor,
    grad_scale,
    *state,
):
    """Checks of `adam_soft_shrink_`; `state` begins with k and goes on as the schema does."""
    for beta, name in ((beta1, "beta1"), (beta2, "beta2")):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} is {beta}: it must lie in 0..1, 1 excluded")
    _not_negative(eps, "eps")
    moments = {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    _update(weights, grads, moments, steps, lr, weight_decay, lr_tensor, grad_scale, *state)


def sgd_soft_shrink(
    weights,
    grads,
    momentum_buffers,
    first,
    lr,
    momentum,
    dampening,
    weight_decay,
    nesterov,
    maximize,
    lr_tensor,
    grad_scale,
    *state,
):
    """Checks of `sgd_soft_shrink_`; `state` begins with k and goes on as the schema does."""
    _not_negative(momentum, "momentum")
    if not math.isfinite(dampening):
        raise ValueError(f"dampening is {dampening}: it must be finite")
    if nesterov and not momentum:
        raise ValueError("nesterov needs a momentum above 0")
    if len(first) != len(momentum_buffers):
        raise ValueError(
            f"first has {len(first)} entries for {len(momentum_buffers)} momentum buffers"
        )
    if not momentum and momentum_buffers:
        raise ValueError("momentum is 0: momentum_buffers and first must be empty lists")
    moments = {"momentum_buffers": momentum_buffers} if momentum else {}
    _update(weights, grads, moments, None, lr, weight_decay, lr_tensor, grad_scale, *state)


def _not_negative(value: float, name: str) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: it must be 0 or a positive number")


def _update(
    weights,
    grads,
    moments,
    steps,
    lr,
    weight_decay,
    lr_tensor,
    grad_scale,
    k,
    shrink,
    thresholds,
    masks,
    flips,
    scratch,
    found_inf=None,
    frozen=False,
    bracket=True,
    patterns=(),
):
    """Checks that the optimizer ops share; `bracket` needs none."""
    _not_negative(lr, "lr")
    _not_negative(weight_decay, "weight_decay")
    shrink_factor(shrink)
    tensors(weights, "weights")
    device = weights[0].device
    if weights[0].dtype != torch.float32:
        raise TypeError(f"weights have dtype {weights[0].dtype}: the optimizer ops take float32")
    beside(weights, grads, "grads", (torch.float32, torch.bfloat16))
    for name, values in moments.items():
        beside(weights, values, name, (torch.float32,))
    if steps is not None:
        beside(weights, steps, "steps", (torch.float32,), numel=1)
    for x, name in ((lr_tensor, "lr_tensor"), (grad_scale, "grad_scale"), (found_inf, "found_inf")):
        if x is not None:
            if name == "lr_tensor" and x.dtype not in DTYPES:
                raise TypeError(f"lr_tensor has dtype {x.dtype}: use a float dtype")
            vector(x.view(-1), name, x.dtype if name == "lr_tensor" else torch.float32, 1, device)
    count = k.numel()
    if count > len(weights):
        raise ValueError(f"k has {count} entries but there are {len(weights)} weights")
    numels = [w.numel() for w in weights[:count]]
    vector(k, "k", torch.int64, count, device)
    vector(thresholds, "thresholds", torch.float32, count, device)
    vector(masks, "masks", torch.int32, mask_layout(numels)[1], device)
    vector(flips, "flips", torch.int64, count, device)
    vector(scratch, "scratch", torch.int32, scratch_words(numels), device)
    divisible(weights[:count], patterns)
    if device.type == "cpu" and not frozen:
        ranks(k.tolist(), numels, "weights", patterns)
    lists = {"weights": weights, **moments, "steps": steps or ()}
    written = [(x, f"{n}[{i}]") for n, values in lists.items() for i, x in enumerate(values)]
    written += [(thresholds, "thresholds"), (masks, "masks"), (flips, "flips")]
    written.append((scratch, "scratch"))
    scalars = ((k, "k"), (lr_tensor, "lr_tensor"), (grad_scale, "grad_scale"))
    read = [(x, f"grads[{i}]") for i, x in enumerate(grads)]
    read += [(x, name) for x, name in (*scalars, (found_inf, "found_inf")) if x is not None]
    separate_from(written, read)
