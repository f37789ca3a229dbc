"""SLS: units, scores and budget; what every method must do, for its own counts."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import issp
from issp import methods, ops
from issp.nn.layers import NMConv2d
from issp.nn.selection import select
from issp.pruning.methods.priority_scores import PriorityScores
from tests.asserts import assert_bitwise_equal
from tests.pruning.methods.runs import batch, network, train, weights

FREEZE, EPOCH = 24, 5
COVERED = ["blocks.0.conv1", "blocks.0.conv2", "blocks.1.conv1", "blocks.1.conv2", "after"]
QUICK = {"of": 8, "epoch": EPOCH, "lr": 0.05, "weight": 1e-4}
LEARNED, UNIFORM = {"sparsity": 0.7}, {"pattern": issp.Keep(2, of=8)}


def attached(model, kind=torch.optim.Adam, options=None, **arguments):
    optimizer = kind(model.parameters(), lr=1e-2)
    arguments = {"freeze_at": FREEZE, **(arguments or LEARNED)}
    method = methods.SLS(**{**QUICK, **(options or {})})
    return optimizer, issp.attach(model, optimizer, method=method, **arguments)


def numbers(pruner):
    """N of each covered layer, as the masks have it; each must be N of 8 in every group."""
    found = {}
    for name in COVERED:
        kept = pruner.masks()[name].sum(1)  # 8 input channels: one group
        assert kept.min() == kept.max(), name
        found[name] = int(kept.max())
    return found


def magnitude_masks(model, n):
    return {
        name: ops.nm_prune_with_mask(weights(model)[name].detach().contiguous(), n)[1]
        for name in COVERED
    }


# What the mask is.


@pytest.mark.parametrize("arguments", [LEARNED, UNIFORM])
def test_the_mask_keeps_n_of_every_group_at_every_step_and_the_forward_uses_it(arguments):
    model = network()
    optimizer, pruner = attached(model, **arguments)
    seen = set()
    for step in range(FREEZE + 3):
        train(model, optimizer, 1, pruner, first=step)
        found = numbers(pruner)
        assert {n: f"keeps {k} of 8" for n, k in found.items()} == pruner.method.notes()
        seen |= set(found.values())
        plain = network()
        plain.load_state_dict(model.state_dict())
        for name in COVERED:
            weights(plain)[name].data.mul_(pruner.masks()[name])
        assert_bitwise_equal(model(batch(step)), plain(batch(step)), str(step))
    assert seen == {2} if arguments is UNIFORM else {8, 2} <= seen


def test_uniform_sls_keeps_the_largest_magnitudes_of_each_epoch():
    model = network()
    optimizer, pruner = attached(model, **UNIFORM)
    expected, changes = magnitude_masks(model, issp.Keep(2, of=8)), 0
    for step in range(1, FREEZE + 3):
        train(model, optimizer, 1, pruner, first=step)
        before = expected
        if step % EPOCH == 0 and step < FREEZE:
            expected = magnitude_masks(model, issp.Keep(2, of=8))
        for name in COVERED:
            assert torch.equal(pruner.masks()[name], expected[name]), f"{step} {name}"
        flips = {n: int((expected[n] ^ before[n]).sum()) for n in COVERED}
        assert {n: pruner.flips()[n] for n in COVERED} == flips
        changes += sum(flips.values())
    assert changes > 0
    pruner.finalize()
    for name in COVERED:
        assert torch.equal(weights(model)[name] != 0, expected[name])


def test_masked_weights_keep_their_values_and_come_back_in_a_later_epoch():
    model = network()
    optimizer, pruner = attached(model, torch.optim.SGD, **UNIFORM)
    kept, back = pruner.masks(), 0
    values = {n: w.detach().clone() for n, w in weights(model).items()}
    for step in range(FREEZE - 1):
        train(model, optimizer, 1, pruner, first=step)
        for name in COVERED:
            weight = weights(model)[name]
            assert bool((weight.grad[~kept[name]] == 0).all()), "no gradient where masked"
            assert bool((weight.grad[kept[name]] != 0).any())
            assert_bitwise_equal(weight.detach()[~kept[name]], values[name][~kept[name]], name)
            back += int((pruner.masks()[name] & ~kept[name]).sum())
        assert back == 0 or (step + 1) >= EPOCH
        values = {n: w.detach().clone() for n, w in weights(model).items()}
        kept = pruner.masks()
    assert back > 0


# The scores.


def test_gradients_of_the_scores_are_those_of_the_plain_formula():
    """Autograd over the explicit sum of units, with the cost, in float64."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(),
        nn.Conv2d(16, 8, 3), nn.Conv2d(8, 3, 1),
    ).double()  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    method = methods.SLS(of=8, weight=1e-6)
    pruner = issp.attach(model, optimizer, 0.5, method=method)
    scores, method = pruner.method._scores, pruner.method
    generator = torch.Generator().manual_seed(1)
    state = scores.state_dict()
    state["scores"] = 1.02 - 0.4 * torch.rand(2, 7, generator=generator)
    state["scores"][0, 0] = 1.05  # beyond the clip: no gradient
    scores.load_state_dict(state)
    method._kept = scores.kept()
    method._show(["1", "3"])
    assert 1 < int(method._kept["1"].sum()) < 8, "some units of both kinds"
    x = torch.rand(2, 3, 9, 9, generator=generator, dtype=torch.float64)
    (model(x).square().mean() + pruner.loss()).backward()

    a = state["scores"].double().requires_grad_()
    cost, y = 0.0, F.conv2d(x, model[0].weight, model[0].bias, padding=1)
    for row, (name, padding, macs) in enumerate([("1", 1, 1152 * 81), ("3", 0, 1152 * 49)]):
        layer = model.get_submodule(name)
        p = a[row].clamp(0, 1.03).cumprod(0)
        b = (p > 0.5).double() - p.detach() + p
        rank = layer.weight.detach().unflatten(1, (-1, 8)).abs().argsort(2, descending=True)
        rank = rank.argsort(2).flatten(1, 2)
        mask = (rank == 0).double() + sum((rank == j + 1).double() * b[j] for j in range(7))
        y = F.conv2d(y, layer.weight * mask, layer.bias, padding=padding)
        y = y.relu() if name == "1" else y
        cost = cost + (1 + b.sum()) / 8 * macs
    loss = F.conv2d(y, model[4].weight, model[4].bias).square().mean() + 1e-6 * cost
    loss.backward()
    assert a.grad[0, 0] == 0 and bool((a.grad[:, 1:] != 0).all())
    torch.testing.assert_close(scores.take_gradient().double(), a.grad, rtol=2e-5, atol=1e-9)


def test_the_cost_is_that_of_the_units():
    model = network()
    _, pruner = attached(model, options={"weight": 0.5})
    assert pruner.loss().item() == 0 and not pruner.loss().requires_grad, "no size is known"
    model(batch(0))
    assert pruner.loss().item() == 0.5 * 5 * 576 * 36  # N / M = 1, 6 x 6 pixels
    with torch.no_grad():
        model(torch.rand(1, 3, 12, 12))
    assert pruner.loss().item() == 0.5 * 5 * 576 * 36, "validation does not count"
    pruner.method._kept["after"][3:] = False
    used = pruner.method._budget.used(pruner.method._masked, pruner.method._kept)
    assert used == pytest.approx((4 + 3 / 8) / 5)


def test_it_reaches_the_budget_and_then_fixes_the_scores():
    model = network()
    optimizer, pruner = attached(model, freeze_at=60, sparsity=0.7)
    shares, fixed = [], None
    for step in range(63):
        train(model, optimizer, 1, pruner, first=step)
        found = numbers(pruner)
        shares.append(sum(found.values()) / 40)
        learns = pruner.loss().requires_grad
        assert learns == (min(shares) > 0.3)
        if not learns:
            end = next(i for i, share in enumerate(shares) if share <= 0.3)
            scores = pruner.method._scores.products().detach().clone()
            fixed = fixed or (found, scores)
            assert found == fixed[0] and torch.equal(scores, fixed[1])
            expected = (step + 1) % EPOCH == 0 and step + 1 < 60
            assert step == end or expected or not any(pruner.flips().values()), step
    assert 5 < end < 40 and pruner.frozen
    assert len(set(shares)) > 2, "N falls step by step"


def test_the_coefficient_grows_while_the_cost_falls_too_slowly():
    model = network()
    optimizer, pruner = attached(model, options={"lr": 0.0, "growth": 2.0})
    seen = []
    for step in range(4 * EPOCH):
        train(model, optimizer, 1, pruner, first=step)
        seen.append(pruner.method._budget.coefficient)
    assert seen == [1.0] * 9 + [2.0] * 10 + [4.0]
    before = pruner.loss().item()
    pruner.method._budget.coefficient = 1.0
    assert before == 4 * pruner.loss().item()


def test_the_coefficient_stays_while_the_cost_falls():
    model = network()
    optimizer, pruner = attached(model, options={"epoch": 2, "threshold": 0.0}, sparsity=0.7)
    while pruner.loss().requires_grad or pruner.step_count < 3:
        assert pruner.method._budget.coefficient == 1.0
        train(model, optimizer, 1, pruner, first=pruner.step_count)
    assert pruner.step_count < FREEZE


def test_defaults_are_the_authors_at_their_length():
    def of(freeze_at):
        method = attached(network(), options={"epoch": None, "lr": None}, freeze_at=freeze_at,
                          sparsity=0.7)[1].method  # fmt: skip
        return method._epoch, method._scores._adam.param_groups[0]["lr"]

    assert of(100_000) == of(None) == (1000, 1e-4)
    assert of(8000) == (80, pytest.approx(1.25e-3))
    assert of(24) == (1, 0.05)


def test_gradients_that_are_not_finite_are_dropped():
    scores = PriorityScores(["a", "b"], 8, 0.1, torch.device("cpu"))
    before = scores.state_dict()
    scores.priorities["a"].grad = torch.full((7,), float("inf"))
    scores.step()
    after = scores.state_dict()
    assert torch.equal(before["scores"], after["scores"]) and after["steps"] == 0
    scores.priorities["a"].grad = torch.ones(7)
    scores.step()
    assert not torch.equal(scores.state_dict()["scores"], before["scores"])


# The freeze.


def test_a_budget_that_is_not_reached_is_kept_at_the_freeze():
    model = network()
    optimizer, pruner = attached(model, options={"weight": 0.0, "lr": 0.0})
    train(model, optimizer, FREEZE - 1, pruner)
    scores = pruner.method._scores
    state = scores.state_dict()
    state["scores"] = 1 - 0.08 * torch.rand(5, 7, generator=torch.Generator().manual_seed(0))
    scores.load_state_dict(state)
    assert set(numbers(pruner).values()) == {8} and scores.products().min() > 0.5
    with pytest.warns(UserWarning, match=r"sls has 1 of the dense cost .* the budget is 0\.3"):
        train(model, optimizer, 1, pruner, first=FREEZE - 1)
    p = scores.products().detach()
    kept = 1 + (p > p.flatten().sort().values[27]).sum(1)  # 28 of the 40 units go
    assert pruner.frozen and kept.sum() == 12 and len(kept.unique()) > 1
    assert numbers(pruner) == dict(zip(COVERED, kept.tolist(), strict=True))
    train(model, optimizer, 2, pruner, first=FREEZE)
    assert numbers(pruner) == dict(zip(COVERED, kept.tolist(), strict=True))


def test_fixed_before_any_step_it_drops_the_last_units():
    model = network()
    _, pruner = attached(model, sparsity=0.75, freeze_at=None)
    with pytest.warns(UserWarning, match="drops the units of the lowest priorities"):
        pruner.freeze()
    expected = magnitude_masks(model, issp.Keep(2, of=8))
    assert all(torch.equal(pruner.masks()[name], expected[name]) for name in COVERED)
    assert all(torch.equal(weights(model)[name] != 0, expected[name]) for name in COVERED)


@pytest.mark.parametrize("kind", [torch.optim.Adam, issp.optim.Adam])
@pytest.mark.parametrize("arguments", [LEARNED, UNIFORM])
def test_it_ends_in_exact_patterns_that_save_load_and_pack(arguments, kind, tmp_path):
    model = network()
    optimizer, pruner = attached(model, kind, **arguments)
    train(model, optimizer, FREEZE + 6, pruner)
    found = numbers(pruner)
    assert pruner.finalize() is model
    for name in COVERED:
        kept = (weights(model)[name] != 0).sum(1)
        assert kept.unique().tolist() == [found[name]], name
        keep = issp.Keep(found[name], of=8)
        sparse = NMConv2d.from_dense(model.get_submodule(name), keep, "fixed")
        x = torch.rand(1, 8, 6, 6)
        torch.testing.assert_close(sparse(x), model.get_submodule(name)(x), rtol=1e-5, atol=1e-6)
    for name in ("head", "tail"):
        assert int((weights(model)[name] == 0).sum()) == 0
    torch.save(model.state_dict(), tmp_path / "model.pth")
    loaded = network(seed=1)
    loaded.load_state_dict(torch.load(tmp_path / "model.pth"))
    x = batch(7)
    expected = model(x).detach()
    assert_bitwise_equal(loaded(x).detach(), expected, "loaded")
    with torch.no_grad():
        packed = issp.pack(loaded.eval(), example=x)
        torch.testing.assert_close(packed(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_both_optimizers_end_with_the_same_bits():
    first, second = network(), network()
    for model, kind in ((first, torch.optim.SGD), (second, issp.optim.SGD)):
        optimizer, pruner = attached(model, kind)
        train(model, optimizer, FREEZE + 2, pruner)
    for (layer, a), b in zip(weights(first).items(), weights(second).values(), strict=True):
        assert_bitwise_equal(b, a, layer)


# Resume and copies.


@pytest.mark.sampled
@pytest.mark.parametrize("stop", [3, 12, FREEZE - 1, FREEZE + 3])
@pytest.mark.parametrize("kind", [torch.optim.Adam, issp.optim.Adam])
@pytest.mark.parametrize("arguments", [LEARNED, UNIFORM])
def test_it_resumes_to_the_same_bits(arguments, kind, stop, tmp_path):
    whole = network()
    optimizer, pruner = attached(whole, kind, **arguments)
    train(whole, optimizer, FREEZE + 6, pruner)

    broken = network()
    optimizer, early = attached(broken, kind, **arguments)
    train(broken, optimizer, stop, early)
    assert early.loss().requires_grad == (arguments is LEARNED and stop == 3)
    state = [x.state_dict() for x in (broken, optimizer, early)]
    torch.save(state, tmp_path / "state")

    resumed = network(seed=1)
    optimizer, late = attached(resumed, kind, **arguments)
    state = torch.load(tmp_path / "state", weights_only=True)
    for part, saved in zip((resumed, optimizer, late), state, strict=True):
        part.load_state_dict(saved)
    assert late.method.notes() == early.method.notes()
    train(resumed, optimizer, FREEZE + 6 - stop, late, first=stop)
    for (layer, a), b in zip(weights(whole).items(), weights(resumed).values(), strict=True):
        assert_bitwise_equal(b, a, layer)
    assert late.flips() == pruner.flips()
    a, b = pruner.state_dict()["layers"], late.state_dict()["layers"]
    for name in a:
        assert torch.equal(a[name]["mask"], b[name]["mask"])
    assert late.method.state_dict().keys() == {"kept"}, "the ranks are of the pruning stage alone"


def test_an_earlier_state_can_be_loaded_again():
    model = network()
    optimizer, pruner = attached(model)
    train(model, optimizer, 3, pruner)
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict(), pruner.state_dict()))
    train(model, optimizer, FREEZE, pruner, first=3)
    end = {n: w.detach().clone() for n, w in weights(model).items()}
    assert pruner.frozen
    for part, saved in zip((model, optimizer, pruner), state, strict=True):
        part.load_state_dict(saved)
    assert pruner.loss().requires_grad and set(numbers(pruner).values()) != {2}
    train(model, optimizer, FREEZE, pruner, first=3)
    for layer, weight in weights(model).items():
        assert_bitwise_equal(weight.detach(), end[layer], layer)


@pytest.mark.sampled
@pytest.mark.parametrize("at", [3, 12, FREEZE + 1])
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_and_pickles_go_on_alike(how, at):
    model = network()
    optimizer, pruner = attached(model)
    train(model, optimizer, at, pruner)
    other, opt, twin = how((model, optimizer, pruner))
    if at > FREEZE:
        twin.reattach(opt)
    else:
        twin.reattach(opt, other)
    train(model, optimizer, FREEZE, pruner, first=at)
    train(other, opt, FREEZE, twin, first=at)
    for (layer, a), b in zip(weights(model).items(), weights(other).values(), strict=True):
        assert_bitwise_equal(b, a, layer)


def test_detached_it_masks_no_more_until_it_is_reattached():
    model = network()
    optimizer, pruner = attached(model, **UNIFORM)
    masked = model(batch(0))
    pruner.detach()
    assert_bitwise_equal(model(batch(0)), network()(batch(0)), "dense")
    pruner.reattach(optimizer)
    assert_bitwise_equal(model(batch(0)), masked, "masked")


def test_a_copy_of_the_model_takes_the_masks_over():
    model = network()
    optimizer, pruner = attached(model, **UNIFORM)
    train(model, optimizer, 7, pruner)
    other = copy.deepcopy(model)
    assert not torch.equal(other(batch(0)), model(batch(0)))
    expected = model(batch(0))
    pruner.reattach(torch.optim.Adam(other.parameters()), other)
    assert_bitwise_equal(other(batch(0)), expected, "the copy")
    assert not model.after._forward_hooks


def test_masked_shows_what_a_freeze_gives():
    model = network()
    optimizer, pruner = attached(model, **UNIFORM)
    train(model, optimizer, 7, pruner)
    x = batch(9)
    expected = model(x)
    with pruner.masked():
        assert_bitwise_equal(model(x), expected, "masked")
    pruner.finalize()
    assert_bitwise_equal(model(x), expected, "final")


def test_in_float64_and_channels_last():
    results = []
    for memory in (torch.contiguous_format, torch.channels_last):
        model = network().to(dtype=torch.float64, memory_format=memory)
        optimizer, pruner = attached(model)
        for step in range(FREEZE + 1):
            optimizer.zero_grad()
            (model(batch(step).double()).square().mean() + pruner.loss()).backward()
            optimizer.step()
        results.append((pruner.masks(), pruner.method.notes()))
    assert results[0][1] == results[1][1]
    for name, mask in results[0][0].items():
        assert torch.equal(mask, results[1][0][name]), name


@pytest.mark.parametrize("late", [4, 18])
def test_a_layer_that_joins_late_is_within_the_budget(late):
    model = network()
    model.after.weight.requires_grad_(False)
    optimizer, pruner = attached(model)
    train(model, optimizer, late, pruner)
    assert bool(pruner.masks()["after"].all())
    model.after.weight.requires_grad_(True)
    if late == 18:  # the scores are fixed by then
        with pytest.warns(UserWarning, match="drops the units"):
            train(model, optimizer, FREEZE, pruner, first=late)
    else:
        train(model, optimizer, FREEZE, pruner, first=late)
    assert sum(numbers(pruner).values()) <= 12


RANKS = """
import os, sys, torch, torch.distributed as dist, issp
from issp import methods
from tests.pruning.methods.runs import batch, network
child = os.fork()
rank = 0 if child else 1
dist.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
model = network()
parallel = torch.nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.Adam(parallel.parameters(), lr=1e-2)
method = methods.SLS(of=8, epoch=5, lr=0.05, weight=1e-4)
pruner = issp.attach(parallel, optimizer, 0.7, method=method, freeze_at=24)
assert not any("module" in name for name in pruner.masks())
first = None
for step in range(26):
    x = batch(2 * step + rank)
    loss = (parallel(x) - x.mean(1, keepdim=True)).square().mean() + pruner.loss()
    optimizer.zero_grad()
    loss.backward()
    priorities = pruner.method._scores.priorities.values()
    own = None if step else torch.stack([p.grad for p in priorities])
    optimizer.step()
    if step == 0:
        scores = [torch.empty_like(own) for _ in range(2)]
        dist.all_gather(scores, own)
        assert not torch.equal(*scores), "the ranks have gradients of their own"
    masks = torch.cat([m.flatten() for m in pruner.masks().values()]).to(torch.uint8)
    both = [torch.empty_like(masks) for _ in range(2)]
    dist.all_gather(both, masks)
    assert torch.equal(*both), step
    first = masks if first is None else first
assert pruner.frozen and not torch.equal(first, masks)
dist.destroy_process_group()
if not child:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""


@pytest.mark.full
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_ranks_learn_the_same_masks(tmp_path, fresh_python):
    done = fresh_python.run(RANKS.replace("{store}", str(tmp_path / "store")))
    assert done.returncode == 0, done.stderr


# Refusals.


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ({"sparsity": 0.9}, r"sparsity is 0\.9: sls keeps at least 1 of 8, .* at most 0\.875"),
        ({"sparsity": 0.5, "overrides": {"after": 0.7}}, "sls takes one sparsity"),
        ({"sparsity": 0.5, "overrides": {"after": issp.Keep(2, of=8)}}, "sls takes one sparsity"),
        ({"pattern": issp.Keep(2, of=8, v=2)}, "sls groups up to 256 input channels of one output"),
        ({"pattern": issp.Keep(2, of=8, c=2)}, "sls groups up to 256 input channels of one output"),
        ({"pattern": issp.Keep(2, of=8, layout="flat")}, "sls groups up to 256 input channels"),
        ({"pattern": issp.Keep(2, of=32)}, "no layer to prune: head.*groups of m = 32"),
        ({"schedule": issp.Cubic(0, 0.8, begin=0, end=9)}, "schedule has no meaning for sls"),
        ({"sparsity": 0.5, "exclude": ["blocks", "after"]}, "sls covers no layer: tail, as all"),
    ],
)
def test_settings_without_meaning_are_refused(arguments, sentence):
    model = network()
    with pytest.raises(ValueError, match=sentence) as error:
        attached(model, **arguments)
    assert "\n" not in str(error.value)
    assert not any(m._forward_hooks for m in model.modules())


def test_without_groups_of_32_it_names_the_layers():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="sls covers no layer: .* m = 32 input channels.*`of`"):
        issp.attach(model, optimizer, method="sls")


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"of": 1}, "of is 1"),
        ({"of": 300}, "of is 300"),
        ({"epoch": 0}, "epoch is 0"),
        ({"lr": -1.0}, "lr is -1.0"),
        ({"weight": float("nan")}, "weight is nan"),
        ({"growth": 0.5}, "growth is 0.5"),
        ({"threshold": float("inf")}, "threshold is inf"),
    ],
)
def test_options_outside_their_range_are_refused(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        methods.SLS(**options)


def damage(key, value):
    def change(state):
        *path, last = key.split("/")
        for part in path:
            state = state[part]
        if value is None:
            del state[last]
        else:
            state[last] = value

    return change


@pytest.mark.parametrize(
    "change",
    [
        damage("kept", None),
        damage("kept/after", torch.ones(9, dtype=torch.bool)),
        damage("ranks/after", torch.zeros(2, dtype=torch.uint8)),
        damage("ranks", 3),
        damage("outputs", None),
        damage("outputs/after", 3),
        damage("outputs/after", [None, None]),
        damage("outputs/after", [(3, 0)]),
        damage("scores/scores", torch.ones(5, 6)),
        damage("scores/steps", 0.5),
        damage("scores/names", None),
        damage("learns", 1),
        damage("more", 1),
    ],
)
def test_a_damaged_state_is_refused(change):
    model = network()
    optimizer, pruner = attached(model)
    train(model, optimizer, 2, pruner)
    state = copy.deepcopy(pruner.state_dict())
    change(state["method_state"])
    before = pruner.method.state_dict()
    with pytest.raises(ValueError, match="the state of sls in the pruner's state is damaged"):
        pruner.load_state_dict(state)
    assert torch.equal(pruner.method.state_dict()["scores"]["scores"], before["scores"]["scores"])


# Which layers.


def test_others_stay_dense_and_are_named():
    model = network()
    _, pruner = attached(model, sparsity=0.5, overrides={"blocks.0": 0.0})
    notes = {row.name: row.note for row in pruner.summary().rows}
    assert notes == {
        "head": "stays dense: it is the network's first layer",
        "blocks.0.conv1": "stays dense: its sparsity is 0",
        "blocks.0.conv2": "stays dense: its sparsity is 0",
        "blocks.1.conv1": "keeps 8 of 8",
        "blocks.1.conv2": "keeps 8 of 8",
        "after": "keeps 8 of 8",
        "tail": "stays dense: it is the network's last layer",
    }


@pytest.mark.parametrize(
    "exclude, weights_covered, sparsity",
    [([], 43_057_152, 0.9372), (["conv_after_body"], 42_467_328, 0.9244)],
)
def test_edsr_large_is_covered_as_in_the_supplement(exclude, weights_covered, sparsity):
    """docs/method.md, section 4: 64 convolutions of the body and 2 of the upsampler."""
    with torch.device("meta"):
        model = issp.models.build("edsr-l", scale=4)
    model = model.to_empty(device="cpu")  # memory that nothing touches
    for pattern in (issp.Keep(2, of=32, tail="dense"), 0.9375):
        layers = select(model, (nn.Conv2d, nn.Linear), exclude, {}, pattern)
        methods.SLS().prepare(model, layers)
        covered = [layer for layer in layers if not layer.dense]
        assert sum(x.weight.numel() for x in covered) == weights_covered
        assert len(covered) == 66 + (not exclude)
        zeros = sum(issp.Keep(2, of=32).pruned(x.weight.numel()) for x in covered)
        assert round(zeros / 43_070_976, 4) == sparsity


def test_the_default_is_2_of_32():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 64), nn.Linear(64, 4))
    pruner = issp.attach(model, torch.optim.SGD(model.parameters(), lr=0.1), method="sls")
    assert pruner.method._budget.share == 2 / 32
    assert pruner.summary().rows[1].target == 0.9375


def test_a_layer_that_is_not_called_is_named():
    class Direct(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x):
            a, b, c, d = self.layers
            return d(b(F.linear(a(x), c.weight)))

    model = Direct()
    optimizer, pruner = attached(model)
    (model(torch.rand(2, 8)).mean() + pruner.loss()).backward()
    with pytest.warns(UserWarning, match=r"has not called layers\.2: if something else uses"):
        optimizer.step()


def test_a_forgotten_loss_is_named_only_where_there_is_one():
    for arguments in (LEARNED, UNIFORM):
        model = network()
        optimizer, pruner = attached(model, **arguments)
        assert pruner.method.has_loss == (arguments is LEARNED)
        model(batch(0)).mean().backward()
        if arguments is LEARNED:
            with pytest.warns(UserWarning, match=r"sls has a loss: add pruner\.loss\(\)"):
                optimizer.step()
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
