"""The pruner: copies, hooks, state, resume."""

import copy
import gc
import io
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from issp import ops
from issp.pruning.attach import attach
from issp.pruning.schedules import Constant
from tests.pruning.networks import adam, net, same, step, train, weights

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
    train(other, copied._buckets.optimizers[0], range(2, 5))
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


@pytest.mark.parametrize("scheduled", [False, True])
def test_the_warning_points_at_the_line_that_steps(scheduled):
    model = net()
    pruner = attach(model, adam(model), sparsity=0.9)
    rebuilt = adam(model)
    if scheduled:  # wraps `step` once more
        torch.optim.lr_scheduler.StepLR(rebuilt, 2)
    with pytest.warns(UserWarning, match="without the pruner's hook") as caught:
        rebuilt.step()
    assert [w.filename for w in caught] == [__file__] and not pruner.step_count


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


def test_a_state_with_wrappers_in_its_names_is_loaded():
    model = net()
    opt = adam(model)
    pruner = attach(model, opt, sparsity=0.9)
    train(model, opt, range(2))
    state = checkpoint(model, opt, pruner)[2]
    names = {"0": "module.0", "2.0": "module.2._orig_mod.0", "4": "_forward_module.4"}
    for key in ("layers", "targets"):
        state[key] = {names[name]: entry for name, entry in state[key].items()}
    other = net()
    resumed = attach(nn.DataParallel(other), adam(other), sparsity=0.9)
    resumed.load_state_dict(state)
    assert resumed.step_count == 2 and same(resumed.masks(), pruner.masks())


def test_one_op_call_per_step(monkeypatch):
    calls = []
    plain = ops.soft_shrink_
    monkeypatch.setattr(ops, "soft_shrink_", lambda *a: (calls.append(len(a[0])), plain(*a)))
    model = net()
    opt = adam(model)
    attach(model, opt)
    train(model, opt, range(2))
    assert calls == [3, 3]
