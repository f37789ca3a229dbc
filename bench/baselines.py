"""The rows of the step's table: our ops, lower bounds of their traffic, other selections."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bench import cub
from bench.harness.workload import Workload
from issp import ops


@dataclass(frozen=True)
class Operation:
    """One row of the table.

    Attributes:
        name: as printed.
        traffic: bytes that any implementation must move, from (weights, bytes per weight).
        counted: the same in words.
        make: from a workload, the call that is timed.
        prepare: from a workload, what happens before each call, not timed.
        ours: an error in it is an error; an error in a baseline becomes a note.
        per_layer: works on one tensor after the other, so the largest sets its peak memory.
        capturable: a CUDA graph can hold it.
        missing: why it cannot be timed here ("not installed"), or None.
    """

    name: str
    traffic: Callable[[int, int], float]
    counted: str
    make: Callable[[Workload], Callable[[], object]]
    prepare: Callable[[Workload], object]
    ours: bool = False
    per_layer: bool = False
    capturable: bool = True
    missing: Callable[[], str | None] = lambda: None


def _step(bracket: bool):
    return lambda workload: lambda: workload.step(bracket)


def _threshold(workload: Workload):
    return lambda: ops.magnitude_threshold(workload.weights, workload.k)


def _foreach_mul(workload: Workload):
    # By 1 and on the very weights of the step: how fast memory is depends on where it lies, and
    # separate allocations were measured up to 1.3 times as slow as one buffer of the same size.
    return lambda: torch._foreach_mul_(workload.weights, 1.0)


def _flat_mul(workload: Workload):
    return lambda: workload.flat.mul_(workload.shrink)


def _flat_copy(workload: Workload):
    return lambda: workload.flat.copy_(workload.source)


def _each(workload: Workload, select):
    """`select(|w| flattened, k)` for one weight after the other."""

    def run() -> None:
        for w, k in zip(workload.weights, workload.k, strict=True):
            if k:
                select(w.abs().flatten(), k)

    return run


def _topk(workload: Workload):
    return _each(workload, lambda x, k: x.topk(k, largest=False, sorted=False))


def _kthvalue(workload: Workload):
    return _each(workload, lambda x, k: x.kthvalue(k))


def _sort(workload: Workload):
    return _each(workload, lambda x, k: x.sort(stable=True))


def quantile(x: torch.Tensor, k: int) -> torch.Tensor:
    """The k-th smallest element by torch.quantile, which refuses more than 2^24 elements."""
    return x.quantile((k - 1) / max(1, x.numel() - 1), interpolation="nearest")


def _quantile(workload: Workload):
    return _each(workload, quantile)


def _cub(workload: Workload):
    return _each(workload, cub.smallest)


def _flashinfer_missing() -> str | None:
    return None if importlib.util.find_spec("flashinfer") else "not installed"


def _flashinfer(workload: Workload):
    def select(x: torch.Tensor, k: int) -> torch.Tensor:
        from flashinfer.sampling import top_k_mask_logits

        return top_k_mask_logits(x.view(1, -1), x.numel() - k)

    return _each(workload, select)


def authors_step(flat: Sequence[torch.Tensor], k: Sequence[int], shrink: float) -> None:
    """As in the authors' code: all scores sorted on the CPU, indices to a list, then multiplied.

    Args:
        flat: one-dimensional views of the weights.
        k: how many of each to shrink.
        shrink: the factor.
    """
    for w, count in zip(flat, k, strict=True):
        scores = w.abs().cpu()
        if scores.dtype == torch.bfloat16:
            scores = scores.float()  # numpy has no bfloat16
        pruned = np.argsort(scores.numpy())[:count].tolist()
        w[pruned] *= shrink


def _authors(workload: Workload):
    flat = [w.view(-1) for w in workload.copies]
    return lambda: authors_step(flat, workload.k, workload.shrink)


def _read_write(numel: int, size: int) -> float:
    return 2.0 * numel * size


def _read(numel: int, size: int) -> float:
    return 1.0 * numel * size


def _read_write_mask(numel: int, size: int) -> float:
    return 2.0 * numel * size + numel / 8


# Only the fused step perturbs the weights: without a step in between it would be no training.
_COPY = {"traffic": _read_write, "counted": "read w, write w", "prepare": Workload.restore}
_SELECT = {"traffic": _read, "counted": "read w", "prepare": Workload.restore}
_FUSED = {
    "traffic": _read_write_mask,
    "counted": "read w, write w, read the mask",
    "prepare": Workload.perturb,
    "ours": True,
}

STEP = "issp step"
BASE = "torch._foreach_mul_"
FLAT = "flat mul_"
COLD = "issp step, cold start"
TOPK = "torch.topk"
AUTHORS = "authors' numpy argsort"
OPERATIONS = (
    Operation(STEP, make=_step(True), **_FUSED),
    Operation(COLD, make=_step(False), **_FUSED),
    Operation("issp magnitude_threshold", make=_threshold, ours=True, **_SELECT),
    Operation(BASE, make=_foreach_mul, **(_COPY | {"prepare": Workload.warm_cache})),
    Operation(FLAT, make=_flat_mul, **_COPY),
    Operation("flat copy_", make=_flat_copy, **_COPY),
    Operation(TOPK, make=_topk, per_layer=True, **_SELECT),
    Operation("torch.kthvalue", make=_kthvalue, per_layer=True, **_SELECT),
    Operation("torch.sort(stable)", make=_sort, per_layer=True, **_SELECT),
    Operation("torch.quantile", make=_quantile, per_layer=True, **_SELECT),
    Operation(AUTHORS, make=_authors, per_layer=True, capturable=False, **_COPY),
)
GPU_OPERATIONS = (
    Operation(
        "FlashInfer top_k_mask_logits",
        make=_flashinfer,
        per_layer=True,
        missing=_flashinfer_missing,
        **_SELECT,
    ),
    Operation("CUB DeviceTopK", make=_cub, per_layer=True, missing=cub.missing, **_SELECT),
)


def operations(device: str) -> tuple[Operation, ...]:
    """The rows on a device ("cpu", "cuda")."""
    return OPERATIONS + GPU_OPERATIONS if device == "cuda" else OPERATIONS
