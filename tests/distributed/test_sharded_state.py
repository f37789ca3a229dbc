"""Checkpoints of sharded training: saved by some ranks, loaded by another number of them."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.tensor import distribute_tensor

import issp
from issp.pruning.attach import attach
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.distributed.sharded import Twins, assert_same_bits, assert_same_states, net, shard

pytestmark = [needs_gloo, pytest.mark.full]
OPTIMIZERS = {
    "Adam": lambda params: torch.optim.Adam(params, 0.01),
    "issp.optim.Adam": lambda params: issp.optim.Adam(params, 0.01, foreach=False),
}


class Run:
    """A training whose gradients depend on the step alone; sharded where there are ranks."""

    def __init__(self, optimizer, first=0):
        is_parallel = dist.is_initialized()
        self.model = shard(net()) if is_parallel else net()
        self.opt = OPTIMIZERS[optimizer](self.model.parameters())
        self.pruner = attach(self.model, self.opt, sparsity=0.8, freeze_at=4)
        self.step_count = first

    def train(self, until):
        for step in range(self.step_count, until):
            generator = torch.Generator().manual_seed(step)
            for p in self.model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
                if hasattr(p, "device_mesh"):
                    p.grad = distribute_tensor(p.grad, p.device_mesh, p.placements)
            self.opt.step()
        self.step_count = until

    def state(self):
        model, optimizer = get_state_dict(self.model, self.opt)
        return {"model": model, "optimizer": optimizer, "pruner": self.pruner}

    def save(self, folder):
        dcp.save(self.state(), checkpoint_id=folder, no_dist=not dist.is_initialized())

    def load(self, folder):
        state = self.state()
        dcp.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
        set_state_dict(
            self.model,
            self.opt,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )
        self.step_count = self.pruner.step_count

    def bits(self):
        """All numbers of the training, whole."""
        numbers = {"pruner": self.pruner.state_dict()}
        for name, p in self.model.named_parameters():
            values = {"weight": p, **self.opt.state[p]}
            numbers[name] = {
                key: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().clone()
                for key, x in values.items()
            }
        return numbers


def go_on(optimizer, source, until, target):
    run = Run(optimizer)
    if source:
        run.load(source)
    run.train(until)
    run.save(target)
    return run.bits()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, optimizer):
    whole = Run("Adam")
    source = None
    for world, until in ((4, 2), (2, 3), (4, 5), (2, 6)):
        target = str(tmp_path / str(until))
        whole.train(until)
        for bits in run_ranks(go_on, world, optimizer, source, until, target):
            assert_same_states(bits, whole.bits())
        source = target
    alone = Run("Adam")
    alone.load(source)
    assert_same_states(alone.bits(), whole.bits())
    whole.train(8)
    alone.train(8)
    assert_same_states(alone.bits(), whole.bits())


def test_a_run_of_one_process_goes_on_with_several(tmp_path):
    whole = Run("Adam")
    whole.train(3)
    whole.save(str(tmp_path / "3"))
    whole.train(6)
    for bits in run_ranks(go_on, 2, "Adam", str(tmp_path / "3"), 6, str(tmp_path / "6")):
        assert_same_states(bits, whole.bits())


def load_plain(state):
    """`load_state_dict` of whole states, and what it refuses."""
    twins = Twins(OPTIMIZERS["Adam"], sparsity=0.8, freeze_at=4)
    pruner = twins.pruners[0]
    before = pruner.state_dict()
    damaged = {**state, "layers": {**state["layers"], "0": {**state["layers"]["0"], "k": -1}}}
    with pytest.raises(ValueError, match="k of 0 in the pruner's state is -1"):
        pruner.load_state_dict(damaged)
    assert_same_states(pruner.state_dict(), before)
    pruner.load_state_dict(state)
    assert_same_states(pruner.state_dict(), state)
    rows = twins.sharded[2].weight.to_local().shape[0]
    mask = pruner.masks()["2"]
    assert mask.to_local().shape[0] == rows
    return mask.full_tensor()


def test_a_plain_state_loads_on_every_rank():
    run = Run("Adam")
    run.train(3)
    for mask in run_ranks(load_plain, 4, run.pruner.state_dict()):
        assert_same_bits(mask, run.pruner.masks()["2"])
