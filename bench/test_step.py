"""The fused step and its baselines under pytest-benchmark: pytest bench --benchmark-only -k swinir.

The same operations, workload and preparation as `python -m bench step`; pytest-benchmark adds
its statistics, its files (--benchmark-autosave) and comparisons between two revisions
(--benchmark-compare).
"""

import pytest

from bench import baselines, step
from bench.harness.workload import Workload
from issp.sr import shapes

SETTINGS = step.Settings(whole=False)
WARM_UP_STEPS = 100
SLOW = {"torch.sort(stable)": 2, "authors' numpy argsort": 1, "torch.topk": 3, "torch.kthvalue": 3}


@pytest.fixture(scope="module", params=["swinir-light", "edsr-l", "cat-r"])
def workload(request):
    """One model in its steady state, after the step was found equal to the reference."""
    model_shapes = shapes.prunable_shapes(request.param)
    step.check_parity(model_shapes, SETTINGS)
    workload = Workload(model_shapes, SETTINGS.sparsity)
    workload.warm_up(WARM_UP_STEPS)
    return workload


@pytest.mark.parametrize("op", baselines.OPERATIONS, ids=lambda op: op.name)
def bench_step(benchmark, workload, op):
    benchmark.extra_info["bytes"] = op.traffic(workload.numel, workload.flat.element_size())
    benchmark.group = f"step, {workload.numel} weights"
    benchmark.pedantic(
        op.make(workload), setup=lambda: op.prepare(workload) and None, rounds=SLOW.get(op.name, 10)
    )
