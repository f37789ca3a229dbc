"""What shards weights or lets them differ between ranks is refused, before or after `attach`."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import PostLocalSGDOptimizer, ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import issp
from issp.nn.convert import convert
from issp.pruning.attach import attach
from issp.pruning.methods import METHODS
from issp.pruning.recorder import Recorder
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


def mesh(*shape):
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard")[-len(shape) :])


def along(dim):
    return {"shard_placement_fn": lambda p: Shard(dim if p.dim() > 1 else 0)}


def tensor_parallel(model):
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(model, mesh(1), plan)


def placed(placement):
    def place(model):
        weight = model[0].weight.detach()
        model[0].weight = nn.Parameter(DTensor.from_local(weight, mesh(1), [placement]))

    return place


def offloaded(model):
    """As CPUOffloadPolicy leaves weights: the shards on the CPU, the mesh on the GPU."""
    weight = model[0].weight.detach()
    gpu = DeviceMesh("cuda", [0], _init_backend=False, _rank=0)
    spec = DTensorSpec(gpu, (Shard(0),), TensorMeta(weight.shape, weight.stride(), weight.dtype))
    model[0].weight = nn.Parameter(DTensor(weight, spec, requires_grad=False))


UNSUPPORTED = {
    "HSDP": (
        lambda m: fully_shard(m, mesh=mesh(1, 1)),
        "0 is distributed over a mesh of 2 dimensions \\(HSDP, or tensor parallelism beside",
    ),
    "other dimension": (
        lambda m: fully_shard(m, mesh=mesh(1), **along(1)),
        "0 is distributed as Shard\\(dim=1\\): shards are selected over where they are rows of",
    ),
    "tensor parallel": (tensor_parallel, "2 is distributed as Shard\\(dim=1\\): shards are"),
    "Replicate": (placed(Replicate()), "0 is distributed as Replicate\\(\\): shards are"),
    "Partial": (placed(Partial()), "0 is distributed as Partial\\(sum\\): shards are selected"),
    "CPU offload": (offloaded, "0 has its shards on the cpu and its mesh on cuda: use fully_shard"),
}


@pytest.mark.parametrize("how", UNSUPPORTED)
def test_other_ways_to_distribute_weights_are_refused(how):
    distribute, sentence = UNSUPPORTED[how]
    model = net()
    distribute(model)
    opt = sgd(model.parameters())
    with pytest.raises(ValueError, match=sentence):
        attach(model, opt)
    with pytest.raises(ValueError, match=", or exclude it$"):
        attach(model, opt)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"iss-p", "iht", "l1", "dense"}))
def test_methods_that_need_whole_weights_are_refused_by_name(method):
    model = shard(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 4)))
    with pytest.raises(ValueError, match=f"{method} needs whole weights, and 0 is sharded: use"):
        attach(model, sgd(model.parameters()), method=method)


def test_a_method_that_needs_whole_weights_is_refused_when_they_are_sharded_later():
    model = net()
    opt = sgd(model.parameters())
    pruner = attach(model, opt, method="iss-r")
    shard(model)
    with pytest.raises(ValueError, match="iss-r needs whole weights, and 0 is sharded: use"):
        pruner.reattach(sgd(model.parameters()))
    assert pruner.buckets.optimizers == [opt]


def test_what_reads_whole_layers_is_refused(tmp_path):
    model = shard(net())
    pruner = attach(model, sgd(model.parameters()), sparsity=0.5)
    with pytest.raises(ValueError, match="0 is sharded, and a record is of whole layers"):
        Recorder(pruner, tmp_path)
    pruner.finalize()
    for act in (lambda: convert(model), lambda: issp.pack(model, torch.ones(1, 8))):
        with pytest.raises(ValueError, match="0.weight is sharded: give the full state dict"):
            act()


def test_a_weight_that_is_gathered_for_good_is_refused():
    model = shard(net())
    opt = sgd(model.parameters())
    attach(model, opt)
    model[0]._parameters["weight"] = nn.Parameter(model[0].weight.detach().full_tensor())
    with pytest.raises(ValueError, match="0 is not sharded any more \\(a forward pass was"):
        opt.step()


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


class DeepSpeedOptimizer:
    """As in deepspeed.runtime.base_optimizer: a plain class around the user's optimizer."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    def step(self):
        self.optimizer.step()


class DeepSpeedZeroOptimizer(DeepSpeedOptimizer):
    pass


class DeepSpeedEngine(nn.Module):
    """As in deepspeed.runtime.engine: the user's model is its attribute `module`."""

    def __init__(self, model):
        super().__init__()
        self.module = model


def test_deepspeed_is_refused():
    model = net()
    inner = sgd(model.parameters())
    optimizer = DeepSpeedZeroOptimizer(inner)
    with pytest.raises(ValueError, match="DeepSpeedOptimizer updates flat copies of the weights"):
        attach(model, optimizer)
    with pytest.raises(ValueError, match="the model is in DeepSpeedEngine, whose optimizer"):
        attach(DeepSpeedEngine(model), inner)
    attach(model, inner)
    with pytest.raises(ValueError, match="DeepSpeedOptimizer updates flat copies of the weights"):
        optimizer.step()
