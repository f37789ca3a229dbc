"""The pruner: shrinkage and freeze, tensors that move, N:M layers."""

import copy
import warnings

import pytest
import torch
from torch import nn

from issp import Keep, num_pruned, ops
from issp.pruning.attach import attach
from issp.pruning.schedules import Cubic, Linear
from tests.pruning.networks import adam, net, same, sgd, step, train, weights

# Properties of the method


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_always_unimportant_weights_stay_below_the_steady_state_bound(kind):
    """|w| <= alpha * rate / (1 - alpha) [+ alpha^t |w0|], and a steady gradient reaches it."""
    alpha, rate, steps = 0.9, 1e-3, 200
    layer = nn.Linear(64, 1, bias=False)
    important = torch.arange(64) >= 32
    with torch.no_grad():
        layer.weight[:, important] = 5.0
        layer.weight[:, ~important] = torch.linspace(-1e-2, 1e-2, 32)
    start = layer.weight.detach().clone()
    opt = sgd(layer.parameters(), rate) if kind == "sgd" else adam(layer, rate)
    pruner = attach(layer, opt, sparsity=0.5, shrink=alpha)
    for _ in range(steps):
        layer.weight.grad = torch.where(important, 0.0, -1.0)[None]
        opt.step()
        assert torch.equal(pruner.masks()[""][0], important)
    bound = alpha * rate / (1 - alpha) + alpha**steps * start.abs()
    small = layer.weight.detach()[:, ~important]
    assert (small.abs() <= bound[:, ~important] * (1 + 1e-4)).all()
    assert (small > 0.99 * alpha * rate / (1 - alpha)).all()
    assert torch.equal(layer.weight.detach()[:, important], start[:, important])


def test_soft_shrinkage_flips_more_than_hard_thresholding():
    """Weights drawn to noisy optima of about 0.01, with a rate of 0.001: soft shrinkage lets them
    compete (its bound is 0.019), hard thresholding holds the pruned ones below the rate."""
    total = {}
    for method in ("iss-p", "iht"):
        rng = torch.Generator().manual_seed(0)
        layer = nn.Linear(40, 20, bias=False)
        optimum = torch.randn(20, 40, generator=rng) * 0.01
        layer.weight.data = optimum.clone()
        opt = adam(layer, 1e-3)
        pruner = attach(layer, opt, sparsity=0.9, method=method)
        total[method] = -720  # the first selection is no flip of a decision
        for _ in range(100):
            noise = 0.3 * torch.randn(20, 40, generator=rng)
            layer.weight.grad = 100 * (layer.weight.detach() - optimum) + noise
            opt.step()
            total[method] += sum(pruner.flips().values())
    assert total["iss-p"] > 3 * total["iht"] + 20


@pytest.mark.parametrize("method", ["iss-p", "iht"])
def test_zeros_before_the_freeze_are_those_of_hard_thresholding_alone(method):
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9, method=method)
    step(model, opt, 0)
    summary = pruner.summary()
    assert summary.selected == num_pruned(216, 0.9) + num_pruned(576, 0.9) + num_pruned(2880, 0.9)
    assert summary.zeros == (summary.selected if method == "iht" else 0)


# Freezing


def test_freeze_at_takes_the_mask_of_that_step_and_keeps_it():
    model, twin = net(), net()
    opt, other = adam(model), adam(twin)
    pruner, soft = attach(model, opt, freeze_at=5), attach(twin, other)
    train(model, opt, range(5))
    train(twin, other, range(5))
    assert pruner.frozen and not soft.frozen
    masks = soft.masks()
    assert same(pruner.masks(), masks) and sum(pruner.flips().values()) > 0
    for name, mask in masks.items():
        w, t = model.get_submodule(name).weight, twin.get_submodule(name).weight
        assert torch.equal(w, t.detach() * mask)
    train(model, opt, range(5, 12))
    assert same(pruner.masks(), masks) and pruner.step_count == 12
    assert sum(pruner.flips().values()) == 0
    assert pruner.summary().zeros == pruner.summary().selected


def test_freeze_before_any_step_selects_at_the_full_sparsity():
    model = net()
    before = weights(model)
    pruner = attach(model, adam(model), schedule=Cubic(0.0, 0.9, 0, 50))
    pruner.freeze()
    for row in pruner.summary().rows:
        assert row.zeros == row.selected == num_pruned(row.numel, 0.9)
        kept = pruner.masks()[row.name]
        original = before[f"{row.name}.weight"]
        assert original[kept].abs().min() >= original[~kept].abs().max()
        assert torch.equal(model.get_submodule(row.name).weight[kept], original[kept])


def test_freeze_during_the_ramp_says_so():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, schedule=Linear(0.0, 0.8, 0, 4))
    train(model, opt, range(2))
    with pytest.warns(UserWarning, match="frozen at step 2, before the schedule ends at step 4"):
        pruner.freeze()
    assert pruner.summary().sparsity == pytest.approx(0.4, abs=0.01)


def test_finalize_returns_a_plain_model():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt)
    train(model, opt, range(3))
    assert pruner.finalize() is model and pruner.finalize() is model
    assert not opt._optimizer_step_post_hooks and not pruner.attached
    for name, mask in pruner.masks().items():
        w = model.get_submodule(name).weight
        assert not w[~mask].view(torch.int32).any()  # +0, not -0
    step(model, opt, 3)
    assert model[4].weight.count_nonzero() > 2000
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.step()
    with pytest.raises(RuntimeError, match="finalized"):
        pruner.reattach(opt)


def test_moments_that_come_late_or_are_loaded_are_masked_too():
    model = net()
    opt = sgd(model.parameters(), momentum=0.9)
    pruner = attach(model, opt, sparsity=0.9)
    model[4].weight.requires_grad_(False)  # no momentum yet for this layer
    step(model, opt, 0)
    dense = copy.deepcopy(opt.state_dict())
    pruner.freeze()

    def masked(names):
        for name in names:
            mask = pruner.masks()[name]
            moment = opt.state[model.get_submodule(name).weight]["momentum_buffer"]
            assert not moment[~mask].any() and moment[mask].any()

    masked(["0", "2.0"])
    model[4].weight.requires_grad_(True)
    train(model, opt, range(1, 4))
    masked(["0", "2.0", "4"])
    opt.load_state_dict(dense)
    step(model, opt, 4)
    masked(["0", "2.0", "4"])
    assert all(set(state) == {"momentum_buffer"} for state in opt.state.values())


# Tensors that move


@pytest.mark.parametrize("frozen", [False, True])
def test_masks_follow_a_model_that_changes_dtype_or_memory(frozen):
    model = net()
    opt = sgd(model.parameters(), 1e-3)
    pruner = attach(model, opt, sparsity=0.9)
    step(model, opt, 0)
    if frozen:
        pruner.freeze()
    masks = pruner.masks()
    model.to(torch.float64)
    if frozen:
        train(model, opt, [1])
        assert same(pruner.masks(), masks)
    else:
        step(model, opt, 1)
        assert sum(pruner.flips().values()) < 200  # against the carried masks, not from scratch
    for row in pruner.summary().rows:
        assert row.selected == num_pruned(row.numel, 0.9)
    assert {b.state.thresholds.dtype for b in pruner._buckets} == {torch.float64}


def test_replaced_data_and_assigned_parameters_are_noticed():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9, freeze_at=2)
    model[4].weight.data = torch.randn(10, 288)
    step(model, opt, 0)
    kept, w = pruner.masks()["4"], model[4].weight
    assert w[kept].abs().min() >= w[~kept].abs().max()
    model.load_state_dict({n: p.clone() for n, p in net(1).state_dict().items()}, assign=True)
    step(model, opt, 1)
    with pytest.warns(UserWarning, match="has pruned already"):
        pruner.step()
    assert pruner.summary().zeros == pruner.summary().selected


def test_channels_last_weights_are_pruned_in_place():
    model = net().to(memory_format=torch.channels_last)
    plain = net()
    settings = {"sparsity": 0.9, "overrides": {"2.0": Keep(2, of=8)}}
    pruners = [attach(m, adam(m), **settings) for m in (model, plain)]
    for p in pruners:
        p.step()
        assert p.summary().rows[0].selected == num_pruned(216, 0.9)
        p.freeze()
    assert not model[2][0].weight.is_contiguous()
    assert same(*(p.masks() for p in pruners)) and same(weights(model), weights(plain))
    pruners[0].detach()
    again = attach(model, adam(model), **settings)
    again.load_state_dict(pruners[1].state_dict())
    assert same(again.masks(), pruners[0].masks())


def test_a_layer_that_was_replaced_after_attach_is_named_until_reattach():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    model[4] = torch.nn.Linear(model[4].in_features, model[4].out_features)
    sentence = "no longer in the model: 4; what has taken the place since attach is not pruned"
    for call in (pruner.summary, pruner.freeze, pruner.summary):
        with pytest.warns(UserWarning, match=sentence):
            call()
    assert model[4].weight.all()
    pruner.reattach(adam(model), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pruner.finalize() is model
        numel = model[4].weight.numel()
        assert pruner.summary().rows[-1].zeros == num_pruned(numel, 0.9)
    assert int((model[4].weight == 0).sum()) == num_pruned(numel, 0.9)


def test_changed_shape_is_refused():
    model = net()
    opt = adam(model)
    attach(model, opt)
    model[4].weight.data = torch.randn(10, 100)
    with pytest.raises(ValueError, match="4: the mask has shape .* attach anew"):
        opt.step()


# N:M


@pytest.mark.parametrize("keep", [Keep(2, of=8), Keep(1, of=4, v=2), Keep(1, of=4, layout="flat")])
def test_patterned_layers_shrink_and_freeze_like_the_others(keep):
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9, shrink=0.9, overrides={"2.0": keep}, freeze_at=3)
    before = weights(model)["2.0.weight"]
    opt.step()  # no gradients yet: the weights only shrink
    expected, kept = ops.nm_prune_with_mask(before, keep, 0.9)
    assert torch.equal(model[2][0].weight, expected)
    assert torch.equal(pruner.masks()["2.0"], kept)
    assert pruner.flips()["2.0"] == int((~kept).sum()) == int(576 * keep.sparsity)
    assert pruner.thresholds()["2.0"] == before[~kept].abs().max()
    train(model, opt, range(6))
    row = pruner.summary().rows[1]
    assert row.zeros == row.selected == int(576 * keep.sparsity)
    assert f"{keep.n}:{keep.of}" in str(pruner.summary())


def test_patterned_layer_obeys_found_inf():
    model = net()
    pruner = attach(model, sparsity=0.9, overrides={"2.0": Keep(2, of=8)})
    (bucket,) = pruner._buckets  # N:M and unstructured layers together
    bucket.set_ratio(1.0, 1.0)
    before, state = weights(model), bucket.state.state_dict()
    bucket.shrink(0.5, torch.ones(()))
    assert same(weights(model), before) and same(
        {k: v.nan_to_num() for k, v in bucket.state.state_dict().items()},
        {k: v.nan_to_num() for k, v in state.items()},
    )
    bucket.shrink(0.5, torch.zeros(()))
    assert bucket.state.flips[1] == 432 and not same(weights(model), before)
