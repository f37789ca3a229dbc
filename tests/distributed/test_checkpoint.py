"""torch.distributed.checkpoint: what four ranks save, two ranks or one process load bit for bit."""

import copy

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from tests.distributed.ranks import needs_gloo, run_ranks
from tests.distributed.test_ddp import FREEZE, Case, assert_same_end, end
from tests.pruning.methods.runs import batch

pytestmark = needs_gloo


def parts_of(parallel, optimizer, pruner):
    model, moments = get_state_dict(parallel, optimizer)
    return {"model": model, "optimizer": moments, "pruner": pruner.state_dict()}


def step(parallel, optimizer, pruner, number):
    """One step on a batch that is the same on all ranks, so that all have its gradient."""
    x = batch(number)
    loss = (parallel(x) - x.mean(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    (loss + pruner.loss()).backward()
    optimizer.step()


def save(case, steps, folder):
    """Trains and saves; what was saved, and what one more step makes of it."""
    model, parallel, optimizer, pruner = case.build(dist.get_rank(), 100, DistributedDataParallel)
    for number in range(steps):
        step(parallel, optimizer, pruner, number)
    dcp.save(parts_of(parallel, optimizer, pruner), checkpoint_id=folder)
    saved = copy.deepcopy(end(model, optimizer, pruner))
    step(parallel, optimizer, pruner, steps)
    return saved, end(model, optimizer, pruner)


def load(case, steps, folder):
    """Loads into a network that was begun otherwise, and takes the same step."""
    wrap = DistributedDataParallel if dist.is_initialized() else lambda model: model
    model, parallel, optimizer, pruner = case.build(7, 8, wrap)
    parts = parts_of(parallel, optimizer, pruner)
    dcp.load(parts, checkpoint_id=folder)
    set_state_dict(
        parallel,
        optimizer,
        model_state_dict=parts["model"],
        optim_state_dict=parts["optimizer"],
    )
    pruner.load_state_dict(parts["pruner"])
    loaded = copy.deepcopy(end(model, optimizer, pruner))
    step(parallel, optimizer, pruner, steps)
    return loaded, end(model, optimizer, pruner)


@pytest.mark.parametrize(
    ("method", "optimizer", "steps"),
    [
        ("iss-p", "issp.Adam", FREEZE - 2),
        pytest.param("iss-p", "Adam", FREEZE + 1, marks=pytest.mark.full),
        pytest.param("srp", "issp.AdamW", FREEZE - 2, marks=pytest.mark.full),
        pytest.param("assl", "SGD", FREEZE - 2, marks=pytest.mark.full),
        pytest.param("2:4", "issp.SGD", FREEZE + 1, marks=pytest.mark.full),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_saved_by_four_ranks_and_loaded_by_two_and_by_one(tmp_path, method, optimizer, steps):
    case = Case(method, optimizer)
    saved, after = run_ranks(save, 4, case, steps, tmp_path / "checkpoint")[0]
    assert saved[1][0] == steps and not torch.equal(
        saved[0]["weight"]["head.weight"], after[0]["weight"]["head.weight"]
    )
    for world in (2, 1):
        if world > 1:
            results = run_ranks(load, world, case, steps, tmp_path / "checkpoint")
        else:
            results = [load(case, steps, tmp_path / "checkpoint")]
        for loaded, continued in results:
            assert_same_end(loaded, saved, f"loaded by {world}")
            assert_same_end(continued, after, f"one step after it was loaded by {world}")
