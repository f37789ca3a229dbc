"""The op schemas: the pruning step, the optimizer updates and the auxiliary ops.

Each op of `torch.ops.issp` stands here with its exact semantics and its fake.

Common to all ops
    dtypes      float32, float16, bfloat16, float64; contiguous; a call's tensors on one device.
    key(w)      the bits of w without the sign, as an integer: the order of magnitudes. +0 == -0,
                denormals are ordered, NaN is larger than infinity. Ties: lowest flat index first.
    packed mask int32 words; bit j of word i is 1 when element 32*i + j is KEPT. Each tensor starts
                at the word given by `mask_layout`; bits behind its last element are 0.
    errors      everything is checked first; on any error nothing has been modified.
The rules (key, tie, shrink) stand in issp/ops/reference/pruning.py, csrc/semantics.h and
triton_kernels/semantics.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LINE_WORDS = 16  # a tensor's mask starts on its own 64-byte line: no false sharing between threads
SCRATCH_HEADER = 64

library = torch.library.Library("issp", "DEF")

# Per tensor t: select the k[t] smallest keys; w = shrunk(w) where selected, see
# `issp.ops.reference.shrunk`; masks = not selected; flips[t] = mask bits that differ from the
# previous mask; thresholds[t] = |w| of the last selected element before the shrink (0 when
# k[t] == 0). thresholds on entry are those of the previous call (NaN: none); with bracket=True they
# may speed the search, never change its result. found_inf: float32 [1]; when not 0, nothing is
# modified.
# k: int64 [T] in 0..n, checked on the CPU; on a GPU, where a check would wait for the device,
# a tensor whose k is out of range is left unmodified. scratch: int32 [scratch_words(numels)],
# zero before its first use, private to the back end; scratch[0] counts searches the bracket missed.
# patterns: empty, or (n, m, v, c) of every tensor one behind the other.
#   m == 0, v == 0: single weights, as above.
#   m == 0, v > 0: units of v rows x c channels of its shape [O, I, ...], as in nm_prune. A unit's
#     key is its score there, k[t] is a multiple of v * c, and the k[t] / (v * c) units of the
#     smallest keys are selected, ties: the lowest unit in the order [O / v, I / c, ...] first.
#     v = c = 1 are single weights.
#   m > 0: N:M over its shape [O, I, ...], as in nm_prune with layout "channels", or with layout
#     "flat" where v == 0: k[t] is 0 (nothing is selected) or numel / m * (m - n) (the m - n
#     smallest of every group are; any other k[t] is out of range).
# With units and N:M thresholds[t] is the largest |w| (by key) among the selected before the shrink;
# shrunk weights, masks and flips are as above.
library.define(
    "soft_shrink_(Tensor(a!)[] weights, Tensor k, float shrink, Tensor(b!) thresholds, "
    "Tensor(c!) masks, Tensor(d!) flips, Tensor(e!) scratch, Tensor? found_inf=None, "
    "bool bracket=True, int[] patterns=[]) -> ()"
)
# [T] in the weights' dtype: the exact k[t]-th smallest |w| (0 when k[t] == 0).
library.define("magnitude_threshold(Tensor[] weights, int[] k) -> Tensor")
# One parameter group's update, then soft_shrink_ on its first T = k.numel() weights: T may be 0
# (then k, thresholds, masks and flips are empty, scratch is SCRATCH_HEADER words), the rest is
# updated only. weights and moments: float32. grads: float32 or bfloat16, widened, never modified.
# steps: float32, one element per weight; each becomes t = step + 1. lr_tensor: one element of a
# float dtype on the weights' device, replaces lr. grad_scale: float32, one element.
# found_inf not 0: nothing is modified, steps included. fma and every other operation round to
# float32 once; scalars are computed in float64 and rounded to float32 once; b^t by squaring,
# lowest bit of t first. These are the bits of torch's fused CPU kernels (but for their tails).
#     g = widen(grad); grad_scale: g = g / scale; maximize: g = -g
#     weight_decay != 0: coupled: g = fma(w, wd, g); decoupled: w = w * (1 - lr * wd)
#     c = 1 - beta1;  m = fma(g - m, c, m) if c < 0.5 else fma(g - m, c - 1, g)   [c - 1 in float32]
#     v = fma(g * (1 - beta2), g, v * beta2);   m, v below 2^-126: a zero of their sign
#     w = w - (lr / (1 - beta1^t) * m) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
# frozen: no selection; where the mask bit is 0, weight and moments become +0, flips become 0, masks
# and thresholds stay, k is not used. On a GPU a tensor whose k is out of range is updated only.
# patterns: those of the T pruned weights, as in soft_shrink_.
library.define(
    "adam_soft_shrink_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] steps, float lr, float beta1, float beta2, float eps, "
    "float weight_decay, bool decoupled, bool maximize, Tensor? lr_tensor, Tensor? grad_scale, "
    "Tensor k, float shrink, Tensor(e!) thresholds, Tensor(f!) masks, Tensor(g!) flips, "
    "Tensor(h!) scratch, Tensor? found_inf=None, bool frozen=False, bool bracket=True, "
    "int[] patterns=[]) -> ()"
)
# As adam_soft_shrink_. momentum == 0: momentum_buffers and first are empty; otherwise first[i] says
# that buffer i holds nothing yet (it is not read).
#     g as above; weight_decay != 0: g = fma(w, wd, g)
#     momentum != 0: buf = g if first else fma(g, 1 - dampening, buf * momentum);
#                    buf below 2^-126: a zero of its sign;
#                    g = fma(buf, momentum, g) if nesterov else buf
#     w = fma(g, -lr, w)
library.define(
    "sgd_soft_shrink_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
    "bool[] first, float lr, float momentum, float dampening, float weight_decay, bool nesterov, "
    "bool maximize, Tensor? lr_tensor, Tensor? grad_scale, Tensor k, float shrink, "
    "Tensor(e!) thresholds, Tensor(f!) masks, Tensor(g!) flips, Tensor(h!) scratch, "
    "Tensor? found_inf=None, bool frozen=False, bool bracket=True, int[] patterns=[]) -> ()"
)
# Writes +0 wherever the packed mask has a 0 bit. tensors: `sets` lists of T one behind the other
# (weights, moments, moving average); tensor i takes mask i % T. dtypes may differ from tensor to
# tensor.
library.define("apply_masks_(Tensor(a!)[] tensors, Tensor masks, int sets=1) -> ()")
# ISS-R: grads[t] += factors[t] * weights[t] where the mask has a 0 bit; see
# `issp.ops.reference.regularized`. factors: [T] float32 (float64 for float64 weights). Elsewhere
# gradients keep their bits. Each gradient has its weight's dtype.
library.define(
    "regularize_(Tensor(a!)[] grads, Tensor[] weights, Tensor factors, Tensor masks) -> ()"
)
# float64 [T, 4], per tensor: ||x||_2, Var(|x|) (unbiased; NaN for one element), mean(|x|),
# std(|x|). One read, sums in float64 without cancellation; the same bits in every run and for any
# number of threads; back ends agree to 1e-12 of each value. NaN and infinity propagate as in torch.
library.define("magnitude_statistics(Tensor[] tensors) -> Tensor")
# int64 [T]: exact zeros of either sign (denormals are none). dtypes may differ.
library.define("count_zeros(Tensor[] tensors) -> Tensor")
# Keeps the n largest of every m (pruning the m - n smallest keys), returns the tensor with the
# pruned elements replaced by shrunk(w), and the packed mask. layout "channels": weight [O, I, ...],
# groups of m consecutive input channels at a fixed kernel position, in units of v consecutive
# output rows x c consecutive channels, which are selected together; c divides n and m. A unit's
# score is its summed |w|, in float32 (float64 for float64): the rows of each channel are added in
# order, then the channels' sums in order; scores are compared as keys, and a NaN sum ranks largest.
# With v = c = 1 the score is the key. layout "flat" (v = c = 1): groups of m consecutive elements
# in memory order.
library.define(
    "nm_prune(Tensor weight, int n, int m, int v, str layout, float shrink=0.0, int c=1) "
    "-> (Tensor, Tensor)"
)
# Instruction set of the CPU ops: avx512fp16, avx512, avx2 or scalar; `want` chooses a lower one,
# for tests.
library.define('_cpu_capability(str want="") -> str')


def mask_words(numel: int) -> int:
    """Words of one tensor's packed mask, padding included."""
    return -(-numel // (32 * LINE_WORDS)) * LINE_WORDS


def mask_layout(numels: Sequence[int]) -> tuple[list[int], int]:
    """First word of every tensor in the packed-mask buffer, and the buffer's length in words."""
    starts, total = [], 0
    for numel in numels:
        starts.append(total)
        total += mask_words(numel)
    return starts, total


def scratch_words(numels: Sequence[int]) -> int:
    """Length of the scratch buffer: 0.4 bytes per weight and a line or two per tensor."""
    return SCRATCH_HEADER + sum(map(scratch_region, numels))


def scratch_region(numel: int) -> int:
    """Words of scratch that belong to one tensor."""
    return (numel // 10 // LINE_WORDS + 2) * LINE_WORDS


def one_device(*arguments: Any) -> None:
    # A tensor without data (device "meta") among others sends the whole call to the fake.
    lists = [x if isinstance(x, (list, tuple)) else [x] for x in arguments]
    if len({x.device for values in lists for x in values if isinstance(x, Tensor)}) > 1:
        raise RuntimeError("the tensors are on several devices: group by device")


@torch.library.register_fake("issp::soft_shrink_", lib=library)
@torch.library.register_fake("issp::adam_soft_shrink_", lib=library)
@torch.library.register_fake("issp::sgd_soft_shrink_", lib=library)
@torch.library.register_fake("issp::apply_masks_", lib=library)
@torch.library.register_fake("issp::regularize_", lib=library)
def _(*arguments: Any) -> None:
    one_device(*arguments)


@torch.library.register_fake("issp::magnitude_threshold", lib=library)
def _(weights: list[Tensor], k: list[int]) -> Tensor:
    one_device(weights)
    return weights[0].new_empty(len(weights))


@torch.library.register_fake("issp::magnitude_statistics", lib=library)
def _(tensors: list[Tensor]) -> Tensor:
    one_device(tensors)
    return tensors[0].new_empty((len(tensors), 4), dtype=torch.float64)


@torch.library.register_fake("issp::count_zeros", lib=library)
def _(tensors: list[Tensor]) -> Tensor:
    one_device(tensors)
    return tensors[0].new_empty(len(tensors), dtype=torch.int64)


@torch.library.register_fake("issp::nm_prune", lib=library)
def _(
    weight: Tensor, n: int, m: int, v: int, layout: str, shrink: float = 0.0, c: int = 1
) -> tuple[Tensor, Tensor]:
    words = mask_words(weight.numel())
    return torch.empty_like(weight), weight.new_empty(words, dtype=torch.int32)
