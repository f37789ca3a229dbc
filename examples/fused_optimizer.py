"""Update and prune in one pass over the weights: `issp.optim` in place of `torch.optim`.

`python examples/fused_optimizer.py` trains a small network twice from the same weights: with Adam
of torch, where the pruner works in a hook after the step, and with that of issp; then it compares
the masks.
"""

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import issp


def train(optimizer_class: Callable[..., torch.optim.Optimizer], steps: int) -> dict[str, Tensor]:
    """The pruner's masks (True = kept) after `steps` steps of ISS-P at 90 %."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 3, 3, padding=1))
    target = nn.Conv2d(3, 3, 5, padding=2).requires_grad_(False)
    optimizer = optimizer_class(model.parameters(), lr=1e-3)
    pruner = issp.attach(model, optimizer, sparsity=0.9)
    for _ in range(steps):
        x = torch.randn(4, 3, 16, 16)
        loss = F.mse_loss(model(x), target(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if isinstance(optimizer, issp.optim.Adam):
        print(*optimizer.report, sep="\n")  # how each parameter group was stepped, and why
        torch.optim.Adam(model.parameters()).load_state_dict(optimizer.state_dict())  # torch's form
    pruner.finalize()
    return pruner.masks()


def main(argv: Sequence[str] | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    steps = parser.parse_args(argv).steps
    in_hook, fused = train(torch.optim.Adam, steps), train(issp.optim.Adam, steps)
    for name, mask in fused.items():
        differ = int((mask != in_hook[name]).sum())
        print(f"layer {name}: {int(mask.sum())} of {mask.numel()} kept, {differ} mask bits differ")
    return in_hook, fused


if __name__ == "__main__":
    main()
