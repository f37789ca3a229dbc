"""Units of several weights in the pruner: counts, tails, freeze, resume, optimizers, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import issp
from issp import Keep, Unit, attach, num_pruned
from issp.pruning.layer_choice import all_that_can
from issp.pruning.masked_layer import MaskedLayer
from issp.sr import builders, config
from tests.optim.twins import assert_twins, network, together, twins
from tests.pruning.networks import adam, assert_formats_agree, net, same, step, train, weights

pytestmark = pytest.mark.usefixtures("one_thread")

PAIRS = Unit(2, 2, tail="dense")


def kept_units(mask, unit):
    """Bool [O / v, I / c, kernel]; refuses a mask that cuts a unit."""
    rows, channels = mask.shape[:2]
    v, c = unit.v, unit.c
    units = mask.reshape(rows // v, v, channels // c, c, -1).permute(0, 2, 4, 1, 3).flatten(3)
    assert (units.all(3) == units.any(3)).all()
    return units.all(3)


def norms(weight, unit):
    """L1 norms of the units in float64, [O / v, I / c, kernel]."""
    rows, channels = weight.shape[:2]
    shape = (rows // unit.v, unit.v, channels // unit.c, unit.c, -1)
    return weight.detach().double().abs().reshape(shape).sum((1, 3))


@pytest.mark.parametrize("ratio", [0.5, 0.9, 0.95])
def test_the_units_of_the_smallest_norm_are_shrunk_and_counts_are_exact(ratio):
    model = net()
    before = weights(model)
    pruner = attach(model, adam(model), ratio, 0.5, unit=PAIRS)
    pruner.step()
    first, *pruned = pruner.summary().rows
    assert "stays dense: weight (8, 3, 3, 3) does not divide into units" in first.note
    assert same({"x": before["0.weight"]}, {"x": model[0].weight.detach()})
    assert str(pruner.summary()).count(f"{ratio:.4g} 2x2") == 3 and "2x2" in repr(pruner)
    for row, name in zip(pruned, ("2.0", "4"), strict=True):
        weight, mask = before[f"{name}.weight"], pruner.masks()[name]
        kept = kept_units(mask, PAIRS)
        assert row.selected == num_pruned(weight.numel() // 4, ratio) * 4 == (~mask).sum()
        sizes = norms(weight, PAIRS)
        assert sizes[~kept].max() <= sizes[kept].min() * (1 + 1e-6)
        after = model.get_submodule(name).weight.detach()
        assert torch.equal(after, torch.where(mask, weight, weight * 0.5))
        assert pruner.thresholds()[name] == weight[~mask].abs().max()


def test_a_pair_of_numbers_is_a_unit_and_patterns_and_zeros_stand_beside_it():
    model = net()
    overrides = {"0": 0.0, "2.0": Keep(4, of=8, v=4, c=2)}
    pruner = attach(model, adam(model), 0.9, unit=(2, 2), overrides=overrides)
    pruner.step()
    rows = pruner.summary().rows
    assert [row.unit for row in rows] == [None, None, Unit(2, 2)]
    assert rows[0].selected == 0 and rows[1].selected == 288
    kept = kept_units(pruner.masks()["2.0"], Unit(4, 2))
    assert (kept.sum(1) == 2).all()
    kept_units(pruner.masks()["4"], PAIRS)


def test_layers_that_a_unit_does_not_divide_are_refused_with_the_remedy():
    model = net()
    sentence = (
        r"0: weight \(8, 3, 3, 3\) does not divide into units .*Unit\(\.\.\., tail=\"dense\"\)"
    )
    with pytest.raises(ValueError, match=sentence):
        attach(model, adam(model), unit=(2, 2))
    grouped = nn.Sequential(nn.Conv2d(8, 8, 1, groups=4), nn.Conv2d(8, 8, 1))
    with pytest.raises(ValueError, match="v = 4 output rows would share positions across the 4"):
        attach(grouped, adam(grouped), unit=(4, 2))
    turned = nn.Sequential(nn.ConvTranspose2d(8, 8, 1))
    with pytest.raises(ValueError, match="has none there: prune its weights one by one"):
        attach(turned, adam(turned), unit=(4, 2), types=nn.ConvTranspose2d)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"unit": (2, 2), "pattern": Keep(1, of=2)}, "unit is .* beside pattern Keep.* v and c"),
        ({"unit": (2, 2), "from_zeros": True}, "from_zeros takes its masks .* drop unit"),
        ({"unit": PAIRS, "method": "assl"}, "assl prunes single weights: drop unit"),
        ({"unit": PAIRS, "method": "sls"}, "sls prunes single weights: drop unit"),
        ({"unit": PAIRS, "method": "dense"}, "dense prunes nothing: drop .* unit"),
        ({"unit": PAIRS, "overrides": {"*": Keep(1, of=2, tail="dense")}}, "unit has no effect"),
        ({"unit": (0, 2)}, r"Unit\(0, 2\): v and c must be at least 1"),
        ({"unit": (2, 2, 2)}, r"unit must be a pair of whole numbers .*, not \(2, 2, 2\)"),
        ({"unit": 16}, "unit must be a pair of whole numbers"),
        ({"unit": "16x2"}, "unit must be a pair of whole numbers"),
    ],
)
def test_what_has_no_meaning_is_refused(arguments, sentence):
    model = net()
    with pytest.raises((ValueError, TypeError), match=sentence):
        attach(model, adam(model), **arguments)


@pytest.mark.parametrize("method", ["iss-p", "iht", "iss-r", "iss-r-stale", "l1", "scratch", "srp"])
def test_methods_keep_units_whole(method):
    model = nn.Sequential(net(), nn.Linear(10, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    options = {"freeze_at": 4}
    if method == "srp":
        options["method"] = issp.methods.SRP(constrained=["2", "3"], seed=1)
    else:
        options["method"] = method
    opt = adam(model)
    pruner = attach(model, opt, 0.8, unit=PAIRS, **options)
    for number in range(6):
        step(nn.Sequential(model, nn.Linear(8, 10)), opt, number)
    assert pruner.frozen
    for name, mask in pruner.masks().items():
        if name != "0.0":
            kept = kept_units(mask, PAIRS)
            assert (~kept).sum() == num_pruned(kept.numel(), 0.8), name
            assert not model.get_submodule(name).weight[~mask].any(), name


@pytest.mark.parametrize("unit", [Unit(2, 2, "dense"), Unit(1, 4, "dense"), Unit(2, 1)], ids=str)
def test_channels_last_weights_have_the_same_units(unit):
    assert_formats_agree(unit=unit)


def test_interrupted_equals_uninterrupted_bitwise():
    schedule = issp.Cubic(0.0, 0.9, begin=0, end=5)
    whole, options = net(), {"unit": PAIRS, "schedule": schedule, "freeze_at": 6}
    whole_opt = adam(whole)
    straight = attach(whole, whole_opt, **options)
    train(whole, whole_opt, range(9))
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, **options)
    train(model, opt, range(4))
    saved = copy.deepcopy((model.state_dict(), opt.state_dict(), pruner.state_dict()))
    again = net(1)
    opt = adam(again)
    pruner = attach(again, opt, **options)
    for part, state in zip((again, opt, pruner), saved, strict=True):
        part.load_state_dict(state)
    train(again, opt, range(4, 9))
    assert same(weights(whole), weights(again)) and same(straight.masks(), pruner.masks())
    assert straight.frozen and straight.flips() == pruner.flips()


def test_a_state_of_single_weights_does_not_fit_and_loads_loosely():
    model = net()
    pruner = attach(model, adam(model), 0.9)
    pruner.step()
    saved = pruner.state_dict()
    assert saved["targets"]["2.0"] == "0.9"  # as before units
    pruner.detach()
    opt = adam(model)
    other = attach(model, opt, 0.9, unit=PAIRS)
    with pytest.raises(ValueError, match=r"sparsity 0.9, but here it is 0.9 in Unit\(v=2, c=2\)"):
        other.load_state_dict(saved)
    other.load_state_dict(saved, strict=False)
    for name in ("2.0", "4"):
        assert torch.equal(other.masks()[name], pruner.masks()[name])
    step(model, opt, 0)
    for name in ("2.0", "4"):
        kept_units(other.masks()[name], PAIRS)


def test_frozen_units_stay_zero_with_moments_and_average():
    model = net()
    opt = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
    ema = torch.optim.swa_utils.AveragedModel(model)
    pruner = attach(model, opt, 0.9, unit=PAIRS, ema=ema)
    for number in range(3):
        step(model, opt, number)
        ema.update_parameters(model)
    pruner.freeze()
    train(model, opt, range(10))
    for name in ("2.0", "4"):
        weight, mask = model.get_submodule(name).weight, pruner.masks()[name]
        kept_units(mask, PAIRS)
        average = ema.module.get_submodule(name).weight
        moments = [opt.state[weight][key] for key in ("exp_avg", "exp_avg_sq")]
        for x in (weight, average, *moments):
            assert not x[~mask].any(), name


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd", "sgd, momentum"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_the_optimizers_take_units_into_their_call(kind, last):
    def model():
        return network().to(memory_format=torch.channels_last) if last else network()

    pair = twins(kind, model=model, unit=(16, 2), freeze_at=3)
    together(*pair, 5)
    info = pair[1].opt.report[0]
    assert (info.fused, info.pruned, info.fallback_reason) == (True, 3, "")
    kept = kept_units(pair[1].pruner.masks()["2"], Unit(16, 2))
    assert (~kept).sum() == num_pruned(kept.numel(), 0.9)
    assert_twins(*pair, "after five steps")


def test_the_driver_reads_a_unit():
    section = config.Sparsity(unit=[16, 2])
    assert section.unit == config.Unit(v=16, c=2) == config.Sparsity(unit={"v": 16, "c": 2}).unit
    with pytest.raises(ValueError, match=r"write \[v, c\]"):
        config.Sparsity(unit=[16])
    with pytest.raises(ValueError, match="unit beside keep, .* give keep v and c"):
        config.Sparsity(unit=[16, 2], keep={"n": 2, "of": 4})
    with pytest.raises(ValueError, match="unit, but method sls prunes single weights: drop it"):
        config.Sparsity(unit=[16, 2], method="sls")
    with pytest.raises(ValueError, match="unit, but method dense prunes nothing"):
        config.Sparsity(unit=[16, 2], method="dense")
    with pytest.raises(ValueError, match="from_zeros keeps the zeros .* drop unit"):
        config.Sparsity(unit=[16, 2], from_zeros=True)
    given = config.Sparsity(unit={"v": 2, "c": 2, "tail": "dense"}, ratio=0.9)
    model = net()
    run = type("Run", (), {"sparsity": given})
    pruner = builders.pruner(run, model, adam(model), None)
    assert [row.unit for row in pruner.summary().rows] == [PAIRS] * 3
    assert builders.pruning_target(config.Keep(n=2, of=4, v=4, c=2)) == Keep(2, of=4, v=4, c=2)


def test_layers_that_train_sparse_share_the_rows_of_a_unit():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 8))
    pruner = attach(model, adam(model), 0.75, unit=(4, 2), overrides={"1": Keep(2, of=4)})
    pruner.step()
    layers = [MaskedLayer(x, pruner.masks()[x.name]) for x in pruner._buckets.layers]
    assert all_that_can(layers)[0] == {"0": 4, "1": 1}
