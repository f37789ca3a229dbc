"""A user's loop under DistributedDataParallel: every rank has the bits of a single process.

Each rank builds other weights, draws other random numbers and sees other images. The gradients that
one of them steps with are recorded, and a single process without DistributedDataParallel steps with
the same ones.
"""

import contextlib
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import issp
from issp import methods
from tests.asserts import assert_bitwise_equal
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.pruning.methods.runs import batch, network

pytestmark = needs_gloo

STEPS, FREEZE, OVERFLOW = 9, 6, 3
METHODS = {
    "iss-p": {"method": "iss-p"},
    "iht": {"method": "iht"},
    "iss-r": {"method": methods.ISSR(delta=0.1, interval=1)},
    "l1": {"method": "l1"},
    "scratch": {"method": "scratch"},
    "srp": {"method": methods.SRP(seed=5, delta=0.1, interval=1)},
    "assl": {"method": methods.ASSL(align_steps=2, weight=0.1)},
    "sls": {"method": methods.SLS(of=8, epoch=3, lr=0.05, weight=1e-4), "sparsity": 0.7},
    "2:4": {"method": "iss-p", "pattern": issp.Keep(2, of=4, tail="dense"), "sparsity": None},
}
OPTIMIZERS = {
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "SGD": lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9),
    "issp.Adam": issp.optim.Adam,
    "issp.AdamW": issp.optim.AdamW,
    "issp.SGD": lambda p, lr: issp.optim.SGD(p, lr, momentum=0.9),
}


@dataclass(frozen=True)
class Case:
    """One training: method, optimizer, and what the user's loop does."""

    method: str = "iss-p"
    optimizer: str = "Adam"
    accumulates: bool = False
    scales: bool = False

    def build(self, seed, draw, wrap=lambda model: model):
        """Model (weights by `seed`), what is trained of it, optimizer and pruner (by `draw`)."""
        model = network(seed)
        trained = wrap(model)
        optimizer = OPTIMIZERS[self.optimizer](trained.parameters(), lr=1e-2)
        torch.manual_seed(draw)
        arguments = {"sparsity": 0.8, "freeze_at": FREEZE, **METHODS[self.method]}
        return model, trained, optimizer, issp.attach(trained, optimizer, **arguments)


def train_rank(case):
    """One rank; the gradients of its steps (None: skipped), and what it ends with."""
    rank = dist.get_rank()
    model, parallel, optimizer, pruner = case.build(rank, 100 + rank, DistributedDataParallel)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**6, enabled=case.scales)
    recorded = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(1 + case.accumulates):
            x = batch(1000 * rank + 10 * step + part)
            is_last = part == case.accumulates
            with contextlib.nullcontext() if is_last else parallel.no_sync():
                loss = (parallel(x) - x.mean(1, keepdim=True)).square().mean()
                if pruner.method.has_loss:
                    loss = loss + pruner.loss()
                if case.scales and step == OVERFLOW and rank == 1:
                    loss = loss * float("inf")
                scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        before = pruner.step_count
        scaler.step(optimizer)
        scaler.update()
        recorded.append(grads if pruner.step_count > before else None)
        issp.check_ranks(pruner)
    return recorded, end(model, optimizer, pruner)


def end(model, optimizer, pruner):
    """All that a rank has at the end: bits, and counts."""
    state = optimizer.state_dict()["state"]
    moments = {f"{i}.{k}": v for i, s in state.items() for k, v in s.items()}
    moments = {k: v for k, v in moments.items() if isinstance(v, torch.Tensor)}
    tensors = {"weight": dict(model.state_dict()), "mask": pruner.masks(), "moment": moments}
    thresholds = {name: str(x) for name, x in pruner.thresholds().items()}  # NaN is not equal
    return tensors, (pruner.step_count, pruner.frozen, pruner.flips(), thresholds)


def replay(case, recorded):
    """A single process that steps with recorded gradients."""
    model, _, optimizer, pruner = case.build(0, 100)
    for grads in recorded:
        if grads is not None:
            for name, p in model.named_parameters():
                p.grad = grads[name].clone()
            pruner.loss()  # part of the recorded gradients
            optimizer.step()
    return end(model, optimizer, pruner)


def assert_same_end(actual, expected, what):
    for kind, tensors in expected[0].items():
        assert actual[0][kind].keys() == tensors.keys(), what
        for name, tensor in tensors.items():
            assert_bitwise_equal(actual[0][kind][name], tensor, f"{what}: {kind} {name}")
    assert actual[1] == expected[1], what


def check(case, world):
    results = run_ranks(train_rank, world, case)
    recorded, first = results[0]
    assert first[1][:2] == (STEPS - case.scales, True)
    for rank, (_, other) in enumerate(results):
        assert_same_end(other, first, f"rank {rank}")
    masks = torch.cat([mask.flatten() for mask in first[0]["mask"].values()])
    assert 0 < int((~masks).sum()) < masks.numel()
    if case.method != "sls":  # its scores learn from gradients of their own
        assert_same_end(replay(case, recorded), first, "single process")
    return recorded


@pytest.mark.parametrize("optimizer", ["Adam", "issp.Adam"])
def test_two_ranks_have_the_bits_of_a_single_process(optimizer):
    check(Case(optimizer=optimizer), 2)


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer(optimizer, world):
    check(Case(optimizer=optimizer), world)


@pytest.mark.full
@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("optimizer", ["Adam", "issp.Adam"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method(method, optimizer, world):
    check(Case(method, optimizer), world)


@pytest.mark.parametrize("optimizer", ["SGD", "issp.AdamW"])
def test_an_overflow_on_one_rank_is_skipped_by_all_and_gradients_accumulate(optimizer):
    recorded = check(Case(optimizer=optimizer, accumulates=True, scales=True), 2)
    assert [step for step, grads in enumerate(recorded) if grads is None] == [OVERFLOW]
