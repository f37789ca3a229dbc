"""The driver with every method: budgets, zeros at the end, a break in either stage."""

import pytest
import torch

import issp
from issp.pruning.methods import METHODS
from issp.sr import config
from issp.sr.interrupt import Interrupted
from issp.sr.train import train
from tests.asserts import assert_bitwise_equal
from tests.sr.runs import FREEZE, TOTAL, draw_photos, log, run, stop_at, tree_of


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return draw_photos(tmp_path_factory.mktemp("photos"))


def settings(name, photos, root):
    tree = tree_of(photos, root)
    ratio = {} if name == "dense" else {"ratio": 0.8}
    tree["sparsity"] = {"method": name, "freeze_iter": FREEZE, **ratio}
    if name == "sls":  # of 8 features; the cost is high enough for 6 iterations
        tree["sparsity"]["options"] = {"of": 8, "weight": 1.0, "epoch": 2, "lr": 0.3}
    return tree


@pytest.mark.sampled
@pytest.mark.parametrize("at", [FREEZE - 2, FREEZE + 2])
@pytest.mark.parametrize("name", METHODS)
def test_a_break_changes_no_bit(name, at, photos, tmp_path, monkeypatch):
    whole, folder = run(settings(name, photos, tmp_path / "whole"))
    tree = settings(name, photos, tmp_path / "broken")
    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_at(patch, at)
        run(tree)
    resumed, _ = run(tree, resume=True)
    for (key, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert_bitwise_equal(b, a, f"{name}: {key}")
    rows = log(folder, "iteration", "stage")
    assert {stage for _, stage in rows} == {"pruning", "fine-tuning"}, "two stages for every method"
    assert rows[-1][0] == TOTAL


@pytest.mark.parametrize("name", [n for n in METHODS if METHODS[n].prunes and n != "sls"])
def test_the_saved_network_has_the_zeros_and_packs(name, photos, tmp_path):
    _, folder = run(settings(name, photos, tmp_path), train__ema_decay=0.0)
    model = issp.load(folder / "models" / "net_g_latest.safetensors").eval()
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            zeros = int((module.weight == 0).sum())
            assert zeros == issp.num_pruned(module.weight.numel(), 0.8), layer
    check_pack(model)


def test_sls_saves_its_patterns_within_the_budget_and_packs(photos, tmp_path):
    _, folder = run(settings("sls", photos, tmp_path), train__ema_decay=0.0)
    model = issp.load(folder / "models" / "net_g_latest.safetensors").eval()
    kept = {}
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            counts = (module.weight != 0).sum(1).unique().tolist()  # 8 inputs: one group
            assert len(counts) == 1, layer
            kept[layer] = counts[0]
    assert (kept.pop("conv_first"), kept.pop("conv_last")) == (3, 8), "they stay dense"
    share = {layer: 4 if layer == "upsample.0" else 1 for layer in kept}  # of the MACs
    assert sum(kept[x] / 8 * share[x] for x in kept) <= 0.2 * sum(share.values())
    check_pack(model)


def test_uniform_sls_is_a_pattern_of_the_configuration(photos, tmp_path):
    tree = settings("sls", photos, tmp_path)
    tree["sparsity"] = {"method": "sls", "freeze_iter": FREEZE, "keep": {"n": 3, "of": 8}}
    model, _ = run(tree, train__ema_decay=0.0)
    kept = (model.upsample[0].weight != 0).sum(1)
    assert kept.unique().tolist() == [3]
    assert int((model.conv_last.weight == 0).sum()) == 0


def check_pack(model):
    x = torch.rand(1, 3, 12, 12)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(issp.pack(model, example=x)(x), expected, rtol=1e-4, atol=1e-4)


def test_scratch_begins_with_an_average_of_its_own_weights(photos, tmp_path):
    tree = settings("scratch", photos, tmp_path)
    config.set_key(tree, "train.optim_g.lr", 1e-30)
    config.set_key(tree, "train.scheduler.milestones", [])
    tree["val"]["val_freq"] = 100
    average = train(config.parse(tree), quiet=True)
    config.set_key(tree, "train.ema_decay", 0.0)
    config.set_key(tree, "name", "without")
    model = train(config.parse(tree), quiet=True)
    for (key, a), b in zip(model.state_dict().items(), average.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, msg=key)
