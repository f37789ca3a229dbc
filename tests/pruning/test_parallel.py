"""What shards weights or lets them differ between ranks is refused, before or after `attach`."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer

from issp.pruning.attach import attach
from tests.pruning.networks import sgd

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")


@pytest.fixture(scope="module", autouse=True)
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


def shard(model):
    return fully_shard(model, mesh=init_device_mesh("cpu", (1,)))


def fsdp(model, **kwargs):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **kwargs)


@pytest.mark.parametrize("original", [False, True])
def test_fsdp1_is_refused(original):
    model = net()
    wrapped = fsdp(model, use_orig_params=original)
    for given in (wrapped, nn.Sequential(wrapped)):
        with pytest.raises(ValueError, match="wrapped in FullyShardedDataParallel"):
            attach(given, sgd(wrapped.parameters()))
    with pytest.raises(ValueError, match="0 is sharded \\(FSDP\\)|0 has no parameter `weight`"):
        attach(model, sgd(wrapped.parameters()))


@pytest.mark.parametrize(
    ("wrap", "sentence"),
    [
        (lambda m: fsdp(m, use_orig_params=True), "0 is sharded \\(FSDP\\)"),
        (fsdp, "0 has no parameter `weight` \\(parametrized, sharded"),
        (lambda m: nn.utils.parametrizations.weight_norm(m[0]), "0 has no parameter `weight`"),
    ],
    ids=["FSDP1 of original parameters", "FSDP1", "parametrized"],
)
def test_weights_that_are_taken_away_after_attach_are_refused(wrap, sentence):
    model = net()
    opt = sgd(model.parameters())
    pruner = attach(model, opt)
    wrap(model)
    for act in (opt.step, pruner.freeze, pruner.summary):
        with pytest.raises(ValueError, match=sentence):
            act()
    assert pruner.step_count == 0 and not pruner.frozen


def test_an_optimizer_from_before_fully_shard_is_refused():
    model = net()
    opt = sgd(model.parameters())
    pruner = attach(model, opt)
    shard(model)
    sentence = "fully_shard replaces the parameters, so build the optimizer after it"
    for act in (opt.step, pruner.freeze, lambda: attach(model, opt)):
        with pytest.raises(ValueError, match=sentence):
            act()
    assert pruner.step_count == 0 and not pruner.frozen
    opt = sgd(model.parameters())
    pruner.reattach(opt)
    opt.step()
    assert pruner.step_count == 1


def test_optimizers_of_torch_that_work_per_rank_are_refused():
    model = net()
    local = sgd(model.parameters())
    averaging = PostLocalSGDOptimizer(local, PeriodicModelAverager(period=4, warmup_steps=1))
    with pytest.raises(ValueError, match="PostLocalSGDOptimizer averages the weights"):
        attach(model, averaging)
    sharded = ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.1)
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer keeps the moments"):
        attach(model, sharded)
    attach(model, local)
    with pytest.raises(ValueError, match="PostLocalSGDOptimizer averages the weights"):
        averaging.step()


def test_gradients_that_are_averaged_within_a_part_of_the_ranks_are_refused():
    model = nn.parallel.DistributedDataParallel(net())
    attach(model, sgd(model.parameters()))
    state = post_localSGD_hook.PostLocalSGDState(None, None, 10)
    model.register_comm_hook(state, post_localSGD_hook.post_localSGD_hook)
    with pytest.raises(ValueError, match="post_localSGD_hook, under which the weights"):
        attach(model, sgd(model.parameters()))


def test_a_pruner_whose_weights_are_gone_disturbs_no_other_optimizer():
    model, other = net(), net()
    pruner = attach(model, sgd(model.parameters()))
    shard(model)
    opt = sgd(other.parameters())
    again = attach(other, opt)
    opt.step()
    sgd(nn.Linear(2, 2).parameters()).step()
    assert again.step_count == 1 and pruner.step_count == 0
