"""Two trainings side by side: torch's fused optimizer with the pruner's hook, and issp.optim's."""

from __future__ import annotations

import torch
from torch import nn

import issp
from tests.asserts import assert_bitwise_equal

# Every tensor has a multiple of 64 elements: torch's kernels round their scalar tails differently.
WIDTH = 64

KINDS = {
    "adam": ("Adam", {"lr": 1e-2}),
    "adam, decay": ("Adam", {"lr": 1e-2, "weight_decay": 0.05, "betas": (0.8, 0.9)}),
    "adam, low beta1": ("Adam", {"lr": 1e-3, "betas": (0.3, 0.99), "maximize": True}),
    "adamw": ("AdamW", {"lr": 5e-3, "eps": 1e-6}),
    "sgd": ("SGD", {"lr": 1e-2}),
    "sgd, momentum": ("SGD", {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.01}),
    "sgd, nesterov": ("SGD", {"lr": 1e-3, "momentum": 0.9, "nesterov": True}),
    "sgd, dampening": ("SGD", {"lr": 1e-3, "momentum": 0.9, "dampening": 0.3}),
}


def network():
    """Convolutions and a linear layer to prune, biases and a norm that are not."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1, bias=False),
        nn.Flatten(2),
        nn.Linear(16, WIDTH),
        nn.LayerNorm(WIDTH),
    )


def backward(model, number, scale=1.0):
    """Gradients of the step called `number`, the same for equal weights."""
    source = torch.Generator().manual_seed(1000 + number)
    x = torch.randn(2, 64, 4, 4, generator=source)
    target = torch.randn(2, 64, WIDTH, generator=source)
    model.zero_grad()
    ((model(x) - target).square().mean() * scale).backward()


class Twin:
    """A model, its optimizer and its pruner."""

    def __init__(self, kind, ours, model=None, groups=None, options=None, **pruning):
        name, defaults = KINDS[kind]
        options = defaults | (options or {})
        self.model = network() if model is None else model()
        params = self.model.parameters() if groups is None else groups(self.model)
        if ours:
            self.opt = getattr(issp.optim, name)(params, **options)
        else:
            self.opt = getattr(torch.optim, name)(params, fused=True, **options)
        pruning = {"sparsity": 0.9} | pruning
        self.pruner = issp.attach(self.model, self.opt, **pruning)

    def step(self, number):
        backward(self.model, number)
        self.opt.step()

    def tensors(self):
        tensors = {f"parameter {n}": p.detach() for n, p in self.model.named_parameters()}
        for i, state in enumerate(self.opt.state_dict()["state"].values()):
            tensors |= {f"state {i} {key}": x for key, x in state.items() if x is not None}
        tensors |= {f"mask of {n}": m for n, m in self.pruner.masks().items()}
        flips, thresholds = self.pruner.flips(), self.pruner.thresholds()
        tensors["flips"] = torch.tensor(list(flips.values()))
        tensors["thresholds"] = torch.tensor(list(thresholds.values()))
        return tensors


def twins(kind, **kwargs):
    """The torch one and ours."""
    return Twin(kind, False, **kwargs), Twin(kind, True, **kwargs)


def assert_twins(torchs, ours, when):
    expected, actual = torchs.tensors(), ours.tensors()
    assert expected.keys() == actual.keys(), when
    for name, x in actual.items():
        assert_bitwise_equal(x, expected[name], f"{name} {when}")
    assert torchs.pruner.step_count == ours.pruner.step_count, when
    assert str(torchs.pruner.summary()) == str(ours.pruner.summary()), when


def together(torchs, ours, steps, begin=0):
    for number in range(begin, begin + steps):
        torchs.step(number)
        ours.step(number)
        assert_twins(torchs, ours, f"after step {number}")
