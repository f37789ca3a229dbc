"""`freeze(accelerate=...)` under DistributedDataParallel: new buckets, one choice, equal bits."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import issp
from issp.nn import autotune
from issp.nn.sparse_training import SparseTrainingLayer
from tests.asserts import assert_bitwise_equal
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.pruning.methods.runs import batch, network

pytestmark = needs_gloo

FREEZE, STEPS = 3, 6


def timed_by_rank(dense, sparse, *args, **kwargs):
    """Rank 0 finds every sparse form faster, the others find it slower."""
    for call in [*dense.values(), *sparse.values()]:
        call()
    fast = 1.0 if dist.get_rank() == 0 else 9.0
    samples = {name: [3.0] * 5 for name in dense} | {name: [fast] * 5 for name in sparse}
    return autotune.decide(samples, list(dense))


def build(seed, wrap=lambda model: model):
    model = network(seed)
    trained = wrap(model)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    return model, trained, optimizer, issp.attach(trained, optimizer, sparsity=0.8)


def state_of(model, optimizer):
    moments = optimizer.state_dict()["state"]
    return dict(model.state_dict()), {i: s["exp_avg"] for i, s in moments.items()}


def train_rank(accelerate, folder):
    """The gradients of every step, the sparse layers, and the state in the end."""
    rank = dist.get_rank()
    torch.manual_seed(rank)
    autotune.measure, autotune.Cache.__init__.__defaults__ = timed_by_rank, (f"{folder}/{rank}",)
    model, parallel, optimizer, pruner = build(rank, DistributedDataParallel)
    called = []
    parallel.register_forward_hook(lambda *_: called.append(1))
    recorded = []
    for step in range(STEPS):
        if step == FREEZE:
            pruner.freeze(accelerate=True if accelerate is True else batch(0))
        optimizer.zero_grad()
        x = batch(1000 * rank + step)
        (parallel(x) - x.mean(1, keepdim=True)).square().mean().backward()
        recorded.append({n: p.grad.clone() for n, p in model.named_parameters()})
        optimizer.step()
    sparse = [n for n, m in model.named_modules() if isinstance(m, SparseTrainingLayer)]
    state = state_of(model, optimizer)
    pruner.finalize()
    optimizer.zero_grad()
    parallel(batch(rank)).square().mean().backward()
    last = {n: p.grad.clone() for n, p in model.named_parameters()}
    return recorded, sparse, state, last, len(called)


@pytest.mark.parametrize("accelerate", [True, pytest.param("measured", marks=pytest.mark.full)])
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_ranks_train_sparse_with_the_bits_of_a_single_process(world, accelerate, tmp_path):
    ranks = run_ranks(train_rank, world, accelerate, str(tmp_path))
    recorded, sparse, state, last, _ = ranks[0]
    model, _, optimizer, pruner = build(0)
    for step, grads in enumerate(recorded):
        if step == FREEZE:
            pruner.freeze(accelerate=True)
        for name, p in model.named_parameters():
            p.grad = grads[name].clone()
        optimizer.step()
    names = [n for n, m in model.named_modules() if isinstance(m, SparseTrainingLayer)]
    assert sparse == names and len(names) > 2
    expected = state_of(model, optimizer)
    for rank, (_, layers, actual, gradients, calls) in enumerate(ranks):
        assert layers == names, "rank 0 chooses for all"
        assert calls == STEPS + 1, "hooks of the wrapper stay"
        for part, tensors in zip(actual, expected, strict=True):
            for name, x in tensors.items():
                assert_bitwise_equal(part[name], x, f"rank {rank}: {name}")
        for name, grad in gradients.items():
            assert_bitwise_equal(grad, last[name], f"rank {rank}: gradient of {name}")


def refuse_communication_hook():
    model, parallel, _, pruner = build(0, DistributedDataParallel)
    parallel.register_comm_hook(None, lambda _, bucket: bucket.buffer())
    with pytest.raises(ValueError, match="its communication hook does not follow"):
        pruner.freeze(accelerate=True)
    return pruner.frozen, [type(m).__name__ for m in model.modules()]


def test_a_communication_hook_is_refused_before_anything_changes():
    for frozen, kinds in run_ranks(refuse_communication_hook, 2):
        assert not frozen and not any("Sparse" in kind for kind in kinds)
