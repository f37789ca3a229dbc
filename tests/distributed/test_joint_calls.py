"""Calls that ranks with shards must make together are refused where they do not."""

import datetime

import pytest
import torch
import torch.distributed as dist

from issp.pruning import joint_calls
from issp.pruning.attach import attach
from issp.utils.errors import DivergedRanksError
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.distributed.sharded import Twins, net, shard

pytestmark = needs_gloo

CALLS = {
    "summary()": lambda pruner: pruner.summary(),
    "thresholds()": lambda pruner: pruner.thresholds(),
    "flips()": lambda pruner: pruner.flips(),
    "state_dict()": lambda pruner: pruner.state_dict(),
    "freeze()": lambda pruner: pruner.freeze(),
    "finalize()": lambda pruner: pruner.finalize(),
}


def sgd(params):
    return torch.optim.SGD(params, 0.1)


def call_alone(call):
    joint_calls._PATIENCE = datetime.timedelta(seconds=1)
    pruner = Twins(sgd, sparsity=0.5).pruners[0]
    if dist.get_rank() == 1:
        with pytest.raises(DivergedRanksError) as error:
            CALLS[call](pruner)
        return str(error.value)
    return None


def call_another(call):
    twins = Twins(sgd, sparsity=0.5)
    with pytest.raises(DivergedRanksError) as error:
        CALLS[call if dist.get_rank() else "summary()"](twins.pruners[0])
    for pruner in twins.pruners:  # nothing is broken
        pruner.freeze()
    twins.assert_equal()
    return str(error.value)


def test_a_rank_that_is_alone_says_so_after_a_while():
    assert datetime.timedelta(minutes=10) == joint_calls._PATIENCE
    _, said = run_ranks(call_alone, 2, "summary()")
    assert said.startswith("not all ranks have called summary() in 0:00:01, and weights that are")


@pytest.mark.full
@pytest.mark.parametrize("call", CALLS)
def test_every_call_of_whole_weights_is_one_of_all_ranks(call):
    _, said = run_ranks(call_alone, 2, call)
    assert said.startswith(f"not all ranks have called {call} in 0:00:01")
    if call != "summary()":
        for said in run_ranks(call_another, 2, call):
            assert said.startswith(f"the ranks have called summary(), {call}, in the order of")


def call_on_whole_weights():
    """Under DistributedDataParallel a rank may ask alone."""
    model = net()
    pruner = attach(model, sgd(model.parameters()), sparsity=0.5)
    return str(pruner.summary()) if dist.get_rank() == 1 else None


def test_whole_weights_need_no_company():
    _, said = run_ranks(call_on_whole_weights, 2)
    assert "total" in said


def attach_twice():
    model = shard(net())
    opt = sgd(model.parameters())
    attach(model, opt, sparsity=0.5).detach()
    return str(attach(model, opt, sparsity=0.5).summary())


def test_a_second_pruner_compares_its_own_calls():
    first, second = run_ranks(attach_twice, 2)
    assert first == second
