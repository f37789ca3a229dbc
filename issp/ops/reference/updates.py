"""The reference of the optimizer ops: the rules of Adam and SGD for one tensor, and the ops.

The same rules, in the same order, stand in csrc/update.h and triton_kernels/updates.py. Every
operation is rounded to float32 once, in the order of torch's fused CPU kernels, whose bits these
are. Values are float64 tensors that hold float32 values: there the rounding is exact in every
floating-point mode, denormals included.
Source: Kingma and Ba, "Adam", algorithm 1; Loshchilov and Hutter, "Decoupled Weight Decay
Regularization", algorithm 2; torch.optim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from issp.ops import validation
from issp.ops.reference.pruning import apply_masks_, soft_shrink_

TINY = 2.0**-126  # the smallest normal float32; the denormals are multiples of 2**-149


def widen(x: Tensor) -> Tensor:
    """The float64 value of float32 or bfloat16, exact also where denormals are flushed."""
    x = x.float()
    steps = (x.view(torch.int32) & 0x7FFFFFFF).double() * 2.0**-149
    return torch.where(steps < TINY, torch.copysign(steps, x), x.double())


def narrow(x: Tensor) -> Tensor:
    """The float32 tensor of values that float32 can hold."""
    steps = (x.abs() * 2.0**149).clamp(max=2.0**23).int()
    denormal = (steps | (torch.signbit(x).int() << 31)).view(torch.float32)
    return torch.where(x.abs() < TINY, denormal, x.float())


def rounded(x: Tensor | float) -> Tensor:
    """x rounded to the nearest float32, ties to even, as float64.

    Sums, products, quotients and roots of float32 values may be rounded to float64 before: that has
    more than twice the digits, so rounding twice gives the same result as rounding once.
    """
    x = torch.as_tensor(x, dtype=torch.float64)
    denormal = torch.copysign(torch.round(x.abs() * 2.0**149) * 2.0**-149, x)
    return torch.where(x.abs() < TINY, denormal, x.float().double())


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a * b + c with one rounding.

    float64 holds the product; the sum is rounded to odd (Boldo and Melquiond), from which rounding
    to float32 is exact.
    """
    product = a * b
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    bits = total.view(torch.int64)
    inexact = (error != 0) & (bits & 1 == 0) & total.isfinite()
    towards = torch.where((error > 0) == (total > 0), 1, -1)
    return rounded(torch.where(inexact, (bits + towards).view(torch.float64), total))


def flushed(x: Tensor) -> Tensor:
    """Below the smallest normal float32: a zero of x's sign. Denormal moments stop a CPU."""
    return torch.where(x.abs() < TINY, torch.copysign(torch.zeros_like(x), x), x)


def power(base: float, n: int) -> float:
    """base**n by squaring, lowest bit of n first: the libraries' pow differ in the last bit."""
    result = 1.0
    while n:
        if n & 1:
            result *= base
        base *= base
        n >>= 1
    return result


def gradient(grad: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """The gradient as the rules see it: widened, unscaled, its sign turned to maximize."""
    g = widen(grad)
    if grad_scale is not None:
        g = rounded(g / widen(grad_scale))
    return -g if maximize else g


def adam_updated(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    t: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    decoupled: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """New weight, first and second moment; t counts this update, 1 for the first."""
    if weight_decay:
        if decoupled:
            w = rounded(w * rounded(1 - lr * weight_decay))
        else:
            g = fma(w, rounded(weight_decay), g)
    rest, ahead = rounded(1 - beta1), rounded(g - m)
    # torch's lerp starts from the end that is nearer
    m = fma(ahead, rest, m) if rest < 0.5 else fma(ahead, rounded(rest - 1), g)
    v = fma(rounded(g * rounded(1 - beta2)), g, rounded(v * rounded(beta2)))
    m, v = flushed(m), flushed(v)
    bias1, bias2 = 1 - power(beta1, t), 1 - power(beta2, t)
    denominator = rounded(rounded(rounded(v.sqrt()) / rounded(math.sqrt(bias2))) + rounded(eps))
    step_size = rounded(lr / bias1 if bias1 else float("inf") * lr)
    return rounded(w - rounded(rounded(step_size * m) / denominator)), m, v


def sgd_updated(
    w: Tensor,
    g: Tensor,
    buffer: Tensor | None,
    first: bool,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
) -> tuple[Tensor, Tensor | None]:
    """New weight and momentum buffer; a first step does not read the buffer."""
    if weight_decay:
        g = fma(w, rounded(weight_decay), g)
    if buffer is not None:
        damped = rounded(1 - dampening)
        buffer = g if first else fma(g, damped, rounded(buffer * rounded(momentum)))
        buffer = flushed(buffer)
        g = fma(buffer, rounded(momentum), g) if nesterov else buffer
    return fma(g, rounded(-lr), w), buffer


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
    """See `adam_soft_shrink_` in issp/ops/schemas/pruning.py."""
    validation.check_adam_soft_shrink(
        weights=weights,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=exp_avg_sqs,
        steps=steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        decoupled=decoupled,
        maximize=maximize,
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
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    for w, grad, m, v, step in zip(weights, grads, exp_avgs, exp_avg_sqs, steps, strict=True):
        step += 1
        updated = adam_updated(
            w=widen(w),
            g=gradient(grad, grad_scale, maximize),
            m=widen(m),
            v=widen(v),
            t=max(0, int(step.item())),
            lr=rate,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            decoupled=decoupled,
        )
        _store((w, m, v), updated)
    _prune_after_update(
        weights,
        [exp_avgs, exp_avg_sqs],
        k=k,
        shrink=shrink,
        thresholds=thresholds,
        masks=masks,
        flips=flips,
        scratch=scratch,
        frozen=frozen,
        patterns=patterns,
    )


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
    """See `sgd_soft_shrink_` in issp/ops/schemas/pruning.py."""
    validation.check_sgd_soft_shrink(
        weights=weights,
        grads=grads,
        momentum_buffers=momentum_buffers,
        first=first,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
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
    if found_inf is not None and found_inf.item() != 0:
        return
    rate = lr if lr_tensor is None else lr_tensor.item()
    for i, (w, grad) in enumerate(zip(weights, grads, strict=True)):
        weight, buffer = sgd_updated(
            w=widen(w),
            g=gradient(grad, grad_scale, maximize),
            buffer=widen(momentum_buffers[i]) if momentum else None,
            first=bool(momentum) and first[i],
            lr=rate,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
        )
        _store([w], [weight])
        if buffer is not None:
            _store([momentum_buffers[i]], [buffer])
    _prune_after_update(
        weights,
        [momentum_buffers] if momentum else [],
        k=k,
        shrink=shrink,
        thresholds=thresholds,
        masks=masks,
        flips=flips,
        scratch=scratch,
        frozen=frozen,
        patterns=patterns,
    )


def _store(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(narrow(value))


def _prune_after_update(
    weights: list[Tensor],
    moments: list[list[Tensor]],
    *,
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    frozen: bool,
    patterns: Sequence[int],
) -> None:
    """Prunes the first weights, as many as k has entries; frozen: applies their masks instead."""
    count = k.numel()
    if not count:
        return
    if frozen:
        for tensors in (weights, *moments):
            apply_masks_(tensors[:count], masks)
        flips.zero_()
    else:
        soft_shrink_(
            weights[:count],
            k=k,
            shrink=shrink,
            thresholds=thresholds,
            masks=masks,
            flips=flips,
            scratch=scratch,
            patterns=patterns,
        )
