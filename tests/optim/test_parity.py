"""issp.optim against torch's fused optimizers with the pruner's hook: the same bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import issp
from issp import ops
from tests.asserts import assert_bitwise_equal
from tests.optim.twins import KINDS, Twin, assert_twins, backward, together, twins

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _even_by_the_reference(monkeypatch):
    """Where no native back end is, the op is still what is tested."""
    monkeypatch.setattr(issp.backends, "by_reference", lambda device: [])


every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda k: k.replace(", ", "-"))


@pytest.mark.sampled(most=2)
@every_kind
def test_a_hundred_steps_with_a_schedule_and_a_freeze(kind):
    pair = twins(kind, schedule=issp.Cubic(0.0, 0.9, begin=0, end=40), freeze_at=70)
    together(*pair, 100)
    (info,) = pair[1].opt.report
    assert (info.fused, info.pruned, info.others, info.fallback_reason) == (True, 3, 4, "")
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
    """torch skips them, the pruner does not; a group without any gradient is not stepped."""
    pair = twins(kind)
    missing = [(), ("2.weight",), ("0.bias", "4.weight"), ("5.weight",), ()]
    for number, names in enumerate([*missing, [n for n, _ in pair[0].model.named_parameters()]]):
        for twin in pair:
            backward(twin.model, number)
            for name in names:
                twin.model.get_parameter(name).grad = None
            twin.opt.step()
        assert_twins(*pair, f"after step {number}")
        (info,) = pair[1].opt.report
        pruned = {"0.weight", "2.weight", "4.weight"} & set(names)
        assert ("no gradient" in info.fallback_reason) == bool(pruned)


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
    pair[0].opt.param_groups[0]["fused"] = None  # what torch does unless it is told otherwise
    together(*pair, 5)
    first, *others = pair[1].opt.report
    assert (first.fused, first.fallback_reason) == (False, "amsgrad")
    assert all(info.fused for info in others)
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
    assert [info.fused for info in pair[1].opt.report] == [True, True]


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
