"""Small networks and loops with which the methods are tried."""

import torch
from torch import nn


class Residual(nn.Module):
    """Two residual blocks and a head: conv2 of both blocks and `after` precede additions."""

    def __init__(self, features=8):
        super().__init__()
        self.head = nn.Conv2d(3, features, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"conv1": conv(features, features), "conv2": conv(features, features)})
            for _ in range(2)
        )
        self.after = conv(features, features)
        self.tail = conv(features, 3)

    def forward(self, x):
        x = first = self.head(x)
        for block in self.blocks:
            x = x + block["conv2"](torch.relu(block["conv1"](x)))
        return self.tail(first + self.after(x))


def conv(inputs, outputs):
    return nn.Conv2d(inputs, outputs, 3, padding=1)


CONSTRAINED = ["blocks.0.conv2", "blocks.1.conv2", "after"]


def network(seed=0):
    torch.manual_seed(seed)
    return Residual()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.rand(2, 3, 6, 6, generator=generator)


def train(model, optimizer, steps, pruner=None, first=0):
    """Steps `first`, ... of a regression onto the input's mean."""
    for step in range(first, first + steps):
        x = batch(step)
        loss = (model(x) - x.mean(1, keepdim=True)).square().mean()
        if pruner is not None and pruner.method.has_loss:
            loss = loss + pruner.loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def weights(model):
    return {n: m.weight for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
