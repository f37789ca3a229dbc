"""Pruning of weights that `fully_shard` distributes: the bits of a single process."""

import pytest
import torch

import issp
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.distributed.sharded import Twins, aligned_net

pytestmark = needs_gloo


def sgd(params):
    return torch.optim.SGD(params, 0.1, momentum=0.9)


def adam(params):
    return torch.optim.Adam(params, 0.01)


# Of issp's optimizers, the sharded one leaves the step to torch.
OPTIMIZERS = {
    "SGD": {"optimizer": sgd},
    "Adam": {"optimizer": adam},
    "Adam, foreach": {"optimizer": lambda p: torch.optim.Adam(p, 0.01, foreach=True)},
    "AdamW, fused": {
        "optimizer": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        "make": aligned_net,
    },
    "issp.optim.Adam": {
        "optimizer": lambda p: issp.optim.Adam(p, 0.01),
        "whole_optimizer": adam,
    },
    "issp.optim.SGD": {
        "optimizer": lambda p: issp.optim.SGD(p, 0.1, momentum=0.9),
        "whole_optimizer": sgd,
    },
}


def train(name):
    for settings in ({"sparsity": 0.5}, {"method": "iht", "sparsity": 0.8}):
        twins = Twins(**OPTIMIZERS[name], **settings)
        twins.prune_and_freeze()
        twins.step(3)
        twins.assert_equal()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.full)])
def test_every_optimizer_gives_the_bits_of_one_process(world, name):
    run_ranks(train, world, name)
