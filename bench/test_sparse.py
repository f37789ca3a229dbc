"""Sparse layers under pytest-benchmark: pytest bench --benchmark-only -k sparse.

The same layers, weights and calls as `python -m bench conv` and `matmul`.
"""

import math

import pytest
import torch

from bench.sparse import calls, forms
from bench.sparse.calls import LayerTensors
from bench.sparse.layers import Layer
from bench.sparse.parity import check
from bench.sparse.targets import LAYERS

SPARSITIES = (0.9, 0.95, 0.99)
TIMED = (*LAYERS, Layer((180, 60), (1, 64 * 64, 60)), Layer((60, 120), (1, 64 * 64, 120)))


@pytest.fixture(scope="module", params=TIMED, ids=lambda layer: layer.name.replace("->", "-to-"))
def data(request):
    """A layer's tensors."""
    return LayerTensors.of(request.param, "cpu")


@pytest.fixture(scope="module", params=sorted({1, torch.get_num_threads()}), ids="threads{}".format)
def threads(request):
    """With one thread and with all."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def measured(benchmark, data, threads, pass_, call, flops):
    """Runs one call under pytest-benchmark."""
    benchmark.group = f"{data.layer.name}, {pass_}, {threads} threads"
    benchmark.extra_info["flops"] = flops * (3 if pass_ == "step" else 1)
    call()
    benchmark.pedantic(call, rounds=10)


@pytest.mark.parametrize("pass_", calls.PASSES)
@pytest.mark.parametrize("index", range(6))
def bench_sparse_layers_dense(benchmark, data, threads, pass_, index):
    variants = calls.dense_variants(data.layer, "cpu")
    if index >= len(variants):
        pytest.skip(f"{data.layer.name} has {len(variants)} dense variants")
    call = calls.dense_call(data, variants[index], pass_)
    benchmark.name = f"dense {variants[index].name}"
    flops = 2 * math.prod(data.layer.weight) * data.layer.applications
    measured(benchmark, data, threads, pass_, call, flops)


@pytest.mark.parametrize("pass_", calls.PASSES)
@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("form", forms.forms("cpu"), ids=lambda form: form.name)
def bench_sparse_layers(benchmark, data, threads, form, sparsity, pass_):
    sparse = forms.make(data.weight, form, sparsity)
    check(data, sparse, form)
    call = calls.sparse_call(data, sparse, pass_)
    benchmark.name = f"issp {form.name}, {sparse.label}"
    measured(benchmark, data, threads, pass_, call, 2 * sparse.weights * data.layer.applications)
