"""A small network with layers of every kind, and times from a table, for the tests of packing."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import issp
from issp.nn import autotune


def prune_(model: nn.Module, sparsity: float = 0.9) -> nn.Module:
    """Hard zeros in every Conv2d and Linear."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                k = issp.num_pruned(module.weight.numel(), sparsity)
                if k:
                    flat = module.weight.view(-1)
                    flat[flat.abs().topk(k, largest=False).indices] = 0
    return model


class Net(nn.Module):
    """A convolution of every kind, a linear layer, one layer used twice, and one never used."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.strided = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False)
        self.same = nn.Conv2d(16, 16, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.mirrored = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect")
        self.twice = nn.Linear(16, 16)
        self.unused = nn.Linear(4, 4)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        x = self.mirrored(self.grouped(self.same(self.strided(F.relu(self.head(x))))))
        x = self.norm(x).permute(0, 2, 3, 1)
        return self.twice(F.gelu(self.twice(x)))


EXAMPLE = (2, 3, 12, 10)


@pytest.fixture(name="net")
def net_fixture():
    return prune_(Net())


@pytest.fixture(name="cache")
def cache_fixture(tmp_path):
    return autotune.Cache(tmp_path / "choices.json")


@pytest.fixture(name="timed")
def timed_fixture(monkeypatch):
    """Times come from a table, name -> seconds, not from a clock; the keys that were measured."""
    table = {"dense": 3.0, "dense channels_last": 4.0, "rows": 1.0, "rows v=4": 2.0}
    table |= {"packed": 1.0}
    table["measured"] = []

    def measure(dense, sparse, *args, **kwargs):
        table["measured"].append(tuple([*dense, *sparse]))
        for call in [*dense.values(), *sparse.values()]:
            call()
        samples = {name: [table.get(name, 1.0)] * 5 for name in (*dense, *sparse)}
        return autotune.decide(samples, list(dense))

    monkeypatch.setattr(autotune, "measure", measure)
    return table


def copies(model: nn.Module) -> list[nn.Module]:
    """A deep copy, one that was pickled, and one that was saved whole and loaded."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    return [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded]


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in model.named_children()}


def line(packed: nn.Module, name: str):
    return next(line for line in packed.report.lines if line.name == name)
