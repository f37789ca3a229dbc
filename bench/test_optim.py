"""The fused optimizers and torch's under pytest-benchmark: pytest bench --benchmark-only -k optim.

The same variants, copies of the network and gradients as `issp bench optim`.
"""

import pytest
import torch

from bench import optim, optim_parity
from bench.harness.training import FAMILIES, settled
from issp.sr import models

SETTINGS = optim.Settings()
SETTLE = 60


@pytest.fixture(scope="module", params=["swinir-light", "edsr-l"])
def network(request):
    """One model."""
    torch.manual_seed(0)
    return models.build(request.param, 4)


@pytest.fixture(scope="module", params=FAMILIES)
def start(request, network):
    """A settled trainee and its gradients, after the fused op was found equal to the reference."""
    optim_parity.check([request.param], "cpu", SETTINGS.sparsity, SETTINGS.shrink)
    family = FAMILIES[request.param]
    trainee, gradients = settled(network, family, SETTINGS.sparsity, SETTINGS.shrink, SETTLE)
    return trainee, gradients, [mask.float() for mask in trainee.pruner.masks().values()]


@pytest.mark.parametrize(
    "variant", optim.VARIANTS, ids=lambda variant: variant.name.replace("{} ", "")
)
def bench_optim(benchmark, start, variant):
    trainee, gradients, masks = start
    mine = optim.make_trainee(variant, trainee, gradients, SETTINGS)
    task = optim.make_task(variant, mine, gradients, masks)
    numel = sum(p.numel() for p in mine.parameters())
    pruned = 0 if variant.stage == "update" else sum(p.numel() for p in mine.prunable())
    benchmark.extra_info["bytes"] = trainee.family.traffic(numel, pruned)
    benchmark.group = f"{trainee.family.name}, {numel} weights"
    benchmark.pedantic(task.call, setup=lambda: task.prepare() and None, rounds=10)
