"""How a weight is made sparse for a benchmark: unstructured, or N:M with v rows to a pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from issp import ops
from issp.ops.keep import Keep

_CLOSE = 0.02  # a pattern that keeps up to this share more than asked counts as exact
_FARTHEST = 1.0  # one that keeps more than twice as much as asked is not used


@dataclass(frozen=True)
class Form:
    """A kind of sparse weight and the precision of its op.

    Attributes:
        v: output rows that share a pattern.
        nm: N:M along the input channels; otherwise unstructured, by the rows' summed magnitudes.
        precision: "fp32", "tf32" (float32 tensors, multiplied by a GPU's tensor cores), "bf16"
            or "fp16".
    """

    v: int = 1
    nm: bool = True
    precision: str = "fp32"

    @property
    def name(self) -> str:
        """As printed."""
        kind = "N:M" if self.nm else "unstructured"
        if self.nm or self.v > 1:
            kind += f" v={self.v}"
        return kind if self.precision == "fp32" else f"{kind} {self.precision}"


@dataclass(frozen=True)
class SparseWeight:
    """A packed weight.

    Attributes:
        packed: NMTensor or SparseRows.
        dense: the same weight with its zeros, [O, I, ...].
        label: the pattern and what it prunes: "13:128 (89.84 %)".
    """

    packed: Any
    dense: Tensor
    label: str

    @property
    def nbytes(self) -> int:
        """Bytes of it that an op reads."""
        return sum(
            t.nbytes
            for t in (self.packed.values, self.packed.col_indices, self.packed.crow_indices)
        )

    @property
    def weights(self) -> int:
        """How many weights are stored."""
        return self.packed.values.numel()


def forms(
    device: str, rows: list[int] | None = None, precisions: Sequence[str] = ("fp32",)
) -> list[Form]:
    """What is timed by default.

    Args:
        device: "cpu" or "cuda".
        rows: values of v; default 1 and 4, on a GPU also 8, 16 and 32. From 16 on a GPU's tensor
            cores compute, with TF32 and bfloat16.
        precisions: of what is not computed by tensor cores.
    """
    if rows is None:
        rows = [1, 4, 8, 16, 32] if device == "cuda" else [1, 4]
    chosen = [Form(nm=False, precision=p) for p in precisions if 1 in rows]
    for v in rows:
        tensor_cores = device == "cuda" and v >= 16
        chosen += [Form(v, precision=p) for p in (("tf32", "bf16") if tensor_cores else precisions)]
    return chosen


def nm_pattern(channels: int, sparsity: float) -> tuple[int, int] | None:
    """N and M with M a divisor of `channels`: the smallest M that prunes nearly as much as asked.

    Never more than asked, so that a time is not flattered: 90 % of 256 channels is 13:128
    (89.84 %), of 60 channels 1:10. None where the sparsest keeps more than twice as much as asked.
    """
    wanted = round(1 - sparsity, 12)
    candidates = []
    for m in (m for m in range(2, channels + 1) if channels % m == 0):
        n = math.ceil(wanted * m - 1e-9)
        if n < m:
            candidates.append((n / m / wanted - 1, m, n))
    least = min(candidates, default=(math.inf,))[0]
    if least > _FARTHEST:
        return None
    return next((n, m) for excess, m, n in candidates if excess <= max(_CLOSE, least))


def unsupported_reason(form: Form, shape: tuple[int, ...], sparsity: float) -> str | None:
    """Why a weight cannot have that form at that sparsity, or None."""
    if shape[0] % form.v:
        return f"v={form.v} does not divide {shape[0]} outputs"
    if form.nm and nm_pattern(shape[1], sparsity) is None:
        return f"no N:M of {shape[1]} input channels prunes about {100 * sparsity:g} %"
    return None


def make(weight: Tensor, form: Form, sparsity: float) -> SparseWeight:
    """Prunes and packs a weight.

    Args:
        weight: [O, I, ...], dense; is left as it is.
        form: fits it, see `unsupported_reason`.
        sparsity: in 0..1.
    """
    if form.nm:
        keep = Keep(*nm_pattern(weight.shape[1], sparsity), v=form.v)
        pruned = ops.nm_prune(weight, keep)
        return SparseWeight(
            ops.nm_pack(pruned, keep), pruned, f"{keep.n}:{keep.of} ({100 * keep.sparsity:.4g} %)"
        )
    shared = weight.view(-1, form.v, weight[0].numel())
    sums = shared.abs().sum(1, keepdim=True)
    k = ops.num_pruned(sums.numel(), sparsity)
    keep = torch.ones_like(sums)
    if k:
        keep.view(-1)[sums.flatten().topk(k, largest=False).indices] = 0
    pruned = (shared * keep).view(weight.shape)
    label = f"{100 * k / sums.numel():.4g} %"
    return SparseWeight(ops.sparse_pack(pruned, form.v), pruned, label)
