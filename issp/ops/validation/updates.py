"""Argument checks of the optimizer ops, see `issp.ops.validation.pruning`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from issp.ops.schemas import mask_layout, scratch_words
from issp.ops.validation.pruning import (
    DTYPES,
    check_matching,
    check_no_overlap,
    check_patterns_divide,
    check_ranks,
    check_shrink_factor,
    check_tensor_list,
    check_vector,
)


def check_adam_soft_shrink(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
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
    """The checks of `adam_soft_shrink_`; `decoupled`, `maximize` and `bracket` need none."""
    for beta, name in ((beta1, "beta1"), (beta2, "beta2")):
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"{name} is {beta}: it must lie in 0..1, 1 excluded")
    _check_not_negative(eps, "eps")
    _check_update(
        weights=weights,
        grads=grads,
        moments={"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs},
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        lr_tensor=lr_tensor,
        grad_scale=grad_scale,
        k=k,
        shrink=shrink,
        thresholds=thresholds,
        masks=masks,
        flips=flips,
        scratch=scratch,
        found_inf=found_inf,
        frozen=frozen,
        patterns=patterns,
    )


def check_sgd_soft_shrink(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    first: Sequence[bool],
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
    """The checks of `sgd_soft_shrink_`; `maximize` and `bracket` need none."""
    _check_not_negative(momentum, "momentum")
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
    _check_update(
        weights=weights,
        grads=grads,
        moments={"momentum_buffers": momentum_buffers} if momentum else {},
        steps=None,
        lr=lr,
        weight_decay=weight_decay,
        lr_tensor=lr_tensor,
        grad_scale=grad_scale,
        k=k,
        shrink=shrink,
        thresholds=thresholds,
        masks=masks,
        flips=flips,
        scratch=scratch,
        found_inf=found_inf,
        frozen=frozen,
        patterns=patterns,
    )


def _check_not_negative(value: float, name: str) -> None:
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{name} is {value}: it must be 0 or a positive number")


def _check_update(
    *,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    moments: Mapping[str, Sequence[Tensor]],
    steps: Sequence[Tensor] | None,
    lr: float,
    weight_decay: float,
    lr_tensor: Tensor | None,
    grad_scale: Tensor | None,
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None,
    frozen: bool,
    patterns: Sequence[int],
) -> None:
    """The checks that the optimizer ops share."""
    _check_not_negative(lr, "lr")
    _check_not_negative(weight_decay, "weight_decay")
    check_shrink_factor(shrink)
    check_tensor_list(weights, "weights")
    device = weights[0].device
    if weights[0].dtype != torch.float32:
        raise TypeError(f"weights have dtype {weights[0].dtype}: the optimizer ops take float32")
    check_matching(weights, grads, "grads", (torch.float32, torch.bfloat16))
    for name, values in moments.items():
        check_matching(weights, values, name, (torch.float32,))
    if steps is not None:
        check_matching(weights, steps, "steps", (torch.float32,), numel=1)
    optional = {"lr_tensor": lr_tensor, "grad_scale": grad_scale, "found_inf": found_inf}
    scalars = {name: x for name, x in optional.items() if x is not None}
    for name, x in scalars.items():
        if name == "lr_tensor" and x.dtype not in DTYPES:
            raise TypeError(f"lr_tensor has dtype {x.dtype}: use a float dtype")
        dtype = x.dtype if name == "lr_tensor" else torch.float32
        check_vector(x.view(-1), name, dtype, 1, device)
    count = k.numel()
    if count > len(weights):
        raise ValueError(f"k has {count} entries but there are {len(weights)} weights")
    numels = [w.numel() for w in weights[:count]]
    check_vector(k, "k", torch.int64, count, device)
    check_vector(thresholds, "thresholds", torch.float32, count, device)
    check_vector(masks, "masks", torch.int32, mask_layout(numels)[1], device)
    check_vector(flips, "flips", torch.int64, count, device)
    check_vector(scratch, "scratch", torch.int32, scratch_words(numels), device)
    check_patterns_divide(weights[:count], patterns)
    if device.type == "cpu" and not frozen:
        check_ranks(k.tolist(), numels, "weights", patterns)
    lists = {"weights": weights, **moments, "steps": steps or ()}
    written = [(x, f"{n}[{i}]") for n, values in lists.items() for i, x in enumerate(values)]
    written += [(thresholds, "thresholds"), (masks, "masks"), (flips, "flips")]
    written.append((scratch, "scratch"))
    read = [(x, f"grads[{i}]") for i, x in enumerate(grads)]
    read += [(k, "k"), *((x, name) for name, x in scalars.items())]
    check_no_overlap(written, read)
