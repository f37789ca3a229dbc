"""What the tests of the frameworks share: a network, its data, and the plain loop to compare."""

from __future__ import annotations

import torch
from torch import nn

import issp

STEPS = 8
ENGINES = ["FSDP", "DEEPSPEED", "MEGATRON_LM", "XLA"]
# Argument sets of `attach`; each finds its masks in the first half of STEPS.
METHODS = {
    "iss-p": {"method": "iss-p"},
    "iht": {"method": "iht"},
    "iss-r": {"method": issp.methods.ISSR(delta=0.1, interval=1)},
    "l1": {"method": "l1"},
    "scratch": {"method": "scratch"},
    "assl": {
        "method": issp.methods.ASSL(
            weight=0.1, align_steps=2, constrained=["body.0", "body.2"], delta=0.1, interval=1
        )
    },
}


# Where a run is resumed: each method in both stages, ASSL before the end of its alignment too.
RESUMED = [(name, step) for name in METHODS for step in (3, 6)] + [("assl", 1)]


def arguments(name):
    return {"sparsity": 0.8, "freeze_at": 5, **METHODS[name]}


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x = self.head(x)
        return self.tail(x + self.body(x))


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)


def samples(count):
    rng = torch.Generator().manual_seed(1)
    x = torch.randn(count, 3, 6, 6, generator=rng)
    return list(zip(x, x.flip(1) * 0.5, strict=True))


def batches(count, size=2):
    data = samples(count * size)
    for i in range(count):
        part = data[i * size : (i + 1) * size]
        yield tuple(torch.stack(x) for x in zip(*part, strict=True))


def train_plainly(name, accumulate=1, steps=STEPS):
    """The weights after a loop without any framework, and the pruner."""
    model = Net()
    optimizer = optimizer_of(model)
    torch.manual_seed(3)
    pruner = issp.attach(model, optimizer, **arguments(name))
    optimizer.zero_grad()
    for i, (x, y) in enumerate(batches(steps * accumulate)):
        loss = (model(x) - y).abs().mean()
        if pruner.method.has_loss:
            loss = loss + pruner.loss()
        (loss / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    pruner.finalize()
    return model, pruner


def assert_same(actual, expected):
    """Bits of two models' weights."""
    actual, expected = dict(actual.named_parameters()), dict(expected.named_parameters())
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        assert torch.equal(actual[name], x), name


def assert_sparse(model, pruner):
    for name, kept in pruner.masks().items():
        weight = model.get_submodule(name).weight
        assert int((~kept).sum()) == issp.num_pruned(weight.numel(), 0.8)
        assert torch.equal(weight != 0, kept), name


def pretend(monkeypatch, state, engine):
    """Lets accelerate's state look as it does with an engine that needs other machines."""
    if engine in ("FSDP", "MEGATRON_LM"):
        monkeypatch.setitem(vars(state), f"{engine.lower()}_plugin", object())
    else:
        kinds = type(state.distributed_type)
        monkeypatch.setitem(vars(state), "distributed_type", kinds[engine])
