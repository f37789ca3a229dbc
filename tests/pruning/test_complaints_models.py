"""What users of other pruning tools complain about, each complaint one test: from 11 on.

Each test is named by its number; the linked issue of another project stands above it.
"""

import copy
import io
import pickle
import warnings

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
    gradients,
    net,
    snapshot,
    train,
    unchanged,
)

# 11. `weight_orig` keys (pytorch#32899)


def test_11_checkpoints_load_strictly_both_ways():
    plain, model = net(), net(1)
    keys = list(plain.state_dict())
    opt = adam(model)
    pruner = attach(model, opt)
    train(model, opt, range(2))
    assert list(model.state_dict()) == keys
    assert [n for n, _ in model.named_parameters()] == keys
    plain.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(net(2).state_dict(), strict=True)
    train(model, opt, range(1))
    pruner.freeze()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert equal(bits(plain.state_dict()), bits(pruner.finalize().state_dict()))


# 12. deepcopy and pickle break (pytorch#37322)


def test_12_copies_after_backward():
    model = net()
    opt = adam(model)
    attach(model, opt, freeze_at=3)
    for seed in range(5):
        gradients(model, seed)
        for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert equal(bits(clone.state_dict()), bits(model.state_dict()))
            assert type(clone[0]) is nn.Conv2d
        opt.step()
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    file = io.BytesIO()
    torch.save((model, opt), file)
    file.seek(0)
    model2, opt2 = torch.load(file, weights_only=False)
    train(model2, opt2, [9])


# 13. Resume ignores masks (distiller#76)


@pytest.mark.parametrize("stop", [2, 5, 6, 9])
@pytest.mark.parametrize("method", ["iss-p", "iht"])
def test_13_interrupted_equals_uninterrupted(stop, method):
    def start(seed):
        model = net(seed)
        opt = torch.optim.AdamW(model.parameters(), 1e-2)
        settings = {"schedule": Cubic(0.2, 0.9, 1, 5), "freeze_at": 6, "overrides": {"4": 0.5}}
        return model, opt, attach(model, opt, method=method, **settings)

    model, opt, pruner = start(0)
    history = []
    pruner.on_step(lambda p: history.append((p.flips(), p.thresholds(), p.step_count)))
    train(model, opt, range(12))

    first, opt1, pruner1 = start(0)
    train(first, opt1, range(stop))
    file = io.BytesIO()
    torch.save({"m": first.state_dict(), "o": opt1.state_dict(), "p": pruner1.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    second, opt2, pruner2 = start(7)
    second.load_state_dict(saved["m"])
    opt2.load_state_dict(saved["o"])
    pruner2.load_state_dict(saved["p"])
    assert pruner2.step_count == stop and pruner2.frozen == (stop >= 6)
    assert equal(pruner2.masks(), pruner1.masks()) and pruner2.flips() == pruner1.flips()
    resumed = []
    pruner2.on_step(lambda p: resumed.append((p.flips(), p.thresholds(), p.step_count)))
    train(second, opt2, range(stop, 12))
    assert unchanged(snapshot(second, pruner2), snapshot(model, pruner))
    assert resumed == history[stop:]
    for a, b in zip(opt.state.values(), opt2.state.values(), strict=True):
        assert equal(bits(a), bits(b))


# 14. Cannot start from a sparse model (sparseml#145)


def test_14_training_goes_on_from_a_sparse_model():
    model = net()
    attach(model, adam(model), sparsity=0.7).finalize()
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    opt = adam(model, weight_decay=0.1)
    pruner = attach(model, opt, from_zeros=True)
    assert pruner.frozen
    before = bits(model.state_dict())
    train(model, opt, range(20))
    for name, mask in pruner.masks().items():
        weight = model.get_submodule(name).weight
        assert torch.equal(~mask, zeros[f"{name}.weight"]) and torch.equal(weight == 0, ~mask)
        assert not torch.equal(weight.detach().view(torch.int32), before[f"{name}.weight"])
    assert all(r.zeros == r.selected == num_pruned(r.numel, 0.7) for r in pruner.summary().rows)
    pruner.detach()
    again = attach(model, adam(model), from_zeros=True)
    again.load_state_dict(pruner.state_dict())
    assert again.frozen and equal(again.masks(), pruner.masks())


# 15. Final sparsity off (sparseml#1117)


@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.9, 0.95, 0.99, 1.0])
def test_15_final_count_is_exact_with_ties(sparsity):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 7), nn.Linear(7, 1))
    with torch.no_grad():
        model[0].weight.copy_((torch.randn(20, 30) * 2).round())  # many ties, many zeros
        model[1].weight.fill_(0.5)
    pruner = attach(model, sparsity=sparsity)
    before = {n: model.get_submodule(n).weight.detach().clone() for n in pruner.masks()}
    pruner.freeze()
    for row in pruner.summary().rows:
        k, mask = num_pruned(row.numel, sparsity), pruner.masks()[row.name]
        assert row.selected == k == int((~mask).sum())
        order = before[row.name].flatten().abs().sort(stable=True).indices[:k]
        assert not mask.flatten()[order].any()  # of equal magnitudes the first go first
    weight = model[1].weight
    assert int((weight == 0).sum()) == num_pruned(140, sparsity)
    assert weight.flatten()[num_pruned(140, sparsity) :].all()


# 18. Excludes ignored (nni#4815); tied weights processed once


def test_18_excluded_layers_are_those_of_a_dense_run():
    model, plain = net(), net()
    opt, other = adam(model), adam(plain)
    pruner = attach(model, opt, sparsity=0.9, exclude=["3", "re:4"])
    assert list(pruner.masks()) == ["0"]
    for seed in range(5):
        gradients(plain, seed)
        gradients(model, seed)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            p.grad = q.grad.clone()
        opt.step()
        other.step()
    actual, expected = bits(model.state_dict()), bits(plain.state_dict())
    assert [n for n in actual if not torch.equal(actual[n], expected[n])] == ["0.weight"]
    pruner.finalize()
    actual = bits(model.state_dict())
    assert all(torch.equal(actual[n], expected[n]) for n in actual if n != "0.weight")


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)
        self.last.weight = self.first.weight
        self.again = self.middle  # a whole module under a second name


def test_18_tied_weights_are_processed_once_and_reported_under_every_name():
    model = Tied()
    before = model.first.weight.detach().clone()
    pruner = attach(model, sparsity=0.5, shrink=0.5)
    pruner.step()
    chosen = torch.zeros(100, dtype=torch.bool)
    chosen[before.flatten().abs().sort(stable=True).indices[:50]] = True
    chosen = chosen.view(10, 10)
    assert torch.equal(model.first.weight, torch.where(chosen, before * 0.5, before))
    masks = pruner.masks()
    assert list(masks) == ["first", "last", "middle", "again"]
    assert torch.equal(masks["first"], masks["last"]) and torch.equal(masks["last"], ~chosen)
    summary = pruner.summary()
    assert (summary.numel, summary.selected) == (200, 100)
    assert [r.tied_to for r in summary.rows] == [None, "first", None, "middle"]
    assert "tied to first" in str(summary)


def test_18_tied_weights_with_two_targets():
    model = Tied()
    with pytest.raises(ValueError, match="first and last share one weight"):
        attach(model, overrides={"last": 0.5})
    assert list(attach(model, exclude="last").masks()) == ["middle", "again"]


# 19. Reported sparsity wrong (pytorch-lightning#13595)


@pytest.mark.parametrize("method", ["iss-p", "iht"])
def test_19_summary_equals_count_nonzero(method):
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9, method=method)
    with torch.no_grad():
        model[3].weight[0, :10] = 0
    for stage in range(3):
        if stage == 1:
            train(model, opt, range(2))
        elif stage == 2:
            pruner.freeze()
            with torch.no_grad():
                model[4].weight[pruner.masks()["4"]] = 0  # more zeros than the mask asks for
        summary = pruner.summary()
        for row in summary.rows:
            weight = model.get_submodule(row.name).weight
            assert row.zeros == weight.numel() - int(torch.count_nonzero(weight))
            assert row.selected == int((~pruner.masks()[row.name]).sum())
            assert f" {row.zeros} (" in str(summary) and f" {row.selected} (" in str(summary)
        total = sum(model[i].weight.numel() for i in (0, 3, 4))
        nonzero = sum(int(model[i].weight.count_nonzero()) for i in (0, 3, 4))
        assert summary.numel == total and summary.sparsity == (total - nonzero) / total
    assert summary.rows[2].zeros == 48 and summary.rows[2].selected == num_pruned(48, 0.9)


# 20. Parameters missing from the optimizer, late `add_param_group`


def test_20_missing_parameters_are_named_and_join_late():
    model = net()
    opt = torch.optim.Adam([model[0].weight, model[4].weight], 1e-2)
    with pytest.warns(UserWarning, match="1 weights to prune are not in the optimizer .*: 3;"):
        pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(2))
    assert pruner.masks()["3"].all() and pruner.summary().rows[1].note == "not in the optimizer"
    assert "not in the optimizer" in str(pruner.summary())
    before, masks = bits(model.state_dict())["3.weight"], pruner.masks()
    opt.add_param_group({"params": [model[3].weight], "lr": 0.0})
    train(model, opt, [2])
    assert pruner.summary().rows[1].selected == num_pruned(12 * 128, 0.9)
    kept = pruner.masks()["3"]
    assert torch.equal(model[3].weight.detach().view(torch.int32)[kept], before[kept])
    flipped = int((pruner.masks()["0"] ^ masks["0"]).sum())
    assert pruner.flips()["0"] == flipped < num_pruned(144, 0.9)  # its mask was carried over
    pruner.finalize()
    assert all(row.zeros == num_pruned(row.numel, 0.9) for row in pruner.summary().rows)


def test_20_layers_that_join_after_the_freeze_are_pruned_at_once():
    model = net()
    model[3].requires_grad_(False)
    opt = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # frozen weights are no mistake
        pruner = attach(model, opt, sparsity=0.9, freeze_at=2)
        train(model, opt, range(3))
    assert pruner.summary().rows[1].note == "requires_grad is False"
    assert model[3].weight.count_nonzero() == 12 * 128
    model[3].requires_grad_(True)
    opt.add_param_group({"params": list(model[3].parameters())})
    train(model, opt, range(3, 6))
    row = pruner.summary().rows[1]
    assert row.zeros == row.selected == num_pruned(12 * 128, 0.9) and row.note == ""
    assert not opt.state[model[3].weight]["exp_avg"][~pruner.masks()["3"]].any()
