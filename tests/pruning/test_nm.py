"""N:M targets of the pruner: tails, one op call beside unstructured layers, freeze, resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import issp
from issp import Keep, attach, ops
from issp.sr import builders, config
from tests.optim.twins import assert_twins, network, together, twins
from tests.pruning.networks import adam, assert_formats_agree, net, same, step, train, weights
from tests.sr.networks import small_cat, small_edsr, small_swinir

pytestmark = pytest.mark.usefixtures("one_thread")

DENSE = Keep(2, of=8, tail="dense")


def groups_of(weight, keep):
    """Non-zeros of every group of an [O, I, ...] weight, for v = 1."""
    return (weight.detach() != 0).unflatten(1, (-1, keep.of)).sum(2)


# Tails


def test_a_pattern_that_does_not_divide_a_layer_names_it_its_shape_and_the_remedy():
    model = net()
    sentence = r"0: weight \(8, 3, 3, 3\) does not divide .* m = 8 .*tail=\"dense\".* exclude="
    with pytest.raises(ValueError, match=sentence):
        attach(model, adam(model), pattern=Keep(2, of=8))
    with pytest.raises(
        ValueError, match="no layer to prune: 0, as all others, stays dense: weight"
    ):
        attach(model, adam(model), pattern=Keep(1, of=7, tail="dense"))


def test_a_dense_tail_stays_dense_and_says_why():
    model = net()
    opt = adam(model)
    before = weights(model)
    pruner = attach(model, opt, pattern=DENSE, freeze_at=3)
    twin = net()
    twin_opt = adam(twin)
    other = attach(twin, twin_opt, pattern=Keep(2, of=8), exclude="0", freeze_at=3)
    train(model, opt, range(5))
    train(twin, twin_opt, range(5))
    assert same(weights(model), weights(twin))  # as if the layer had been excluded
    row = pruner.summary().rows[0]
    assert (row.selected, row.zeros, row.flips) == (0, 0, 0)
    assert "stays dense: weight (8, 3, 3, 3) does not divide" in row.note
    assert "stays dense" in str(pruner.summary()) and "stays dense" not in str(other.summary())
    assert pruner.masks()["0"].all() and pruner.thresholds()["0"] != pruner.thresholds()["0"]
    pruner.finalize()
    assert not (model[0].weight == 0).any() and not torch.equal(before["0.weight"], model[0].weight)
    for layer in (model[2][0], model[4]):
        assert (groups_of(layer.weight, DENSE) == 2).all()


def test_a_dense_tail_is_no_reason_to_look_for_newly_trainable_layers(monkeypatch):
    model = net()
    pruner = attach(model, adam(model), pattern=DENSE)
    monkeypatch.setattr(type(pruner._buckets), "_owners", lambda self: pytest.fail("looked"))
    pruner.step()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"pattern": DENSE, "sparsity": 0.9}, "sparsity is 0.9 beside pattern Keep"),
        ({"pattern": Keep(1, of=2), "overrides": {"0": 0.5, "2.0": 2.0}}, "sparsity is 2.0"),
    ],
)
def test_contradictions_are_refused(arguments, sentence):
    model = net()
    with pytest.raises(ValueError, match=sentence):
        attach(model, adam(model), **arguments)


def test_unknown_tail_is_refused():
    with pytest.raises(ValueError, match='tail="loose".* use "error" or "dense"'):
        Keep(1, of=4, tail="loose")
    assert repr(DENSE) == "Keep(n=2, of=8, v=1, layout='channels')"  # states compare targets


def test_overrides_stand_beside_the_pattern():
    model = net()
    pruner = attach(model, adam(model), pattern=Keep(2, of=8), overrides={"0": 0.5})
    pruner.step()
    rows = pruner.summary().rows
    assert [row.target for row in rows] == [0.5, Keep(2, of=8), Keep(2, of=8)]
    assert [row.selected for row in rows] == [108, 432, 2160]


def test_a_schedule_lets_the_pattern_wait():
    model = net()
    opt = adam(model)
    schedule = issp.Linear(0.0, 0.75, begin=2, end=4)
    pruner = attach(model, opt, pattern=DENSE, schedule=schedule)
    train(model, opt, range(2))
    assert pruner.summary().selected == 0 and pruner.thresholds()["4"] == 0
    train(model, opt, range(1))
    assert pruner.summary().rows[2].selected == 2160


# One call


def test_all_layers_share_one_call(monkeypatch):
    model = net()
    calls = []
    original = ops.pruning._soft_shrink
    monkeypatch.setattr(
        ops.pruning, "_soft_shrink", lambda *args: (calls.append(args), original(*args))
    )
    pruner = attach(model, adam(model), sparsity=0.9, overrides={"2.0": Keep(2, of=8, v=2)})
    pruner.step()
    assert len(pruner._buckets) == len(calls) == 1
    assert calls[0][-1] == [0, 0, 0, 0, 2, 8, 2, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd, momentum"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_optimizers_take_patterns_into_their_call(kind, last):
    def model():
        return network().to(memory_format=torch.channels_last) if last else network()

    overrides = {"0": Keep(1, of=16), "2": Keep(4, of=64, v=16, c=2)}
    pair = twins(kind, model=model, overrides=overrides, freeze_at=3)
    together(*pair, 5)
    info = pair[1].opt.report[0]
    assert (info.fused, info.pruned, info.fallback_reason) == (True, 3, "")
    assert int(pair[1].pruner.masks()["2"].sum()) == 64 * 64 * 9 // 16


def test_a_weight_without_gradient_leaves_the_pattern_to_the_hook():
    pair = twins("adam", overrides={"0": Keep(1, of=16)})
    for twin in pair:
        twin.model[2].weight.requires_grad_(False)
    together(*pair, 2)
    assert "shrunk after the update" in pair[1].opt.report[0].fallback_reason


# Memory


@pytest.mark.parametrize(
    "keep",
    [*(Keep(2, of=8, v=2), Keep(1, of=4), Keep(3, of=4, v=8)), Keep(2, of=4, v=4, c=2)],
    ids=str,
)
def test_channels_last_weights_have_the_same_groups(keep):
    assert_formats_agree(overrides={"2.0": keep})


def test_flat_groups_follow_the_memory():
    model = net().to(memory_format=torch.channels_last)
    before = model[2][0].weight.detach().clone()
    keep = Keep(1, of=12, layout="flat")
    pruner = attach(model, adam(model), shrink=0.0, sparsity=0.9, overrides={"2.0": keep})
    pruner.step()
    laid = before.permute(0, 2, 3, 1).contiguous()
    expected = ops.nm_prune(laid, keep).permute(0, 3, 1, 2)
    assert torch.equal(model[2][0].weight, expected)


def test_a_weight_in_another_order_is_refused_by_name():
    model = net()
    model[4].weight = nn.Parameter(model[4].weight.detach().t().contiguous().t())
    with pytest.raises(ValueError, match=r"4: its weight is neither .* weight.contiguous\(\)"):
        attach(model, adam(model), pattern=DENSE)
    attach(model, adam(model), sparsity=0.9, overrides={"2.0": Keep(2, of=8)})


# Freezing, saving


def mixed(model, opt, **more):
    overrides = {"2.0": Keep(2, of=8, v=2), "4": Keep(1, of=36, layout="flat")}
    return attach(model, opt, sparsity=0.9, overrides=overrides, **more)


def test_interrupted_equals_uninterrupted_bitwise():
    whole = net()
    whole_opt = adam(whole)
    straight = mixed(whole, whole_opt, freeze_at=6)
    train(whole, whole_opt, range(9))
    model = net()
    opt = adam(model)
    pruner = mixed(model, opt, freeze_at=6)
    train(model, opt, range(4))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict()))
    again = net(1)
    opt = adam(again)
    pruner = mixed(again, opt, freeze_at=6)
    for part, state in zip((again, opt, pruner), saved, strict=True):
        part.load_state_dict(state)
    train(again, opt, range(4, 9))
    assert same(weights(whole), weights(again)) and same(straight.masks(), pruner.masks())
    assert straight.frozen and straight.flips() == pruner.flips()


def test_frozen_groups_stay_zero_with_moments_and_average():
    model = net()
    opt = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model)
    pruner = mixed(model, opt, ema=ema)
    for number in range(3):
        step(model, opt, number)
        ema.update_parameters(model)
    pruner.freeze()
    masks = pruner.masks()
    train(model, opt, range(20))
    assert same(masks, pruner.masks())
    for name, average in ((n, ema.module.get_submodule(n).weight) for n in masks):
        weight = model.get_submodule(name).weight
        moments = [opt.state[weight][key] for key in ("exp_avg", "exp_avg_sq")]
        for x in (weight, average, *moments):
            assert not x[~masks[name]].any(), name
        assert (weight[masks[name]] != 0).all()


def test_masks_from_elsewhere_prune_any_number_of_a_patterned_weight():
    model = net()
    with torch.no_grad():
        model[2][0].weight.view(-1)[:100] = 0
    opt = issp.optim.SGD(model.parameters(), 0.1)
    pruner = attach(model, opt, pattern=DENSE, from_zeros=True)
    train(model, opt, range(3))
    assert pruner.summary().rows[1].selected == pruner.summary().rows[1].zeros == 100
    again = attach(copy.deepcopy(model), pattern=DENSE)
    again.load_state_dict(pruner.state_dict(), strict=False)
    assert same(again.masks(), pruner.masks())


def test_a_ratio_becomes_a_pattern_when_loaded_loosely():
    model = net()
    pruner = attach(model, adam(model), sparsity=0.9)
    pruner.step()
    saved = pruner.state_dict()
    saved["layers"] = {name: saved["layers"][name] for name in ("2.0", "4")}
    pruner.detach()
    opt = issp.optim.Adam(model.parameters(), 1e-2)
    other = attach(model, opt, pattern=DENSE)
    other.load_state_dict(saved, strict=False)
    opt.found_inf = torch.ones(1)
    before = weights(model)
    step(model, opt, 0)  # skipped, before any step has set the pattern's count
    assert same(before, weights(model))
    opt.found_inf = torch.zeros(1)
    step(model, opt, 1)
    assert other.summary().rows[2].selected == 2160


def test_driver_configuration_has_a_tail():
    section = config.Keep(n=2, of=4, tail="dense")
    assert builders.pruning_target(section) == Keep(2, of=4, tail="dense")
    assert builders.pruning_target(0.5) == 0.5


# Networks


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, issp.optim.Adam], ids=["torch", "issp"])
@pytest.mark.parametrize("make", [small_edsr, small_swinir, small_cat], ids=lambda f: f.__name__)
def test_networks_train_in_patterns(make, optimizer):
    torch.manual_seed(0)
    model = make()
    opt = optimizer(model.parameters(), 1e-3)
    keep = Keep(2, of=4, tail="dense")
    pruner = attach(model, opt, pattern=keep, freeze_at=3)
    x, losses = torch.rand(1, 3, 16, 16), []
    for _ in range(5):
        opt.zero_grad()
        y = model(x)
        loss = (y - torch.full_like(y, 0.5)).abs().mean()
        loss.backward()
        opt.step()
        losses.append(loss.item())
    rows = pruner.summary().rows
    pruned = [row for row in rows if not row.note]
    assert len(pruned) > 2 and any(row.note.startswith("stays dense") for row in rows)
    for row in pruned:
        weight = model.get_submodule(row.name).weight
        assert (groups_of(weight, keep) <= 2).all() and row.zeros >= row.selected == row.numel // 2
    assert losses[-1] < losses[0]  # NaN fails as well


def test_twins_have_the_same_reports():
    pair = twins("adam", overrides={"2": Keep(2, of=16, tail="dense")}, freeze_at=2)
    together(*pair, 3)
    assert_twins(*pair, "after three steps")
