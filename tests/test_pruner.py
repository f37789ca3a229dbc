"""The pruner: selection of layers, stages, counters, resume, moves between devices and dtypes."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from issp import Keep, num_pruned, ops
from issp.pruner import attach
from issp.schedules import Constant, Cubic, Linear


def net(seed=0, **kwargs):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.LayerNorm(6)),
        nn.Flatten(),
        nn.Linear(8 * 36, 10),
    ).to(**kwargs)


def step(model, opt, seed, zero=True):
    """One training step on data that the seed alone decides."""
    rng = torch.Generator().manual_seed(seed)
    p = next(model.parameters())
    x = torch.randn(4, 3, 6, 6, generator=rng).to(p)
    y = torch.randn(4, 10, generator=rng).to(p)
    opt.zero_grad()
    (model(x) - y).square().mean().backward()
    opt.step()


def train(model, opt, seeds):
    for seed in seeds:
        step(model, opt, seed)


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def adam(model, lr=1e-2):
    return torch.optim.Adam(model.parameters(), lr)


def sgd(params, lr=0.1, **kwargs):
    return torch.optim.SGD(params, lr, **kwargs)


# Selection of layers


def names(model=None, **kwargs):
    model = model or net()
    return list(attach(model, adam(model), **kwargs).masks())


def test_types_excludes_and_containers_choose_the_layers():
    assert names() == ["0", "2.0", "4"]
    assert names(types=nn.Linear) == ["4"]
    assert names(exclude="2") == ["0", "4"]  # a container stands for what is in it
    assert names(exclude=["re:2\\..*", "4.weight"]) == ["0"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"exclude": ["*mean*"]}, 'exclude: "\\*mean\\*" matches no module'),
        (
            {
                "exclude": [
                    "re:[",
                ]
            },
            "no regular expression",
        ),
        ({"overrides": {"tail": 0.5}}, 'overrides: "tail" matches no module'),
        ({"overrides": {"1": 0.5}}, 'overrides: "1" matches no pruned layer'),
        ({"overrides": {"4": 0.5}, "exclude": "4"}, 'overrides: "4" matches no pruned layer'),
        ({"overrides": {"4": 1.5}}, "sparsity is 1.5"),
        ({"sparsity": -0.1}, "sparsity is -0.1"),
        ({"sparsity": 0.9, "schedule": Constant(0.8)}, "give one of them"),
        ({"schedule": Cubic(0.0, 0.9, 0, 100), "freeze_at": 99}, "at least step 100"),
        ({"freeze_at": 0}, "freeze_at is 0"),
        ({"from_zeros": True, "freeze_at": 5}, "drop schedule and freeze_at"),
        ({"overrides": {"0": Keep(2, of=4)}}, "0: weight .* m = 4 input channels"),
        ({"method": "magic"}, "use iss-p, iht"),
        ({"method": "srp"}, "not available .* use iss-p, iht"),
    ],
)
def test_bad_arguments_are_refused_and_leave_everything_alone(arguments, sentence):
    model = net()
    opt, before = adam(model), weights(model)
    with pytest.raises(ValueError, match=sentence):
        attach(model, opt, **arguments)
    assert not opt._optimizer_step_post_hooks and same(weights(model), before)


def test_wrong_kinds_are_type_errors():
    model = net()
    with pytest.raises(TypeError, match="torch optimizer"):
        attach(model, "adam")
    with pytest.raises(TypeError, match="ema must be"):
        attach(model, adam(model), ema=3)


def test_parametrized_weight_is_refused_by_name():
    model = net()
    nn.utils.parametrizations.weight_norm(model[4])
    with pytest.raises(ValueError, match="4 has no parameter `weight`"):
        attach(model, adam(model))
    assert names(model, exclude="4") == ["0", "2.0"]


def test_overrides_the_last_match_wins():
    model = net()
    pruner = attach(model, adam(model), 0.9, overrides={"*": 0.5, "2.*": 0.7})
    step(model, pruner._roster.optimizers[0], 0)
    counts = {row.name: row.selected for row in pruner.summary().rows}
    sizes = {"0": (216, 0.5), "2.0": (576, 0.7), "4": (2880, 0.5)}
    assert counts == {name: num_pruned(*size) for name, size in sizes.items()}


def test_names_are_those_inside_wrappers():
    model = net()
    wrapped = nn.DataParallel(model)
    pruner = attach(wrapped, adam(model))
    assert list(pruner.masks()) == ["0", "2.0", "4"]
    assert pruner.finalize() is wrapped


# The step


def test_one_step_is_the_op_after_the_optimizer():
    model, twin = net(), net()
    opt, plain = adam(model), adam(twin)
    pruner = attach(model, opt, sparsity=0.8, shrink=0.9)
    for seed in range(3):
        step(model, opt, seed)
        step(twin, plain, seed)
        expected = [twin[0].weight, twin[2][0].weight, twin[4].weight]
        if seed == 0:
            state = ops.ShrinkState(expected, k=[num_pruned(w.numel(), 0.8) for w in expected])
        ops.soft_shrink_(expected, state, 0.9)
        assert same(weights(model), weights(twin))
    assert list(pruner.flips().values()) == state.flips.tolist()
    assert list(pruner.thresholds().values()) == state.thresholds.tolist()
    assert all(torch.equal(*m) for m in zip(pruner.masks().values(), state.masks(), strict=True))


def test_gradient_accumulation_and_closures_count_optimizer_steps():
    model = net()
    opt = sgd(model.parameters())
    pruner = attach(model, opt)
    for _ in range(4):
        model(torch.randn(1, 3, 6, 6)).sum().backward()
    assert pruner.step_count == 0
    opt.step()
    assert pruner.step_count == 1

    def closure():
        opt.zero_grad()
        loss = model(torch.randn(1, 3, 6, 6)).sum()
        loss.backward()
        return loss

    opt.step(closure)
    lbfgs_like = torch.optim.LBFGS([model[4].bias], max_iter=3)
    lbfgs_like.step(closure)
    assert pruner.step_count == 2


def test_by_hand_without_optimizer_or_hook():
    model = net()
    pruner = attach(model, sparsity=0.9)
    assert not pruner.attached
    pruner.step()
    pruner.step(found_inf=torch.ones(()))
    assert pruner.step_count == 1 and pruner.flips()["4"] == num_pruned(2880, 0.9)
    unhooked = attach(model, adam(model), hook=False)
    step(model, unhooked._roster.optimizers[0], 0)
    assert unhooked.step_count == 0


def test_several_optimizers_shrink_their_own_weights():
    model = net()
    first = sgd([model[0].weight, model[2][0].weight], momentum=0.9)
    second = adam(model[4])
    pruner = attach(model, [first, second], sparsity=0.9, freeze_at=3)
    model(torch.randn(2, 3, 6, 6)).square().mean().backward()
    first.step()
    assert [bool(f) for f in pruner.flips().values()] == [True, True, False]
    second.step()
    assert pruner.flips()["4"] == num_pruned(2880, 0.9) and pruner.step_count == 1
    for _ in range(2):
        first.step()
        second.step()
    assert pruner.frozen and pruner.summary().zeros == pruner.summary().selected
    for opt, p in ((first, model[0].weight), (second, model[4].weight)):
        moment = opt.state[p].get("momentum_buffer", opt.state[p].get("exp_avg"))
        assert (moment[p == 0] == 0).all() and moment.any()


def test_schedule_counts_follow_the_ratio_and_overrides_scale():
    model = net()
    opt = adam(model)
    schedule = Linear(0.0, 0.8, begin=0, end=4)
    pruner = attach(model, opt, schedule=schedule, overrides={"4": 0.4})
    for t in range(1, 7):
        step(model, opt, t)
        selected = {row.name: row.selected for row in pruner.summary().rows}
        ratio = schedule(t)
        assert selected["0"] == num_pruned(216, ratio)
        assert selected["4"] == num_pruned(2880, 0.4 if t >= 4 else 0.4 * (ratio / 0.8))


def test_schedule_counts_have_no_rounding_error_of_their_own():
    layer, schedule = nn.Linear(20, 10), Linear(0.0, 0.7, begin=0, end=4)
    pruner = attach(layer, schedule=schedule)
    pruner.step()
    assert num_pruned(200, 0.7 * (schedule(1) / 0.7)) != num_pruned(200, schedule(1))
    assert pruner.flips()[""] == num_pruned(200, schedule(1))


def test_k_is_written_only_when_it_changes(monkeypatch):
    calls = []
    plain = ops.ShrinkState.set_k
    monkeypatch.setattr(ops.ShrinkState, "set_k", lambda s, k: (calls.append(k), plain(s, k))[1])
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, schedule=Linear(0.0, 0.8, begin=0, end=3))
    calls.clear()
    train(model, opt, range(8))
    assert len(calls) == 3 and pruner.step_count == 8
    slow = attach(net(), schedule=Linear(0.0, 0.8, begin=0, end=10**6))
    calls.clear()
    for _ in range(8):
        slow.step()
    assert calls == [[1, 1, 1]]  # the ratio grows, its counts do not


def test_callbacks_see_every_step_until_removed():
    model = net()
    opt, seen = adam(model), []
    pruner = attach(model, opt)
    stop = pruner.on_step(lambda p: seen.append((p.step_count, p.flips()["4"])))
    train(model, opt, range(2))
    stop()
    step(model, opt, 2)
    assert [t for t, _ in seen] == [1, 2] and seen[0][1] == num_pruned(2880, 0.95)


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
    assert {g.state.thresholds.dtype for g in pruner._roster.groups} == {torch.float64}


def test_replaced_data_and_assigned_parameters_are_found():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9, freeze_at=2)
    model[4].weight.data = torch.randn(10, 288)
    step(model, opt, 0)
    kept, w = pruner.masks()["4"], model[4].weight
    assert w[kept].abs().min() >= w[~kept].abs().max()
    model.load_state_dict({n: p.clone() for n, p in net(1).state_dict().items()}, assign=True)
    step(model, opt, 1)
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
    again = attach(model, adam(model), **settings)
    again.load_state_dict(pruners[1].state_dict())
    assert same(again.masks(), pruners[0].masks())


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
    group = next(g for g in pruner._roster.groups if g.patterned)
    group.set_ratio(1.0, 1.0)
    before, state = weights(model), group.state.state_dict()
    group.shrink(0.5, torch.ones(()))
    assert same(weights(model), before) and same(
        {k: v.nan_to_num() for k, v in group.state.state_dict().items()},
        {k: v.nan_to_num() for k, v in state.items()},
    )
    group.shrink(0.5, torch.zeros(()))
    assert group.state.flips.item() == 432 and not same(weights(model), before)


# Copies, hooks, state


def test_copies_are_independent_and_ask_for_reattach():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(2))
    copied = copy.deepcopy(pruner)
    with pytest.warns(UserWarning, match="call pruner.reattach"):
        assert str(copied.summary()) == str(pruner.summary())
    copied.reattach()
    assert copied.attached
    other = copied._model
    train(other, copied._roster.optimizers[0], range(2, 5))
    train(model, opt, range(2, 5))
    assert other is not model and same(weights(other), weights(model))
    assert same(copied.masks(), pruner.masks()) and copied.step_count == pruner.step_count == 5


def test_pickled_with_its_model_and_optimizer():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(2))
    model2, opt2, pruner2 = pickle.loads(pickle.dumps((model, opt, pruner)))
    pruner2.reattach(opt2)
    train(model, opt, range(2, 4))
    train(model2, opt2, range(2, 4))
    assert same(weights(model), weights(model2)) and pruner2.step_count == 4


def test_rebuilt_optimizer_is_noticed_and_reattached():
    model = net()
    pruner = attach(model, adam(model), sparsity=0.9)
    rebuilt = adam(model)
    with pytest.warns(UserWarning, match="without the pruner's hook"):
        step(model, rebuilt, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, rebuilt, 1)  # said once
        assert pruner.step_count == 0
        pruner.reattach(rebuilt)
        step(model, rebuilt, 2)
    assert pruner.step_count == 1
    other = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="no weight to prune is trained"):
        pruner.reattach(adam(other))
    step(model, rebuilt, 3)
    assert pruner.step_count == 2


def test_reattach_to_a_copied_model():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(3))
    masks = pruner.masks()
    model2, opt2 = copy.deepcopy((model, opt))
    with pytest.raises(ValueError, match="of a copied model"):
        pruner.reattach(opt2)
    pruner.reattach(opt2, model2)
    assert same(pruner.masks(), masks)
    before = weights(model)
    step(model2, opt2, 3)
    assert same(weights(model), before) and pruner.step_count == 4
    assert pruner.finalize() is model2
    with pytest.raises(ValueError, match="no layer 0 with"):
        attach(net(), sparsity=0.9).reattach(model=nn.Sequential(nn.Linear(2, 2)))


def test_detach_stops_and_reattach_goes_on():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt)
    pruner.detach()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(model, opt, 0)
        pruner.summary()
    assert pruner.step_count == 0
    pruner.reattach()
    step(model, opt, 1)
    assert pruner.step_count == 1


def test_dropped_pruners_are_freed_and_never_disturb_a_step():
    model = net()
    freed = weakref.ref(attach(model, adam(model)))
    opt = adam(net())
    opt.register_step_post_hook(lambda *_: gc.collect())
    opt.step()
    assert freed() is None


def test_finalize_from_within_a_step():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt)
    pruner.on_step(lambda p: p.finalize())
    opt.register_step_post_hook(lambda *_: None)  # torch goes on through its table of hooks
    train(model, opt, range(2))
    assert pruner.step_count == 1 and pruner.frozen


def checkpoint(model, opt, pruner):
    file = io.BytesIO()
    torch.save([model.state_dict(), opt.state_dict(), pruner.state_dict()], file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_state_is_refused_when_it_belongs_elsewhere():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    step(model, opt, 0)
    state = checkpoint(model, opt, pruner)[2]

    def refused(sentence, state=state, strict=True, **kwargs):
        fresh = net()
        other = attach(fresh, adam(fresh), **kwargs)
        with pytest.raises(ValueError, match=sentence):
            other.load_state_dict(state, strict=strict)
        assert other.step_count == 0 and all(m.all() for m in other.masks().values())

    refused("for layer 0 the sparsity 0.9, but here it is 0.8", sparsity=0.8)
    refused("method iss-p, but here it is iht", sparsity=0.9, method="iht")
    refused("shrink 0.95, but here it is 0.5", sparsity=0.9, shrink=0.5)
    refused("freeze_at None, but here it is 9", sparsity=0.9, freeze_at=9)
    refused("schedule None, but here it is Constant", schedule=Constant(0.9))
    refused("for layer 4 the sparsity 0.9, but here it is None", sparsity=0.9, exclude="4")
    refused("layer 4, which is not pruned here", strict=False, exclude="4")
    refused("lacks .*layers", state={"version": 1})
    refused("has version 2", state={**state, "version": 2}, strict=False)
    layer = state["layers"]["4"]
    for damage, sentence in (
        ({"mask": layer["mask"][:-1]}, "mask of 4"),
        ({"k": 99999}, "k of 4"),
        ({"shape": [10, 287]}, "shape \\(10, 287\\) for 4"),
    ):
        damaged = {**state, "layers": {**state["layers"], "4": {**layer, **damage}}}
        refused(sentence, state=damaged, sparsity=0.9)
    relaxed = net()
    other = attach(relaxed, adam(relaxed), sparsity=0.5)
    other.load_state_dict(state, strict=False)
    assert other.step_count == 1 and same(other.masks(), pruner.masks())


def test_one_op_call_per_step(monkeypatch):
    calls = []
    plain = ops.soft_shrink_
    monkeypatch.setattr(ops, "soft_shrink_", lambda *a: (calls.append(len(a[0])), plain(*a)))
    model = net()
    opt = adam(model)
    attach(model, opt)
    train(model, opt, range(2))
    assert calls == [3, 3]
