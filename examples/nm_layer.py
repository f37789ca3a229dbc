"""A convolution with an N:M pattern: trained with a moving mask, then computed sparsely.

`python examples/nm_layer.py` lets a layer find the 2:8 pattern of another one from random weights:
in each group of 8 input channels 2 weights are kept. v=4 lets four output rows share their
positions, which multiplies faster.
"""

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

import issp


def main(argv: Sequence[str] | None = None) -> tuple[nn.Module, list[float]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=100)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    keep = issp.Keep(2, of=8, v=4)
    teacher = nn.Conv2d(16, 16, 3, padding=1).requires_grad_(False)
    teacher.weight.copy_(issp.ops.nm_prune(teacher.weight, keep))

    # mask="sr-ste": the dense weight is the parameter, each forward keeps its largest magnitudes.
    layer = issp.nn.NMConv2d(16, 16, 3, padding=1, keep=keep, mask="sr-ste")
    optimizer = torch.optim.Adam(layer.parameters(), lr=3e-3)
    losses = []
    for _ in range(args.steps):
        x = torch.randn(8, 16, 8, 8)
        loss = F.mse_loss(layer(x), teacher(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    # mask="fixed" stores the kept values alone; they can be trained further.
    dense = layer.to_dense()  # nn.Conv2d with zeros
    fixed = issp.nn.NMConv2d.from_dense(dense, keep)
    print(fixed)
    x = torch.randn(1, 16, 32, 32)
    difference = (fixed(x) - dense(x)).abs().max().item()
    print(f"sparsity {fixed.sparsity:.2%}, largest difference to the dense layer {difference:.1e}")
    return fixed, losses


if __name__ == "__main__":
    main()
