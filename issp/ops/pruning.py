"""Public functions over `torch.ops.issp`: the pruning step, its state, and the auxiliary ops."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from issp.ops import backends, reference, validation
from issp.ops.keep import Keep, Unit
from issp.ops.schemas import mask_layout, mask_words, scratch_words


def num_pruned(n: int, ratio: float) -> int:
    """min(ceil(ratio * n), int(0.995 * n)): how many of n weights a ratio selects.

    Args:
        n: number of weights of the layer.
        ratio: sparsity in 0..1.

    Raises:
        ValueError: ratio outside 0..1.

    Source: the authors' pick_pruned_layer; the cap keeps a layer from dying out.
    """
    if not 0.0 <= ratio <= 1.0:
        raise ValueError(f"sparsity is {ratio}: it must lie in 0..1")
    return min(math.ceil(ratio * n), int(0.995 * n))


class ShrinkState:
    """The state of the pruning step between calls; allocated once, for one device and dtype.

    Args:
        weights: the tensors that every later call will get, in this order: one device, one dtype
            (float32, float16, bfloat16, float64), contiguous, none empty, none overlapping.
        k: how many of the smallest magnitudes to select, one int in 0..n per tensor.
        patterns: None, or one entry per tensor: None for an unstructured one, `Keep` for N:M,
            `Unit` for units of several weights. The k of an N:M tensor is 0 or
            `keep.pruned(numel)`, that of a tensor of units a multiple of `unit.size`.

    Raises:
        ValueError: wrong number of entries, an impossible k, a pattern that does not divide its
            weight.

    Attributes:
        k: int64 [T], on the weights' device; change it with `set_k`.
        thresholds: [T] in the weights' dtype; magnitude of the last selected weight of the latest
            step; NaN before the first.
        flips: int64 [T]; mask bits that the latest step changed (before the first, all is kept).
        packed: int32; the packed masks, see `issp.ops.schemas.mask_layout`.
        scratch: int32; working memory, at most half a byte per weight.
        patterns: the ints that the ops take; empty when all tensors are unstructured.
    """

    def __init__(
        self,
        weights: Sequence[Tensor],
        k: Sequence[int],
        patterns: Sequence[Keep | Unit | None] | None = None,
    ) -> None:
        weights = list(weights)
        validation.check_tensor_list(weights, "weights")
        self.shapes = [w.shape for w in weights]
        self.numels = [w.numel() for w in weights]
        self.patterns = _numbers(patterns)
        validation.check_patterns_divide(weights, self.patterns)
        first = weights[0]
        if first.is_cuda and any(isinstance(one, Unit) for one in patterns or ()):
            backends.share_units()
        self.k = torch.empty(len(weights), dtype=torch.int64, device=first.device)
        self.set_k(k)
        self.thresholds = torch.full_like(self.k, float("nan"), dtype=first.dtype)
        self.flips = torch.zeros_like(self.k)
        self.packed = _all_kept(self.numels).to(first.device)
        self.scratch = torch.zeros(
            scratch_words(self.numels), dtype=torch.int32, device=first.device
        )

    def set_k(self, k: Sequence[int]) -> None:
        """Changes the counts, in place (a captured CUDA graph sees the new ones).

        Raises:
            ValueError: wrong number of entries, one outside 0..n, or one that its pattern excludes.
        """
        validation.check_ranks(k, self.numels, "weights", self.patterns)
        self.k.copy_(torch.tensor(k, dtype=torch.int64, device="cpu"))

    def masks(self) -> list[Tensor]:
        """The current masks as bool tensors in the weights' shapes, True = kept."""
        starts, _ = mask_layout(self.numels)
        return [
            reference.unpack(self.packed[start : start + mask_words(n)], n).view(shape)
            for start, n, shape in zip(starts, self.numels, self.shapes, strict=True)
        ]

    def set_masks(self, masks: Sequence[Tensor]) -> None:
        """Replaces the masks.

        Args:
            masks: bool tensors in the weights' shapes, True = kept.

        Raises:
            ValueError: a mask whose shape or dtype does not fit.
        """
        if [(m.shape, m.dtype) for m in masks] != [(s, torch.bool) for s in self.shapes]:
            raise ValueError("masks must be bool tensors in the weights' shapes, one per weight")
        packed = [reference.pack(m.flatten().to(self.k.device)) for m in masks]
        self.packed.copy_(torch.cat(packed))

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of k, thresholds, flips and packed masks: all that a bit-exact resume needs."""
        return {name: getattr(self, name).clone() for name in _SAVED}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Restores what `state_dict` gave.

        Raises:
            ValueError: a tensor is missing, or its shape or dtype belongs to other weights.
        """
        for name in _SAVED:
            expected, actual = getattr(self, name), saved.get(name)
            if actual is None or actual.shape != expected.shape or actual.dtype != expected.dtype:
                raise ValueError(f"the saved state's {name} does not belong to these weights")
        validation.check_ranks(saved["k"].tolist(), self.numels, "weights", self.patterns)
        for name in _SAVED:
            getattr(self, name).copy_(saved[name])


def _numbers(patterns: Sequence[Keep | Unit | None] | None) -> list[int]:
    if patterns is None or not any(patterns):
        return []
    return [x for one in patterns for x in (one.numbers() if one else (0, 0, 0, 0))]


def _all_kept(numels: Sequence[int]) -> Tensor:
    """Packed masks that keep everything, without a byte per weight in between."""
    starts, total = mask_layout(numels)
    packed = torch.zeros(total, dtype=torch.int32, device="cpu")
    for start, numel in zip(starts, numels, strict=True):
        full, rest = divmod(numel, 32)
        packed[start : start + full] = -1
        if rest:
            packed[start + full] = (1 << rest) - 1
    return packed


_SAVED = ("k", "thresholds", "flips", "packed")


def _checked(op: str) -> Callable:
    return validation.raise_python_error(validation.PRUNING_OPS[op], getattr(torch.ops.issp, op))


_soft_shrink = _checked("soft_shrink_")
_threshold = _checked("magnitude_threshold")
_apply_masks = _checked("apply_masks_")
_regularize = _checked("regularize_")
_statistics = _checked("magnitude_statistics")
_zeros = _checked("count_zeros")
_nm_prune = _checked("nm_prune")
# For `issp.optim`, which knows when a weight's version has to be counted up; the arguments are
# those of the op schemas.
adam_soft_shrink_ = _checked("adam_soft_shrink_")
sgd_soft_shrink_ = _checked("sgd_soft_shrink_")


def _numels(tensors: Sequence[Tensor], name: str) -> list[int]:
    if not all(isinstance(x, Tensor) for x in tensors):
        validation.check_tensor_list(tensors, name, same_dtype=False)
    return [x.numel() for x in tensors]


@torch.no_grad()
def soft_shrink_(
    weights: list[Tensor],
    state: ShrinkState,
    shrink: float = 0.95,
    found_inf: Tensor | None = None,
    bracket: bool = True,
) -> None:
    """One ISS-P step in place: the k smallest magnitudes of each tensor are multiplied by `shrink`.

    Of an N:M tensor (`state.patterns`) it is the smallest of every group, of a tensor of units the
    weights of the units of the smallest L1 norm. Selection is exact (ties: lowest flat index first)
    and the result bitwise the same on every back end. Updates `state`: thresholds, masks, flips.

    Args:
        weights: the tensors `state` was built for.
        state: see `ShrinkState`.
        shrink: factor alpha in 0..1; 0 is hard thresholding (IHT).
        found_inf: float32 tensor of one element; when it is not 0 nothing is modified. Read on the
            device, without waiting for it.
        bracket: search around the previous threshold first. Never changes the result.

    Raises:
        TypeError, ValueError: see `issp.ops.validation`; nothing has been modified.

    Source: ISS-P, figure 1 and section 2.
    """
    _soft_shrink(
        weights,
        state.k,
        shrink,
        state.thresholds,
        state.packed,
        state.flips,
        state.scratch,
        found_inf,
        bracket,
        state.patterns,
    )
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(weights)


@torch.no_grad()
def magnitude_threshold(weights: list[Tensor], k: Sequence[int]) -> Tensor:
    """The exact k-th smallest magnitude of each tensor.

    Args:
        weights: T tensors of one device and dtype.
        k: one int in 0..n per tensor; 0 gives the threshold 0.

    Returns:
        [T] in the weights' dtype.
    """
    return _threshold(weights, list(k))


@torch.no_grad()
def apply_masks_(tensors: list[Tensor], state: ShrinkState) -> None:
    """Writes +0 where the state's mask says pruned: for weights, moments, moving averages.

    Args:
        tensors: one per weight of `state`, same number of elements each; or several such lists one
            behind the other (weights + moments + averages), for which one call reads the masks
            once. Any supported dtypes.
        state: whose masks to apply.

    Raises:
        TypeError, ValueError: see `issp.ops.validation`; nothing has been modified.
    """
    sets = max(1, len(tensors) // len(state.numels))
    if _numels(tensors, "tensors") != state.numels * sets:
        raise ValueError("tensors must have the sizes of the state's weights, in the same order")
    write_zeros_(tensors, state)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors[len(state.numels) :])


@torch.no_grad()
def write_zeros_(tensors: list[Tensor], state: ShrinkState) -> None:
    """`apply_masks_` for every step: of tensors whose sizes have been compared before.

    It counts up the versions of the first list alone: autograd sees weights, not moments.
    """
    _apply_masks(tensors, state.packed, len(tensors) // len(state.numels))
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors[: len(state.numels)])


@torch.no_grad()
def regularize_(
    grads: list[Tensor], weights: list[Tensor], factors: Tensor, state: ShrinkState
) -> None:
    """Adds an L2 penalty to the gradients of the unimportant weights: g += factor * w, in place.

    Important weights keep their gradients bit for bit.

    Args:
        grads: one per weight of `state`, of its weight's dtype and number of elements.
        weights: the tensors `state` was built for.
        factors: [T] float32 (float64 for float64 weights), on the weights' device: lambda of each
            tensor.
        state: whose masks say which weights are unimportant.

    Raises:
        TypeError, ValueError: see `issp.ops.validation`; nothing has been modified.

    Source: ISS-R, the regularisation variant of ISS-P; the authors add lambda * w to the gradient.
    """
    if _numels(weights, "weights") != state.numels:
        raise ValueError("weights must be those of the state, in the same order")
    _regularize(grads, weights, factors, state.packed)
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(grads)


@torch.no_grad()
def magnitude_statistics(tensors: list[Tensor]) -> Tensor:
    """What the authors record of gradients, per tensor, from one read of it.

    Args:
        tensors: T contiguous tensors of one device and dtype.

    Returns:
        float64 [T, 4]: ||x||_2, Var(|x|), mean(|x|), std(|x|). The variance is that of the
        absolute values, unbiased (NaN for a single element). Accumulated in float64, the same bits
        in every run.

    Raises:
        TypeError, ValueError: see `issp.ops.validation`.

    Source: the authors' gradient record: norm, variance, mean and deviation per pruned layer.
    """
    return _statistics(tensors)


@torch.no_grad()
def count_zeros(tensors: list[Tensor]) -> Tensor:
    """How many elements of each tensor are exactly zero, of either sign.

    Args:
        tensors: T contiguous tensors of one device; any supported dtypes.

    Returns:
        int64 [T].

    Raises:
        TypeError, ValueError: see `issp.ops.validation`.
    """
    return _zeros(tensors)


@torch.no_grad()
def nm_prune(weight: Tensor, keep: Keep, shrink: float = 0.0) -> Tensor:
    """The weight with all but the `keep.n` largest of every `keep.of` multiplied by `shrink`.

    Args:
        weight: [O, I, ...], contiguous.
        keep: the pattern; it must divide the weight.
        shrink: 0 (the default) writes zeros.

    Returns:
        A new tensor of the weight's shape and dtype.

    Raises:
        ValueError: the pattern does not divide the weight's shape.
    """
    return nm_prune_with_mask(weight, keep, shrink)[0]


@torch.no_grad()
def nm_prune_with_mask(weight: Tensor, keep: Keep, shrink: float = 0.0) -> tuple[Tensor, Tensor]:
    """As `nm_prune`; returns also the bool mask in the weight's shape, True = kept."""
    pruned, packed = _nm_prune(weight, keep.n, keep.of, keep.v, keep.layout, shrink, keep.c)
    return pruned, reference.unpack(packed, weight.numel()).view(weight.shape)
