"""What the pruner does besides its steps, on sharded weights: as in a single process."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

import issp
from issp.pruning.attach import attach
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.distributed.sharded import Twins, aligned_net, assert_same_bits, forward, net, shard

pytestmark = [needs_gloo, pytest.mark.full]


def sgd(params):
    return torch.optim.SGD(params, 0.1, momentum=0.9)


def gradients_of_fully_shard():
    """Its own backward pass; the mean over two ranks of equal gradients is exact."""
    twins = Twins(sgd, sparsity=0.7, freeze_at=4)
    for step in range(6):
        for model, opt in zip((twins.sharded, twins.whole), twins.opts, strict=True):
            opt.zero_grad()
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(2, 3, 6, 6, generator=generator)
            model(x).square().mean().backward()
            opt.step()
        twins.assert_equal()


def steps_within_the_backward_pass():
    """An optimizer per parameter, which steps as soon as its gradient is there."""
    whole = net()
    sharded, pruners = shard(copy.deepcopy(whole)), []
    for model in (sharded, whole):
        opts = {p: torch.optim.SGD([p], 0.1) for p in model.parameters()}
        pruners.append(attach(model, list(opts.values()), sparsity=0.5))

        def step(p, opts=opts):
            opts[p].step()
            opts[p].zero_grad()

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for seed in range(3):
            x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
            model(x).square().mean().backward()
    sharded.reshard()
    for a, b in zip(sharded.parameters(), whole.parameters(), strict=True):
        assert_same_bits(a, b)
    assert pruners[0].thresholds() == pruners[1].thresholds()
    assert pruners[0].step_count == pruners[1].step_count == 3


def precision_of_the_forward_pass():
    """The weights that are pruned are the float32 shards, not their copies in bfloat16."""
    model = shard(net(), mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    opt = sgd(model.parameters())
    pruner = attach(model, opt, sparsity=0.7, freeze_at=3)
    for _ in range(3):
        opt.zero_grad()
        forward(model).backward()
        opt.step()
        with torch.no_grad():
            forward(model)
    model.reshard()
    for row in pruner.summary().rows:
        weight = model.get_submodule(row.name).weight
        assert weight.dtype == torch.float32
        zeros = int((weight.detach().full_tensor() == 0).sum())
        assert row.zeros == zeros == row.selected == issp.num_pruned(row.numel, 0.7)


def schedules_and_stages():
    twins = Twins(
        sgd,
        schedule=issp.Cubic(0.0, 0.9, begin=1, end=4),
        overrides={"3": 0.5, "4": 0.0},
        freeze_at=6,
    )
    for _ in range(8):
        twins.step()
        twins.assert_equal()
    assert twins.pruners[0].frozen
    model = twins.pruners[0].finalize()
    twins.pruners[1].finalize()
    twins.assert_equal()
    assert model is twins.sharded
    assert forward(model).item() == pytest.approx(forward(twins.whole).item())
    plain = net()
    options = StateDictOptions(full_state_dict=True)
    plain.load_state_dict(get_model_state_dict(model, options=options))
    for a, b in zip(plain.parameters(), twins.whole.parameters(), strict=True):
        assert_same_bits(a, b)


def masks_fixed_at_once():
    twins = Twins(sgd, method="l1", sparsity=0.7)
    twins.assert_equal()
    twins.step(2)
    twins.assert_equal()

    def sparse():
        model = net()
        with torch.no_grad():
            for index in (0, 2):
                model[index].weight[0].zero_()
                model[index].weight[-1, 1] = 0.0
        return model

    twins = Twins(sgd, sparse, from_zeros=True)
    twins.assert_equal()
    twins.step(2)
    twins.assert_equal()
    assert twins.pruners[0].frozen
    model = shard(net())
    with pytest.raises(ValueError, match="from_zeros: no weight to prune is zero"):
        attach(model, sgd(model.parameters()), from_zeros=True)
    # The freeze before a step selects.
    twins = Twins(sgd, sparsity=0.6)
    for pruner in twins.pruners:
        pruner.freeze()
    twins.assert_equal()
    assert twins.pruners[0].summary().selected


def masks_are_dtensors():
    twins = Twins(sgd, sparsity=0.5)
    twins.step()
    for name, mask in twins.pruners[0].masks().items():
        weight = twins.sharded.get_submodule(name).weight
        assert isinstance(mask, DTensor) and mask.dtype == torch.bool
        assert (mask.device_mesh, mask.placements) == (weight.device_mesh, weight.placements)
        assert mask.to_local().shape == weight.to_local().shape
    dense = Twins(sgd, method="dense")
    dense.step()
    dense.assert_equal()


def every_dtype():
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        twins = Twins(sgd, lambda dtype=dtype: aligned_net().to(dtype), sparsity=0.8)
        twins.prune_and_freeze()


def no_copy_outlives_a_change():
    """After a forward pass without a backward pass, FSDP keeps whole weights for the next one."""
    twins = Twins(sgd, sparsity=0.9)
    twins.step(2)

    def outputs():
        with torch.no_grad():
            return [forward(m).item() for m in (twins.sharded, twins.whole)]

    before = outputs()
    a, b = twins.pruners
    with a.masked(), b.masked():
        masked = outputs()
        assert masked == pytest.approx(masked[::-1]) and masked != pytest.approx(before)
    assert outputs() == before
    twins.assert_equal()
    outputs()
    a.freeze()
    b.freeze()
    frozen = outputs()
    assert frozen == pytest.approx(masked)
    twins.assert_equal()
    outputs()
    assert str(a.summary()) == str(b.summary())
    again = attach_after(a, twins, outputs)
    again.detach()


def attach_after(pruner, twins, act):
    pruner.detach()
    act()
    return attach(twins.sharded, twins.opts[0], sparsity=0.9)


def averages_are_masked():
    twins = Twins(sgd, sparsity=0.8)
    pairs = [
        {name: p.detach().clone() + 1 for name, p in m.named_parameters()}
        for m in (twins.sharded, twins.whole)
    ]
    twins.step(2)
    a, b = twins.pruners
    with a.masked(pairs[0]), b.masked(pairs[1]):
        for name in pairs[1]:
            assert_same_bits(pairs[0][name], pairs[1][name])
        assert (pairs[1]["0.weight"] == 0).any()
    for pruner in twins.pruners:
        pruner.detach()
    frozen = [
        attach(m, o, sparsity=0.8, ema=ema)
        for m, o, ema in zip((twins.sharded, twins.whole), twins.opts, pairs, strict=True)
    ]
    for pruner in frozen:
        pruner.freeze()
    for name in pairs[1]:
        assert_same_bits(pairs[0][name], pairs[1][name])
    assert not pairs[1]["0.weight"].all()
    for pruner in frozen:
        pruner.detach()
    # A module that is sharded alike, and tensors that are whole.
    module = shard(net())
    attach(twins.sharded, twins.opts[0], ema=module).detach()
    for act in (
        lambda: attach(twins.sharded, twins.opts[0], ema=pairs[1]),
        frozen[0].masked(pairs[1]).__enter__,
    ):
        with pytest.raises(ValueError, match="ema: the average of 0 is not distributed as its"):
            act()


def patterns_within_the_rows_of_a_rank():
    for keep in (issp.Keep(2, of=4), issp.Keep(1, of=8, layout="flat")):
        twins = Twins(sgd, aligned_net, pattern=keep)
        twins.prune_and_freeze()
        twins.step()
        twins.assert_equal()
    twins = Twins(sgd, aligned_net, sparsity=0.5, overrides={"1": issp.Keep(2, of=4)})
    twins.step(2)
    twins.assert_equal()

    def make(rows=16):
        return nn.Sequential(nn.Linear(8, rows), nn.Linear(rows, 4))

    twins = Twins(sgd, make, pattern=issp.Keep(1, of=2, v=4), exclude="1")
    twins.step()
    twins.assert_equal()
    model = shard(make(12))
    with pytest.raises(ValueError, match="0: its 12 rows are sharded by 6, which cuts groups of"):
        attach(model, sgd(model.parameters()), pattern=issp.Keep(1, of=2, v=4))
    with pytest.raises(ValueError, match="0 is sharded, and units are not ranked over shards"):
        attach(model, sgd(model.parameters()), 0.5, unit=issp.Unit(2, 2, tail="dense"))


def loops_by_hand_and_closures():
    twins = Twins(sgd, sparsity=0.5, hook=False)
    for _ in range(2):
        twins.step()
        for pruner in twins.pruners:
            pruner.step()
        twins.assert_equal()
    twins = Twins(sgd, sparsity=0.5)

    def closure():
        twins.set_grads()
        return torch.zeros(())

    twins.opts[0].step(closure)
    twins.opts[1].step()
    twins.assert_equal()


def overflows_are_no_steps():
    """An infinity on one rank skips the step of all, with every protocol of GradScaler."""
    for optimizer in (
        sgd,
        lambda p: torch.optim.AdamW(p, 0.01, fused=True),
        lambda p: issp.optim.Adam(p, 0.01),
    ):
        twins = Twins(
            optimizer, aligned_net, lambda p: torch.optim.AdamW(p, 0.01, fused=True), sparsity=0.5
        )
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for step in range(3):
            twins.set_grads()
            scaler.scale(torch.zeros(()))
            weight = twins.sharded[0].weight
            before = weight.detach().clone(), twins.pruners[0].masks()["0"]
            if step == 1 and dist.get_rank() == 1:
                weight.grad.to_local()[0, 0] = float("inf")
            scaler.step(twins.opts[0])
            scaler.update()
            skipped = is_unchanged(weight, before[0])
            assert skipped == (step == 1)
            if skipped:
                assert_same_bits(twins.pruners[0].masks()["0"], before[1].full_tensor())
        assert twins.pruners[0].step_count == 2


def is_unchanged(weight, before):
    return torch.equal(weight.detach().full_tensor(), before.full_tensor())


def sharded_after_attach():
    whole, model = net(), net()
    opts = [sgd(m.parameters()) for m in (whole, model)]
    pruners = [attach(m, o, sparsity=0.7) for m, o in zip((whole, model), opts, strict=True)]
    for opt, m in zip(opts, (whole, model), strict=True):
        forward(m).backward()
        opt.step()
    shard(model)
    with pytest.raises(ValueError, match="fully_shard replaces the parameters"):
        opts[1].step()
    pruners[1].reattach(sgd(model.parameters()))
    assert pruners[1].thresholds() == pruners[0].thresholds()
    for pruner in pruners:
        pruner.freeze()
    for name, mask in pruners[0].masks().items():
        assert_same_bits(pruners[1].masks()[name], mask)


def trained_late():
    def make():
        model = net()
        model[2].weight.requires_grad_(False)
        return model

    twins = Twins(sgd, make, sparsity=0.5)
    twins.step(2)
    assert "2" not in {x.name for b in twins.pruners[0].buckets for x in b.layers}
    for model in (twins.sharded, twins.whole):
        model[2].weight.requires_grad_(True)
    twins.step(2)
    twins.assert_equal()
    assert twins.pruners[0].summary().rows[1].selected


def two_optimizers_and_a_plain_dtensor():
    """A DTensor that no `fully_shard` made, and weights of several optimizers."""
    whole = aligned_net()
    sharded = copy.deepcopy(whole)
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in sharded:
        layer.weight = nn.Parameter(distribute_tensor(layer.weight.detach(), mesh, [Shard(0)]))
    pruners = []
    for model in (sharded, whole):
        opts = [sgd([model[0].weight]), sgd([model[1].weight])]
        pruners.append(attach(model, opts, sparsity=0.75))
        for _ in range(2):
            for layer in model:
                grad = torch.ones(layer.weight.shape)
                if model is sharded:
                    grad = distribute_tensor(grad, mesh, [Shard(0)])
                layer.weight.grad = grad
            for opt in opts:
                opt.step()
    for a, b in zip(sharded, whole, strict=True):
        assert_same_bits(a.weight, b.weight)
    assert pruners[0].thresholds() == pruners[1].thresholds()


def columns_of_tensor_parallelism():
    """ColwiseParallel without `fully_shard`: each rank has rows of the weight and their outputs."""

    def make():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5), nn.Linear(5, 3))

    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    models = [make(), make()]
    plan = {"0": ColwiseParallel(output_layouts=Replicate())}
    plan |= {"1": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(models[0], mesh, plan)
    opts = [sgd(m.parameters()) for m in models]
    pruners = [
        attach(m, opt, sparsity=0.7, freeze_at=4) for m, opt in zip(models, opts, strict=True)
    ]
    for step in range(6):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        for model, opt in zip(models, opts, strict=True):
            opt.zero_grad()
            model(x).square().mean().backward()
        for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
            grad = a.grad.full_tensor() if isinstance(a.grad, DTensor) else a.grad
            torch.testing.assert_close(grad, b.grad, rtol=0, atol=1e-6)
            b.grad = grad  # products of other shapes are rounded in another way
        for opt in opts:
            opt.step()
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert_same_bits(a, b)
    for name, mask in pruners[1].masks().items():
        assert_same_bits(pruners[0].masks()[name], mask)
    assert pruners[0].frozen and str(pruners[0].summary()) == str(pruners[1].summary())


def other_tensor_parallelism_is_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    with pytest.raises(ValueError, match="1.* is distributed as Shard.dim=1.*rows of the weight"):
        attach(model, sgd(model.parameters()))
    attach(model, sgd(model.parameters()), exclude="1")


SCENARIOS = (
    columns_of_tensor_parallelism,
    other_tensor_parallelism_is_refused,
    gradients_of_fully_shard,
    steps_within_the_backward_pass,
    precision_of_the_forward_pass,
    schedules_and_stages,
    masks_fixed_at_once,
    masks_are_dtensors,
    every_dtype,
    no_copy_outlives_a_change,
    averages_are_masked,
    patterns_within_the_rows_of_a_rank,
    loops_by_hand_and_closures,
    overflows_are_no_steps,
    sharded_after_attach,
    trained_late,
    two_optimizers_and_a_plain_dtensor,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_sharded_weights_are_treated_as_whole_ones(scenario):
    run_ranks(scenario, 2)


@pytest.mark.parametrize(
    "scenario",
    [schedules_and_stages, masks_fixed_at_once, averages_are_masked],
    ids=lambda scenario: scenario.__name__,
)
def test_ranks_without_a_row_of_a_weight(scenario):
    run_ranks(scenario, 4)
