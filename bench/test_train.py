"""Whole training iterations under pytest-benchmark: pytest bench --benchmark-only -k train.

The same variants as `python -m bench train`, but one after the other: a slow minute of the machine
hits one of them alone. Use it to compare two revisions; ratios come from `python -m bench train`.
"""

import pytest
import torch

from bench import optim_parity, train
from issp.sr import models

SETTINGS = train.Settings(sparsity=0.95, shrink=0.95, device="cpu", batch=1, patch=24, settle=10)
ROUNDS = {train.AUTHORS: 2}


@pytest.fixture(scope="module", params=["edsr-baseline", "swinir-light"])
def variants(request):
    """Name of the model, its data, and name -> variant."""
    optim_parity.check(["adam"], "cpu", SETTINGS.sparsity, SETTINGS.shrink)
    torch.manual_seed(0)
    network = models.build(request.param, 4).to(memory_format=torch.channels_last)
    data = train.Data(4, "cpu")
    variants = train.make_variants(network, data, SETTINGS)
    return request.param, data, {variant.name: variant for variant in variants}


@pytest.mark.parametrize("name", [train.DENSE, train.AFTER, train.FUSED, train.AUTHORS])
def bench_train(benchmark, variants, name):
    model, data, named = variants
    batch = data.batch(SETTINGS.batch, SETTINGS.patch)
    watch = train.Stopwatch("cpu")
    benchmark.group = f"training {model}"
    benchmark.pedantic(
        lambda: train.iterate(named[name], *batch, watch),
        rounds=ROUNDS.get(name, 10),
        warmup_rounds=1,
    )
