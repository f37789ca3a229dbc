"""What users of other pruning tools complain about, each complaint one test.

Each test is named by its number; the linked issue of another project stands above it.
"""

import copy
import math

import pytest
import torch
from torch import nn

from issp import num_pruned
from issp.pruning.attach import attach
from issp.pruning.schedules import Cubic
from tests.pruning.complaint_networks import (
    adam,
    bits,
    equal,
    net,
    snapshot,
    train,
    unchanged,
)

# 1. Fused-AdamW overflow looks like a step (accelerate#4242)


DEVICES = [
    "cpu",
    pytest.param(
        "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
    ),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("frozen", [False, True])
def test_01_overflow_with_fused_adamw_is_no_step(frozen, device):
    model = net().to(device)
    opt = torch.optim.AdamW(model.parameters(), 1e-2, fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=4.0)
    pruner = attach(model, opt, sparsity=0.9)

    def step(seed, overflow):
        opt.zero_grad()
        x = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
        scaler.scale(model(x.to(device)).square().mean()).backward()
        if overflow:
            model[3].weight.grad[0, 0] = math.inf
        scaler.step(opt)
        scaler.update()

    step(0, overflow=True)
    assert pruner.step_count == 0 and all(m.all() for m in pruner.masks().values())
    step(1, overflow=False)
    assert pruner.step_count == 1
    if frozen:
        pruner.freeze()
    before = snapshot(model, pruner)
    step(2, overflow=True)
    assert unchanged(snapshot(model, pruner), before)
    step(3, overflow=False)
    assert pruner.step_count == 2 and not equal(bits(model.state_dict()), before[0])


@pytest.mark.parametrize("device", DEVICES)
def test_01_overflow_does_not_bring_freeze_or_schedule_nearer(device):
    model = net().to(device)
    skipped, taken = torch.ones((), device=device), torch.zeros((), device=device)
    pruner = attach(model, schedule=Cubic(0.0, 0.9, 0, 4), freeze_at=4)
    for t in range(1, 4):
        pruner.step(found_inf=skipped)
        pruner.step(found_inf=taken)
        assert pruner.step_count == t and not pruner.frozen
        assert pruner.summary().rows[1].selected == num_pruned(12 * 128, Cubic(0.0, 0.9, 0, 4)(t))
    pruner.step(found_inf=skipped)
    assert not pruner.frozen
    pruner.step(found_inf=taken)
    assert pruner.frozen and pruner.step_count == 4


def test_01_overflow_with_an_unfused_optimizer_is_no_step():
    model = net()
    opt = adam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    pruner = attach(model, opt)
    for overflow in (True, False):
        scaler.scale(model(torch.randn(2, 2, 4, 4)).sum()).backward()
        if overflow:
            model[3].weight.grad[0, 0] = math.nan
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        assert pruner.step_count == int(not overflow)


# 2. Momentum revives pruned weights (filter-pruning-geometric-median#47)
# 3. Weight decay moves masked weights (Unlearn-Saliency#32)

OPTIMIZERS = {
    "sgd": lambda p, decay: torch.optim.SGD(p, 1e-2, momentum=0.9, weight_decay=decay),
    "adamw": lambda p, decay: torch.optim.AdamW(p, 1e-3, weight_decay=decay, amsgrad=True),
}


def frozen_zeros_survive(kind, decay):
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    opt = OPTIMIZERS[kind](model.parameters(), decay)
    pruner = attach(model, opt, sparsity=0.8, freeze_at=10)
    x, y = torch.randn(16, 8), torch.randn(16, 4)
    for t in range(1000):
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()
        if t == 9:
            masks, start = pruner.masks(), bits(model.state_dict())
    assert pruner.step_count == 1000 and equal(pruner.masks(), masks)
    for name, mask in masks.items():
        weight = model.get_submodule(name).weight
        pruned = num_pruned(weight.numel(), 0.8)
        assert int((weight == 0).sum()) == pruned == int((~mask).sum())
        assert not weight[~mask].any() and weight.grad[~mask].any()
        moments = [v for v in opt.state[weight].values() if v.shape == weight.shape]
        assert len(moments) == {"sgd": 1, "adamw": 3}[kind]
        assert all(not m[~mask].any() and m[mask].any() for m in moments)
        assert not torch.equal(bits(model.state_dict())[f"{name}.weight"], start[f"{name}.weight"])


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_02_momentum_does_not_revive_frozen_zeros(kind):
    frozen_zeros_survive(kind, decay=0.0)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_03_weight_decay_does_not_move_frozen_zeros(kind):
    frozen_zeros_survive(kind, decay=0.1)


# 4. EMA ignores masks (sparseml#1486)


@pytest.mark.parametrize("kind", ["module", "averaged", "dict"])
def test_04_moving_average_has_the_sparsity_of_the_model(kind):
    model = net()
    opt = adam(model)
    if kind == "module":
        ema = copy.deepcopy(model)
        tensors = dict(ema.named_parameters())
    elif kind == "averaged":
        ema = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
        )
        tensors = {n.removeprefix("module."): p for n, p in ema.named_parameters()}
    else:
        tensors = ema = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruner = attach(model, opt, sparsity=0.9, freeze_at=4, ema=ema)

    def update():
        if kind == "averaged":
            ema.update_parameters(model)
            return
        with torch.no_grad():
            for name, p in model.named_parameters():
                tensors[name].lerp_(p, 0.1)

    for seed in range(8):
        train(model, opt, [seed])
        update()
        for name, mask in pruner.masks().items():
            averaged = tensors[f"{name}.weight"]
            zeros = int((averaged == 0).sum())
            assert zeros == (int((~mask).sum()) if pruner.frozen else 0)
            assert not pruner.frozen or not averaged[~mask].any()
    assert pruner.frozen
    with torch.no_grad():
        tensors["3.weight"].fill_(1.0)  # a stale average, loaded from elsewhere
    pruner.finalize()
    assert torch.equal(tensors["3.weight"], pruner.masks()["3"].float())


def test_04_an_average_of_another_model_is_refused():
    model = net()
    with pytest.raises(ValueError, match="ema has no 0.weight"):
        attach(model, adam(model), ema=nn.Linear(2, 2))


# 10. Masks all ones because nothing was eligible (apex#1387)


@pytest.mark.parametrize(
    "arguments", [{"types": nn.Embedding}, {"types": nn.Linear, "exclude": ["3", "4"]}]
)
def test_10_no_layer_to_prune_raises(arguments):
    model = net()
    with pytest.raises(ValueError, match="no layer to prune"):
        attach(model, adam(model), **arguments)


def test_10_no_trained_layer_raises():
    model = net().requires_grad_(False)
    with pytest.raises(ValueError, match="no weight to prune is trained"):
        attach(model, adam(model))
    with pytest.raises(ValueError, match="no weight to prune is trained"):
        attach(net(), adam(net()))


def test_10_from_zeros_of_a_dense_model_raises():
    model = net()
    with pytest.raises(ValueError, match="no weight to prune is zero"):
        attach(model, adam(model), from_zeros=True)
