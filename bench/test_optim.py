"""The fused optimizers and torch's under pytest-benchmark: pytest bench --benchmark-only -k optim.

The same variants, copies of the network and gradients as `python -m bench optim`.
"""

import pytest
import torch

from bench import optim, optim_parity
from bench.harness.training import OPTIMIZERS, steady_replica
from issp.sr import models

SETTINGS = optim.Settings()
WARM_UP_STEPS = 60


@pytest.fixture(scope="module", params=["swinir-light", "edsr-l"])
def network(request):
    """One model."""
    torch.manual_seed(0)
    return models.build(request.param, 4)


@pytest.fixture(scope="module", params=OPTIMIZERS)
def start(request, network):
    """A steady replica and its gradients, after the fused op was found equal to the reference."""
    optim_parity.check([request.param], "cpu", SETTINGS.sparsity, SETTINGS.shrink)
    spec = OPTIMIZERS[request.param]
    replica, gradients = steady_replica(
        network, spec, SETTINGS.sparsity, SETTINGS.shrink, WARM_UP_STEPS
    )
    return replica, gradients, [mask.float() for mask in replica.pruner.masks().values()]


@pytest.mark.parametrize(
    "variant", optim.VARIANTS, ids=lambda variant: variant.name.replace("{} ", "")
)
def bench_optim(benchmark, start, variant):
    first, gradients, masks = start
    replica = optim.make_replica(variant, first, gradients, SETTINGS)
    task = optim.make_task(variant, replica, gradients, masks)
    numel = sum(p.numel() for p in replica.parameters())
    pruned = 0 if variant.stage == "update" else sum(p.numel() for p in replica.prunable())
    benchmark.extra_info["bytes"] = replica.spec.traffic(numel, pruned)
    benchmark.group = f"{replica.spec.name}, {numel} weights"
    benchmark.pedantic(task.call, setup=lambda: task.prepare() and None, rounds=10)
