"""Argument checks of the pruning step and of the auxiliary ops.

Each refusal is one sentence with the remedy, before anything is written. Native code checks what
protects memory; `issp.ops` calls these functions for the exact sentence and kind of error when a
native op refuses.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from issp.ops.keep import Keep, Unit
from issp.ops.schemas import mask_layout, mask_words, scratch_words

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_is_tensor(x: object, name: str) -> None:
    """Refuses what is no tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, not {type(x).__name__}")


def check_strided(x: object, name: str) -> None:
    """Refuses what is no tensor, and sparse ones."""
    check_is_tensor(x, name)
    if isinstance(x, Tensor) and x.layout != torch.strided:
        raise ValueError(f"{name} is {x.layout}: pass {name}.to_dense()")


def check_tensor(x: object, name: str) -> None:
    """Refuses what is no tensor of a dtype that the ops take."""
    check_is_tensor(x, name)
    if isinstance(x, Tensor) and x.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {x.dtype}: use float32, float16, bfloat16, float64")


def check_in_memory(x: Tensor, name: str, remedy: str = "", alignment: int = 0) -> None:
    """Refuses a tensor whose elements do not lie one behind the other in memory that is there.

    Args:
        x: the tensor.
        name: of it in the messages.
        remedy: what to do if it is not contiguous; "": `contiguous()` alone.
        alignment: bytes on which it must start; its elements' size if that is more.
    """
    check_strided(x, name)
    if not x.is_contiguous():
        raise ValueError(f"{name} is not contiguous: pass {name}.contiguous(){remedy}")
    if torch.compiler.is_compiling() or not x.numel():
        return
    if x.is_neg() or x._is_zerotensor():
        raise ValueError(f"{name} is a view that torch computes when it is read: pass a copy of it")
    held, needed = x.untyped_storage().nbytes(), x.nbytes + x.storage_offset() * x.element_size()
    if held < needed:
        raise ValueError(
            f"{name} has {held} of its {needed} bytes in memory: call this where it is there (FSDP "
            "frees parameters between their uses)"
        )
    alignment = max(alignment, x.element_size())
    if x.device.type != "meta" and x.data_ptr() % alignment:
        raise ValueError(
            f"{name} does not start on {alignment} bytes: allocate it as a tensor of its own"
        )


def _check_is_list(values: object, name: str) -> None:
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} must be a list of tensors, not {type(values).__name__}")


def check_tensor_list(
    values: Sequence[Tensor], name: str, same_dtype: bool = True, written: bool = True
) -> None:
    """Refuses what is no list of non-empty, contiguous tensors of one device (and dtype).

    Args:
        values: the list.
        name: of the list in the messages.
        same_dtype: all tensors have the dtype of the first.
        written: the tensors are written, so no two of them may overlap in memory.
    """
    _check_is_list(values, name)
    if not values:
        raise ValueError(f"{name} is an empty list: pass at least one tensor")
    first = values[0]
    for i, x in enumerate(values):
        check_tensor(x, f"{name}[{i}]")
        if same_dtype and x.dtype != first.dtype:
            raise TypeError(
                f"{name}[{i}] has dtype {x.dtype} but {name}[0] has {first.dtype}: group by dtype"
            )
        if x.device != first.device:
            raise ValueError(
                f"{name}[{i}] is on {x.device} but {name}[0] is on {first.device}: group by device"
            )
        check_in_memory(x, f"{name}[{i}]", remedy=" and copy back")
        if x.numel() == 0:
            raise ValueError(f"{name}[{i}] is empty: leave it out")
    if written:
        _check_disjoint(numbered(values, name))


def numbered(values: Sequence[Tensor], name: str) -> list[tuple[Tensor, str]]:
    """The tensors of a list with the names that the messages give them."""
    return [(x, f"{name}[{i}]") for i, x in enumerate(values)]


def _check_disjoint(named: Sequence[tuple[Tensor, str]]) -> None:
    if not torch.compiler.is_compiling():
        spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for x, name in named)
        for (_, end, left), (begin, _, right) in zip(spans, spans[1:], strict=False):
            if begin < end:
                raise ValueError(f"{left} and {right} overlap in memory: pass shared weights once")


def check_vector(
    x: Tensor,
    name: str,
    dtype: torch.dtype,
    length: int,
    device: torch.device,
    alignment: int = 0,
) -> None:
    """Refuses what is no contiguous [length] tensor of this dtype on the weights' device."""
    if x.dtype != dtype:
        raise TypeError(f"{name} has dtype {x.dtype}: it must be {dtype}")
    if x.device != device:
        raise ValueError(f"{name} is on {x.device} but the weights are on {device}: move it there")
    if x.dim() != 1 or x.numel() != length or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous with {length} elements, not shape {tuple(x.shape)}: "
            "build it with issp.ops.ShrinkState"
        )
    check_in_memory(x, name, alignment=alignment)


def check_words(x: Tensor, name: str, length: int, device: torch.device) -> None:
    """Refuses masks or scratch memory that do not fit; the kernels read both 8 bytes at a time."""
    check_vector(x, name, torch.int32, length, device, alignment=8)


def check_scalar(x: Tensor, name: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuses what is no single number of this dtype on the weights' device."""
    check_in_memory(x, name)
    check_vector(x.view(-1), name, dtype, 1, device)


def check_shrink_factor(shrink: float) -> None:
    """Refuses an alpha outside 0..1."""
    if not 0.0 <= shrink <= 1.0:
        raise ValueError(f"shrink is {shrink}: it must lie in 0..1 (0 is hard thresholding)")


def check_soft_shrink(
    weights: Sequence[Tensor],
    k: Tensor,
    shrink: float,
    thresholds: Tensor,
    masks: Tensor,
    flips: Tensor,
    scratch: Tensor,
    found_inf: Tensor | None = None,
    bracket: bool = True,
    patterns: Sequence[int] = (),
) -> None:
    """The checks of `soft_shrink_`; `bracket` needs none."""
    check_tensor_list(weights, "weights")
    check_shrink_factor(shrink)
    numels = [w.numel() for w in weights]
    device, count = weights[0].device, len(weights)
    check_vector(k, "k", torch.int64, count, device)
    check_vector(thresholds, "thresholds", weights[0].dtype, count, device)
    check_words(masks, "masks", mask_layout(numels)[1], device)
    check_vector(flips, "flips", torch.int64, count, device)
    check_words(scratch, "scratch", scratch_words(numels), device)
    if found_inf is not None:
        check_scalar(found_inf, "found_inf", torch.float32, device)
    state = {"k": k, "thresholds": thresholds, "masks": masks, "flips": flips, "scratch": scratch}
    state |= {} if found_inf is None else {"found_inf": found_inf}
    _check_disjoint([*numbered(weights, "weights"), *((x, n) for n, x in state.items())])
    check_patterns_divide(weights, patterns)
    if device.type == "cpu":
        check_ranks(k.tolist(), numels, "weights", patterns)


def check_matching(
    weights: Sequence[Tensor],
    values: Sequence[Tensor],
    name: str,
    dtypes: Sequence[torch.dtype],
    numel: int | None = None,
) -> None:
    """Refuses what is no list of one contiguous tensor per weight, on the weight's device.

    Args:
        weights: the weights.
        values: the list that is checked.
        name: of the list in the messages.
        dtypes: those that `values` may have.
        numel: elements of each tensor; None: as many as its weight has.
    """
    _check_is_list(values, name)
    if len(values) != len(weights):
        raise ValueError(f"{name} has {len(values)} entries for {len(weights)} weights")
    for i, (w, x) in enumerate(zip(weights, values, strict=True)):
        check_is_tensor(x, f"{name}[{i}]")
        if x.dtype not in dtypes:
            raise TypeError(f"{name}[{i}] has dtype {x.dtype}: use {' or '.join(map(str, dtypes))}")
        if x.device != w.device:
            raise ValueError(f"{name}[{i}] is on {x.device} but the weight is on {w.device}")
        if x.numel() != (w.numel() if numel is None else numel):
            raise ValueError(
                f"{name}[{i}] has {x.numel()} elements: it needs "
                f"{w.numel() if numel is None else numel}, for weights[{i}]"
            )
        check_in_memory(x, f"{name}[{i}]")


def check_no_overlap(
    written: Sequence[tuple[Tensor, str]], read: Sequence[tuple[Tensor, str]]
) -> None:
    """Refuses a written tensor that overlaps another; tensors that are only read may overlap."""
    _check_disjoint(written)
    if torch.compiler.is_compiling():
        return
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes, name) for x, name in written)
    starts = [begin for begin, _, _ in spans]
    for x, name in read:
        begin, end = x.data_ptr(), x.data_ptr() + x.nbytes
        last = bisect.bisect_left(starts, end) - 1
        if last >= 0 and spans[last][1] > begin:
            raise ValueError(f"{name} and {spans[last][2]} overlap in memory: pass a copy")


def check_ranks(
    k: Sequence[int], numels: Sequence[int], name: str, patterns: Sequence[int] = ()
) -> None:
    """Refuses k unless it is one number in 0..n per tensor.

    That of an N:M tensor must be 0 or all that its pattern prunes, that of a tensor of units a
    multiple of a unit's weights.
    """
    if len(k) != len(numels):
        raise ValueError(f"k has {len(k)} entries for {len(numels)} tensors: give one per tensor")
    for i, (count, numel) in enumerate(zip(k, numels, strict=True)):
        if not 0 <= count <= numel:
            raise ValueError(
                f"k[{i}] is {count} but {name}[{i}] has {numel} elements: use 0..{numel}"
            )
    for i in range(len(patterns) // 4):
        n, m, v, c = patterns[4 * i : 4 * i + 4]
        if v and not m and k[i] % (v * c):
            raise ValueError(
                f"k[{i}] is {k[i]} but {name}[{i}] is pruned in units of {v} x {c} weights: use a "
                f"multiple of {v * c}"
            )
        if m and k[i] not in (0, numels[i] // m * (m - n)):
            raise ValueError(
                f"k[{i}] is {k[i]} but {name}[{i}] keeps {n} of {m}: use 0 or "
                f"{numels[i] // m * (m - n)}"
            )


def check_patterns_divide(weights: Sequence[Tensor], patterns: Sequence[int]) -> None:
    """Refuses the ops' `patterns` where one does not divide its weight."""
    if patterns and len(patterns) != 4 * len(weights):
        raise ValueError(
            f"patterns has {len(patterns)} numbers for {len(weights)} pruned weights: give n, m, "
            "v, c of each, or none"
        )
    for i in range(len(patterns) // 4):
        n, m, v, c = patterns[4 * i : 4 * i + 4]
        if m:
            keep = Keep(n, m, v or 1, "channels" if v else "flat", c=c)
            check_pattern_divides(weights[i], f"weights[{i}]", keep)
        elif v:
            check_pattern_divides(weights[i], f"weights[{i}]", Unit(v, c))


def check_magnitude_threshold(weights: Sequence[Tensor], k: Sequence[int]) -> None:
    """The checks of `magnitude_threshold`."""
    check_tensor_list(weights, "weights", written=False)
    check_ranks(k, [w.numel() for w in weights], "weights")


def check_apply_masks(values: Sequence[Tensor], masks: Tensor, sets: int = 1) -> None:
    """The checks of `apply_masks_`."""
    check_tensor_list(values, "tensors", same_dtype=False)
    if sets < 1 or len(values) % sets:
        raise ValueError(
            f"{len(values)} tensors do not make {sets} sets: give one tensor per weight and set"
        )
    numels = [x.numel() for x in values]
    count = len(values) // sets
    for i, numel in enumerate(numels):
        if numel != numels[i % count]:
            raise ValueError(
                f"tensors[{i}] has {numel} elements but shares the mask of tensors[{i % count}] "
                f"with {numels[i % count]}: give the sets in the order of the weights"
            )
    check_words(masks, "masks", mask_layout(numels[:count])[1], values[0].device)
    _check_disjoint([*numbered(values, "tensors"), (masks, "masks")])


def check_regularize(
    grads: Sequence[Tensor], weights: Sequence[Tensor], factors: Tensor, masks: Tensor
) -> None:
    """The checks of `regularize_`."""
    check_tensor_list(weights, "weights")
    dtype, device = weights[0].dtype, weights[0].device
    check_matching(weights, grads, "grads", (dtype,))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check_is_tensor(factors, "factors")
    if factors.dtype != wide:
        raise TypeError(f"factors has dtype {factors.dtype}: it must be {wide} for {dtype} weights")
    if factors.device != device:
        raise ValueError(f"factors is on {factors.device} but the weights are on {device}")
    if factors.shape != (len(weights),):
        raise ValueError(
            f"factors must be contiguous with {len(weights)} elements, one per weight, not shape "
            f"{tuple(factors.shape)}"
        )
    check_in_memory(factors, "factors")
    check_words(masks, "masks", mask_layout([w.numel() for w in weights])[1], device)
    read = [*numbered(weights, "weights"), (factors, "factors"), (masks, "masks")]
    check_no_overlap(numbered(grads, "grads"), read)


check_magnitude_statistics = partial(check_tensor_list, name="tensors", written=False)
check_count_zeros = partial(check_tensor_list, name="tensors", same_dtype=False, written=False)


def check_nm_prune(
    weight: Tensor, n: int, m: int, v: int, layout: str, shrink: float = 0.0, c: int = 1
) -> None:
    """The checks of `nm_prune`; a dimension that the pattern does not divide is an error."""
    check_tensor_list([weight], "weight")
    check_shrink_factor(shrink)
    check_pattern_divides(weight, "weight", Keep(n, m, v, layout, c=c))


def check_pattern_divides(weight: Tensor, name: str, by: Keep | Unit) -> None:
    """Refuses a weight that does not divide into groups or units or exceeds one mask."""
    by.check_divides(weight.shape, name)
    if mask_words(weight.numel()) >= 2**31:
        raise ValueError(f"{name} of shape {tuple(weight.shape)} is too large for one packed mask")
