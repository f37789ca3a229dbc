"""issp.optim against torch's fused optimizers with the pruner's hook: the same bits."""

from __future__ import annotations

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn

import issp
from issp import ops
from tests.asserts import assert_bitwise_equal
from tests.optim_twins import KINDS, Twin, assert_twins, backward, network, together, twins
from tests.small_models import one_thread  # noqa: F401


@pytest.fixture(autouse=True)
def _pending_ops_by_the_reference(monkeypatch):
    """What a back end does not have yet is tested by the reference."""
    monkeypatch.setattr(issp.backends, "PENDING", {})


every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.replace(", ", "-"))


@every_kind
def test_a_hundred_steps_with_a_schedule_and_a_freeze(kind):
    pair = twins(kind, schedule=issp.Cubic(0.0, 0.9, begin=0, end=40), freeze_at=70)
    together(*pair, 100)
    (way,) = pair[1].opt.report
    assert (way.fused, way.pruned, way.others, way.why) == (True, 3, 4, "")
    summary = pair[1].pruner.summary()
    assert pair[1].pruner.frozen and summary.zeros == summary.selected > 0


@pytest.mark.parametrize(
    ("kind", "op"), [("adam", "adam_soft_shrink_"), ("sgd, momentum", "sgd_soft_shrink_")]
)
def test_one_op_call_per_group_and_step(kind, op, monkeypatch):
    calls = []
    real = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args: (calls.append(op), real(*args)))
    for name in ("soft_shrink_", "apply_masks_"):
        forbid = lambda *args, name=name: pytest.fail(f"{name} was called")  # noqa: E731
        monkeypatch.setattr(ops, name, forbid)
    twin = Twin(kind, True)
    for number in range(3):
        twin.step(number)
    assert len(calls) == 3
    monkeypatch.undo()
    twin.pruner.freeze()
    monkeypatch.setattr(ops, op, lambda *args: (calls.append(op), real(*args)))
    monkeypatch.setattr(ops, "apply_masks_", lambda *args: pytest.fail("apply_masks_ was called"))
    twin.step(3)
    assert len(calls) == 4


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd, nesterov"])
def test_odd_sizes_differ_from_torch_by_rounding_alone(kind):
    """torch's kernels end with a scalar loop that rounds in another order."""

    def odd():
        torch.manual_seed(1)
        return nn.Linear(13, 7)

    for seed in range(50):
        results = []
        for ours in (False, True):
            twin = Twin(kind, ours, model=odd)
            torch.manual_seed(seed)
            for _ in range(2):
                for p in twin.model.parameters():
                    p.grad = torch.randn_like(p)
                before = [p.detach().abs() for p in twin.model.parameters()]
                twin.opt.step()
            results.append([p.detach() for p in twin.model.parameters()])
        for a, b, w in zip(*results, before, strict=True):
            assert ((a - b).abs() <= 2 * 2.0**-23 * torch.maximum(w, a.abs())).all()


@every_kind
def test_parameters_without_gradients(kind):
    """torch skips them, the pruner does not; a group of them alone is stepped by nobody."""
    pair = twins(kind)
    lacking = [(), ("2.weight",), ("0.bias", "4.weight"), ("5.weight",), ()]
    for number, names in enumerate([*lacking, [n for n, _ in pair[0].model.named_parameters()]]):
        for twin in pair:
            backward(twin.model, number)
            for name in names:
                twin.model.get_parameter(name).grad = None
            twin.opt.step()
        assert_twins(*pair, f"after step {number}")
        (way,) = pair[1].opt.report
        pruned = {"0.weight", "2.weight", "4.weight"} & set(names)
        assert ("no gradient" in way.why) == bool(pruned)


def scaled_step(twin, scaler, number, overflow=False):
    backward(twin.model, number, scaler.get_scale())
    if overflow:
        twin.model[2].weight.grad[0, 0, 0, 0] = float("inf")
    scaler.step(twin.opt)
    scaler.update()


@every_kind
def test_gradient_scaler(kind):
    pair = twins(kind)
    scalers = [torch.amp.GradScaler("cpu", init_scale=3000.0, growth_interval=3) for _ in pair]
    for scaler in scalers:
        scaler.scale(torch.ones(()))  # it has no scale before its first use
    for number in range(12):
        for twin, scaler in zip(pair, scalers, strict=True):
            scaled_step(twin, scaler, number, overflow=number in (4, 5, 9))
        assert_twins(*pair, f"after step {number}")
    assert pair[1].pruner.step_count == 9
    assert pair[1].opt.report[0].fused


def test_a_skipped_first_step_leaves_momentum_unset():
    twin = Twin("sgd, dampening", True)
    expected = Twin("sgd, dampening", True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, backoff_factor=0.5)
    scaler.scale(torch.ones(()))
    before = twin.tensors()
    scaled_step(twin, scaler, 0, overflow=True)
    for name, x in twin.tensors().items():
        assert_bitwise_equal(x, before[name], name)
    scaled_step(twin, scaler, 1)
    expected.step(1)
    assert_twins(expected, twin, "after the first step that counts")


def test_gradients_are_not_unscaled_in_place():
    twin = Twin("adam", True)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    backward(twin.model, 0, 1024.0)
    before = [p.grad.clone() for p in twin.model.parameters()]
    scaler.step(twin.opt)
    for p, grad in zip(twin.model.parameters(), before, strict=True):
        assert_bitwise_equal(p.grad, grad, "a gradient")


def by_decay(model):
    """Norms and biases without decay, one layer with its own rate, one with amsgrad."""
    flat = [p for p in model.parameters() if p.dim() == 1]
    return [
        {"params": [model[0].weight, model[2].weight]},
        {"params": flat, "weight_decay": 0.0},
        {"params": [model[4].weight], "lr": 3e-3},
    ]


@every_kind
def test_parameter_groups_with_their_own_options(kind):
    pair = twins(kind, groups=by_decay, freeze_at=6)
    together(*pair, 10)
    assert [(w.fused, w.pruned, w.others) for w in pair[1].opt.report] == [
        (True, 2, 0),
        (True, 0, 4),
        (True, 1, 0),
    ]


def test_a_group_that_the_op_does_not_take_is_stepped_by_torch():
    def groups(model):
        first, second, third = by_decay(model)
        return [first | {"amsgrad": True}, second, third]

    pair = twins("adam", groups=groups)
    together(*pair, 5)
    first, *others = pair[1].opt.report
    assert not first.fused and first.why == "amsgrad" and all(way.fused for way in others)
    assert str(first) == "group 0: torch's own step: amsgrad"


def test_add_param_group_and_schedulers():
    def some(model):
        return [{"params": [p for n, p in model.named_parameters() if not n.startswith("4")]}]

    with pytest.warns(UserWarning, match="not in the optimizer"):
        pair = twins("adam", groups=some)
    schedulers = [torch.optim.lr_scheduler.StepLR(twin.opt, 2, gamma=0.5) for twin in pair]
    for number in range(8):
        if number == 3:
            for twin in pair:
                late = list(twin.model[4].parameters())
                twin.opt.add_param_group({"params": late, "weight_decay": 0.1})
        for twin, scheduler in zip(pair, schedulers, strict=True):
            twin.step(number)
            scheduler.step()
        assert_twins(*pair, f"after step {number}")
    assert [way.fused for way in pair[1].opt.report] == [True, True]
    assert pair[1].opt.param_groups[1]["fused"] is True


def test_closure():
    pair = twins("adam")
    losses = []
    for number in range(3):
        for twin in pair:

            def closure(twin=twin, number=number):
                backward(twin.model, number)
                return torch.ones(())

            losses.append(twin.opt.step(closure).item())
        assert_twins(*pair, f"after step {number}")
    assert losses == [1.0] * 6


@pytest.mark.parametrize("kind", ["adam", "sgd, momentum"])
def test_states_load_both_ways(kind):
    pair = twins(kind)
    together(*pair, 5)
    fresh = twins(kind)
    for twin, other in zip(fresh, pair[::-1], strict=True):  # each from the other's state
        twin.model.load_state_dict(other.model.state_dict())
        twin.opt.load_state_dict(copy.deepcopy(other.opt.state_dict()))
        twin.pruner.load_state_dict(other.pruner.state_dict())
    together(*fresh, 5, begin=5)
    together(*pair, 5, begin=5)
    assert_twins(pair[0], fresh[1], "resumed")
    assert fresh[1].opt.report[0].fused


def test_a_state_of_torchs_default_step_goes_on_fused():
    model, other = network(), network()
    opt = torch.optim.Adam(model.parameters())
    backward(model, 0)
    opt.step()
    mine = issp.optim.Adam(other.parameters(), lr=5.0)
    mine.load_state_dict(opt.state_dict())
    (group,) = mine.param_groups
    assert group["fused"] is True and group["lr"] == 1e-3
    assert mine.state_dict()["state"].keys() == opt.state_dict()["state"].keys()


def test_without_a_pruner_the_step_is_torchs():
    results = []
    for library in (torch.optim, issp.optim):
        model = network()
        options = {"fused": True} if library is torch.optim else {}
        opt = library.Adam(model.parameters(), lr=1e-2, **options)
        for number in range(3):
            backward(model, number)
            opt.step()
        results.append(model)
    for a, b in zip(*(m.parameters() for m in results), strict=True):
        assert_bitwise_equal(b.detach(), a.detach(), "a parameter")
    (way,) = opt.report
    assert not way.fused and "no pruner" in way.why


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_after_reattach(copied):
    twin, expected = Twin("adam", True), Twin("adam", True)
    for number in range(4):
        twin.step(number)
        expected.step(number)
    model, opt = copied((twin.model, twin.opt))
    assert "no pruner" in opt.report[0].why and opt._step_supports_amp_scaling
    twin.pruner.reattach(opt, model)
    twin.model, twin.opt = model, opt
    for number in range(4, 8):
        twin.step(number)
        expected.step(number)
    assert_twins(expected, twin, "after reattach")
    assert opt.report[0].fused


def test_channels_last_weights_and_moments_from_elsewhere():
    def last():
        return network().to(memory_format=torch.channels_last)

    pair = twins("adam", model=last)
    together(*pair, 4)
    assert pair[1].opt.report[0].fused
    plain = Twin("adam", True)  # its contiguous moments meet channels_last weights
    for number in range(4):
        plain.step(number)
    ours = pair[1]
    ours.opt.load_state_dict(plain.opt.state_dict())
    before = {n: x.clone() for n, x in ours.tensors().items() if n.startswith("state")}
    backward(ours.model, 9)
    for p in ours.model.parameters():
        p.grad.zero_()
    ours.opt.step()
    for i, p in enumerate(ours.model.parameters()):
        moment = ours.opt.state[p]["exp_avg"]
        assert p.dim() < 4 or moment.is_contiguous(memory_format=torch.channels_last)
        expected = before[f"state {i} exp_avg"] * torch.tensor(0.9)
        assert torch.allclose(moment, expected, rtol=1e-5)


def test_bfloat16_gradients_of_float32_weights():
    """torch refuses them; here they are widened exactly: as if they had come as float32."""
    pair = twins("adam")
    for p in pair[1].model.parameters():
        p.grad_dtype = torch.bfloat16
    for number in range(4):
        for twin in pair:
            source = torch.Generator().manual_seed(number)
            for p in twin.model.parameters():
                grad = torch.randn(p.shape, generator=source).bfloat16()
                p.grad = grad if twin is pair[1] else grad.float()
            twin.opt.step()
        assert_twins(*pair, f"after step {number}")


def test_tied_and_patterned_weights():
    def tied():
        model = network()
        model.append(nn.Linear(64, 16, bias=False))
        model.append(nn.Linear(16, 64))
        model[7].weight = model[4].weight
        return model

    pair = twins("adam", model=tied, overrides={"2": issp.Keep(2, of=16)}, freeze_at=3)
    together(*pair, 6)
    assert pair[1].opt.report[0].pruned == 3  # the N:M layer is shrunk after the update
    assert int(pair[1].pruner.masks()["2"].sum()) == 64 * 64 * 9 // 8


def test_several_optimizers_and_two_pruners():
    def build(library, **options):
        model = network()
        first = library.SGD(model[0].parameters(), lr=0.1, momentum=0.9, **options)
        rest = [p for n, p in model.named_parameters() if n[0] != "0"]
        second = library.AdamW(rest, lr=1e-2, **options)
        pruner = issp.attach(model, [first, second], sparsity=0.8, types=nn.Conv2d)
        other = issp.attach(model, second, sparsity=0.5, types=nn.Linear)
        return model, (first, second), (pruner, other)

    built = [build(torch.optim, fused=True), build(issp.optim)]
    for number in range(4):
        for model, opts, _ in built:
            backward(model, number)
            for opt in opts:
                opt.step()
        for name, a in built[0][0].named_parameters():
            assert_bitwise_equal(built[1][0].get_parameter(name).detach(), a.detach(), name)
    for a, b in zip(built[0][2], built[1][2], strict=True):
        assert str(a.summary()) == str(b.summary())
    first, second = built[1][1]
    assert (first.report[0].pruned, second.report[0].pruned) == (1, 1)


def test_freezing_within_a_step_and_leaving():
    pair = twins("adam")
    for twin in pair:
        twin.pruner.on_step(lambda pruner: pruner.freeze() if pruner.step_count == 3 else None)
    together(*pair, 6)
    assert pair[1].pruner.frozen
    for twin in pair:
        twin.pruner.detach()
    together(*pair, 2, begin=6)
    assert "no pruner" in pair[1].opt.report[0].why


def test_a_state_entry_that_somebody_replaced_is_used():
    pair = twins("adam")
    together(*pair, 3)
    for twin in pair:
        twin.opt.state[twin.model[2].weight] = {}
    together(*pair, 3, begin=3)
    assert pair[1].opt.state[pair[1].model[2].weight]["step"] == 3


def test_capturable_is_refused_on_a_cpu_as_torch_does():
    for library in (torch.optim, issp.optim):
        model = network()
        opt = library.Adam(model.parameters(), capturable=True)
        issp.attach(model, opt)
        backward(model, 0)
        with pytest.raises(AssertionError, match="capturable"):
            opt.step()


def test_a_learning_rate_in_a_tensor():
    pair = twins("adam", options={"lr": torch.tensor(2e-3)})
    together(*pair, 3)
    assert pair[1].opt.report[0].fused


@pytest.mark.parametrize(
    ("options", "why"),
    [({"amsgrad": True}, "amsgrad"), ({"foreach": True}, "fused"), ({"fused": False}, "fused")],
)
def test_the_report_says_why_torch_steps(options, why):
    twin = Twin("adam", True, options=options)
    assert why in twin.opt.report[0].why
    twin.step(0)
    assert why in twin.opt.report[0].why
    assert twin.pruner.summary().selected > 0


def test_other_dtypes_are_stepped_by_torch():
    def double():
        return nn.Sequential(nn.Linear(16, 64)).double()

    twin = Twin("adam", True, model=double)
    for p in twin.model.parameters():
        p.grad = torch.randn_like(p)
    twin.opt.step()
    assert "float64" in twin.opt.report[0].why
    assert twin.pruner.summary().selected > 0


def test_impossible_options_are_refused_before_anything_is_written():
    twin = Twin("adam", True)
    twin.step(0)
    before = twin.tensors()
    twin.opt.param_groups[0]["lr"] = -1.0
    backward(twin.model, 1)
    with pytest.raises(ValueError, match="lr is -1.0"):
        twin.opt.step()
    for name, x in twin.tensors().items():
        assert_bitwise_equal(x, before[name], name)
    twin.opt.param_groups[0]["lr"] = 1e-3
    twin.step(1)
    assert twin.pruner.step_count == 2


def test_arguments_are_torchs():
    for name in ("Adam", "AdamW", "SGD"):
        theirs, mine = getattr(torch.optim, name), getattr(issp.optim, name)
        assert issubclass(mine, theirs)
        assert inspect.signature(mine) == inspect.signature(theirs)
        p = nn.Parameter(torch.zeros(2))
        assert mine([p]).defaults == theirs([p]).defaults
        named = mine([("p", p)])
        assert named.state_dict()["param_groups"][0]["param_names"] == ["p"]
        with pytest.raises(ValueError, match="learning rate"):
            mine([p], lr=-1.0)
        with pytest.raises(TypeError, match="iterable"):
            mine(p)
