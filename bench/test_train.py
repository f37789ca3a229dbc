"""Whole training iterations under pytest-benchmark: pytest bench --benchmark-only -k train.

The same ways to train as `issp bench train`, but one after the other: the machine's slow minutes
hit one of them alone. Use it to compare two revisions; ratios come from `issp bench train`.
"""

import pytest
import torch

from bench import optim_parity, train
from issp.sr import models

SETTINGS = train.Settings(0.95, 0.95, "cpu", batch=1, patch=24, settle=10)
ROUNDS = {train.AUTHORS: 2}


@pytest.fixture(scope="module", params=["edsr-baseline", "swinir-light"])
def ways(request):
    """Name of the model, its data, and lane name -> lane."""
    optim_parity.check(["adam"], "cpu", SETTINGS.sparsity, SETTINGS.shrink)
    torch.manual_seed(0)
    network = models.build(request.param, 4).to(memory_format=torch.channels_last)
    data = train.Data(4, "cpu")
    lanes = train.make_lanes(network, data, SETTINGS)
    return request.param, data, {lane.name: lane for lane in lanes}


@pytest.mark.parametrize("name", [train.DENSE, train.AFTER, train.FUSED, train.AUTHORS])
def bench_train(benchmark, ways, name):
    model, data, lanes = ways
    batch = data.batch(SETTINGS.batch, SETTINGS.patch)
    watch = train.Stopwatch("cpu")
    benchmark.group = f"training {model}"
    benchmark.pedantic(
        lambda: train.iterate(lanes[name], *batch, watch),
        rounds=ROUNDS.get(name, 10),
        warmup_rounds=1,
    )
