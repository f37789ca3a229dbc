"""A small network and its training, for the tests of the pruner."""

import torch
from torch import nn

from issp import attach


def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(6)),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    ).to(**kwargs)


def step(model, opt, seed, zero=True):
    """One training step on data that the seed alone decides."""
    rng = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    x = torch.randn(4, 3, 6, 6, generator=rng).to(p)
    y = torch.randn(4, 10, generator=rng).to(p)
    opt.zero_grad()
    (model(x) - y).square().mean().backward()
    opt.step()


def train(model, opt, seeds):
    for seed in seeds:
        step(model, opt, seed)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def adam(model, lr=1e-2):
    return torch.optim.Adam(model.parameters(), lr)


def sgd(params, lr=0.1, **kwargs):
    return torch.optim.SGD(params, lr, **kwargs)


def assert_formats_agree(**options):
    """Weights, masks and flips do not depend on the memory format, nor does a saved state."""
    models = [net(), net().to(memory_format=torch.channels_last)]
    pruners = [attach(m, adam(m), sparsity=0.9, **options) for m in models]
    for number in range(3):
        for model, pruner in zip(models, pruners, strict=True):
            with torch.no_grad():
                source = torch.Generator().manual_seed(number)
                for p in model.parameters():
                    p += torch.randn(p.shape, generator=source) * 0.01
            pruner.step()
        assert same(weights(models[0]), weights(models[1]))
        assert same(*(p.masks() for p in pruners))
        assert pruners[0].flips() == pruners[1].flips()
    assert not models[1][2][0].weight.is_contiguous()
    pruners[0].load_state_dict(pruners[1].state_dict())
    assert same(pruners[0].masks(), pruners[1].masks())
