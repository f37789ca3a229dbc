"""What users of other pruning tools complain about, each complaint one test.

The numbers and the linked issues are those of the project's list of complaints.
"""

import copy
import io
import math
import pickle
import warnings

import pytest
import torch
from torch import nn

from issp import num_pruned
from issp.pruner import attach
from issp.schedules import Cubic


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 16, 12),
        nn.Linear(12, 4),
    )


def gradients(model, seed):
    rng = torch.Generator().manual_seed(seed)
    x, y = torch.randn(4, 2, 4, 4, generator=rng), torch.randn(4, 4, generator=rng)
    model.zero_grad()
    loss = (model(x) - y).square().mean()
    loss.backward()
    return loss


def train(model, opt, seeds):
    for seed in seeds:
        gradients(model, seed)
        opt.step()


def adam(model, **kwargs):
    return torch.optim.Adam(model.parameters(), 1e-2, **kwargs)


def bits(tensors):
    """A copy that compares NaN and signed zeros too."""
    return {n: t.detach().clone().view(torch.int32) for n, t in tensors.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def snapshot(model, pruner):
    return (
        bits(model.state_dict()),
        pruner.masks(),
        {n: str(x) for n, x in pruner.thresholds().items()},
        pruner.flips(),
        pruner.step_count,
    )


def unchanged(a, b):
    return equal(a[0], b[0]) and equal(a[1], b[1]) and a[2:] == b[2:]


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
    mine, theirs = bits(model.state_dict()), bits(plain.state_dict())
    assert [n for n in mine if not torch.equal(mine[n], theirs[n])] == ["0.weight"]
    pruner.finalize()
    assert all(torch.equal(bits(model.state_dict())[n], theirs[n]) for n in mine if n != "0.weight")


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


def test_18_tied_weights_with_two_wishes():
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
