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
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from issp.ops.arguments import AdamArgs, PruneArgs, SGDArgs, split_update
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
    x = x.double() if isinstance(x, Tensor) else torch.tensor(x, dtype=torch.float64, device="cpu")
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


def counted(step: float) -> int:
    """t of a step counter: NaN and what is below 1 are 0, the largest float32 below 2**32 is last.

    Counters of float32 stop at 2**24; a damaged one may hold anything.
    """
    return int(min(step, 2.0**32 - 256)) if step > 0 else 0


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


def adam_soft_shrink_(*args: Any) -> None:
    """See `adam_soft_shrink_` in issp/ops/schemas/pruning.py."""
    adam, prune = split_update(AdamArgs, args)
    if prune.found_inf is not None and prune.found_inf.item() != 0:
        return
    lists = (adam.weights, adam.grads, adam.exp_avgs, adam.exp_avg_sqs, adam.steps)
    for tensors in zip(*lists, strict=True):
        # only their sizes need to agree
        w, grad, m, v, step = (x.view(-1) for x in tensors)
        step += 1
        updated = adam_updated(
            w=widen(w),
            g=gradient(grad, adam.grad_scale, adam.maximize),
            m=widen(m),
            v=widen(v),
            t=counted(step.item()),
            lr=adam.lr if adam.lr_tensor is None else adam.lr_tensor.item(),
            beta1=adam.beta1,
            beta2=adam.beta2,
            eps=adam.eps,
            weight_decay=adam.weight_decay,
            decoupled=adam.decoupled,
        )
        _store((w, m, v), updated)
    _prune_after_update(adam.weights, [adam.exp_avgs, adam.exp_avg_sqs], prune)


def sgd_soft_shrink_(*args: Any) -> None:
    """See `sgd_soft_shrink_` in issp/ops/schemas/pruning.py."""
    sgd, prune = split_update(SGDArgs, args)
    if prune.found_inf is not None and prune.found_inf.item() != 0:
        return
    for i, (weight, gradient_of) in enumerate(zip(sgd.weights, sgd.grads, strict=True)):
        w, grad = weight.view(-1), gradient_of.view(-1)
        held = sgd.momentum_buffers[i].view(-1) if sgd.momentum else None
        updated, buffer = sgd_updated(
            w=widen(w),
            g=gradient(grad, sgd.grad_scale, sgd.maximize),
            buffer=None if held is None else widen(held),
            first=bool(sgd.momentum) and sgd.first[i],
            lr=sgd.lr if sgd.lr_tensor is None else sgd.lr_tensor.item(),
            momentum=sgd.momentum,
            dampening=sgd.dampening,
            weight_decay=sgd.weight_decay,
            nesterov=sgd.nesterov,
        )
        _store([w], [updated])
        if held is not None and buffer is not None:
            _store([held], [buffer])
    _prune_after_update(sgd.weights, [sgd.momentum_buffers] if sgd.momentum else [], prune)


def _store(tensors: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(narrow(value))


def _prune_after_update(
    weights: list[Tensor], moments: list[list[Tensor]], prune: PruneArgs
) -> None:
    """Prunes the first weights, as many as k has entries; frozen: applies their masks instead."""
    count = prune.k.numel()
    if not count:
        return
    arguments = prune._asdict()
    if arguments.pop("frozen"):
        for tensors in (weights, *moments):
            apply_masks_(tensors[:count], prune.masks)
        prune.flips.zero_()
    else:
        soft_shrink_(weights[:count], **arguments)
