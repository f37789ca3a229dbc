"""What a user writes against the public names; `mypy --strict` must accept it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import issp


def train(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """Prunes a model while it trains."""
    optimizer = issp.optim.Adam(model.parameters(), lr=1e-3)
    schedule = issp.Cubic(0.0, 0.9, begin=0, end=100)
    pruner = issp.attach(model, optimizer, sparsity=0.9, schedule=schedule)
    for x, y in batches:
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
    pruner.freeze()
    return pruner.finalize()


def shrink(weights: list[Tensor]) -> Tensor:
    """One step of the functional form."""
    k = [issp.num_pruned(w.numel(), 0.9) for w in weights]
    state = issp.ops.ShrinkState(weights, k)
    issp.ops.soft_shrink_(weights, state, shrink=0.95)
    issp.ops.apply_masks_(weights, state)
    return issp.ops.magnitude_threshold(weights, k)


def sparse(x: Tensor) -> Tensor:
    """Packed weights and sparse layers."""
    keep = issp.Keep(2, of=4)
    weight = issp.ops.nm_prune(torch.randn(8, 8, 3, 3), keep)
    packed = issp.ops.nm_pack(weight, keep)
    rows: issp.ops.SparseRows = issp.ops.sparse_pack(weight, v=2)
    layer = issp.nn.NMConv2d(8, 8, 3, padding=1, keep=keep)
    copied: issp.nn.NMConv2d = issp.nn.NMConv2d.from_dense(nn.Conv2d(8, 8, 3), keep, mask="ste")
    y: Tensor = layer(issp.ops.nm_conv2d(x, packed, stride=1, padding=1))
    z: Tensor = copied(y)
    return z + rows.sparsity * packed.indices.sum()


def deploy(model: nn.Module, x: Tensor) -> nn.Module:
    """Conversion, packing and what the installation can do."""
    dense: dict[str, str] = issp.nn.convert(model, keep=issp.Keep(2, of=4, tail="dense"))
    print(dense, issp.info()["torch"])
    packed: nn.Module = issp.pack(model, example=x)
    return issp.unpack(packed)
