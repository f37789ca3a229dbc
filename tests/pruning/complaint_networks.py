"""A small network, its training and what must not change, for the tests of complaints."""

import torch
from torch import nn


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.Linear(12, 4),
    )


def gradients(model, seed):
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 2, 4, 4, generator=rng), torch.randn(4, 4, generator=rng)
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model, opt, seeds):
    for seed in seeds:
        gradients(model, seed)
        opt.step()


def adam(model, **kwargs):
    return torch.optim.Adam(model.parameters(), 1e-2, **kwargs)


def bits(tensors):
    """A copy that compares NaN and signed zeros too."""
    return {n: t.detach().clone().view(torch.int32) for n, t in tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def snapshot(model, pruner):
    return (
        bits(model.state_dict()),
        pruner.masks(),
        {n: str(x) for n, x in pruner.thresholds().items()},
        pruner.flips(),
        pruner.step_count,
    )


def unchanged(a, b):
    return equal(a[0], b[0]) and equal(a[1], b[1]) and a[2:] == b[2:]
