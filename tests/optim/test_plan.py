"""issp.optim: what a fused step depends on may change at any time; what fails shows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import issp
from issp import ops
from issp.ops.arguments import AdamArgs, PruneArgs, SGDArgs
from issp.optim.plan import FusedStepPlan, UnsupportedByFusedOp
from tests.asserts import assert_bitwise_equal
from tests.optim.twins import Twin, assert_twins, backward, network, together, twins

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ["adam", "sgd, momentum"]
MOMENTS = {"adam": "exp_avg", "sgd, momentum": "momentum_buffer"}


@pytest.fixture(autouse=True)
def _even_by_the_reference(monkeypatch):
    """Where no native back end is, the op is still what is tested."""
    monkeypatch.setattr(issp.backends, "by_reference", lambda device: [])


def fused(twin):
    return [info.fused for info in twin.opt.report]


@pytest.mark.parametrize(
    ("args", "op"), [(AdamArgs, "adam_soft_shrink_"), (SGDArgs, "sgd_soft_shrink_")]
)
def test_arguments_have_the_order_of_the_schema(args, op):
    schema = getattr(torch.ops.issp, op).default._schema
    assert [x.name for x in schema.arguments] == [*args._fields, *PruneArgs._fields]


@pytest.mark.parametrize("kind", KINDS)
def test_models_change_their_memory_order_while_they_train(kind):
    """Pruned convolutions, one that is not pruned, and all moments follow; no value changes.

    The twin keeps its order: torch's fused step mixes up weights and moments of different orders.
    """
    pair = Twin(kind, True, exclude="2"), Twin(kind, True, exclude="2")
    orders = [torch.contiguous_format, torch.channels_last, torch.contiguous_format]
    for number in range(9):
        order = orders[number // 3]
        pair[1].model.to(memory_format=order)
        for twin in pair:
            source = torch.Generator().manual_seed(number)
            for p in twin.model.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=source))
            twin.opt.step()
        assert_twins(*pair, f"after step {number}")
        assert fused(pair[1]) == [True]
        for p in pair[1].model.parameters():
            moment = pair[1].opt.state[p][MOMENTS[kind]]
            assert p.dim() < 4 or moment.is_contiguous(memory_format=order)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_gradients_of_another_memory_order_are_copied(last):
    def model():
        return network().to(memory_format=torch.channels_last) if last else network()

    pair = twins("adam", model=model)
    for number in range(4):
        for twin in pair:
            backward(twin.model, number)
        if number % 2:  # comes and goes
            conv, linear = pair[1].model[2].weight, pair[1].model[4].weight
            other = torch.contiguous_format if last else torch.channels_last
            conv.grad = conv.grad.contiguous(memory_format=other)
            linear.grad = linear.grad.t().contiguous().t()
        for twin in pair:
            twin.opt.step()
        assert_twins(*pair, f"after step {number}")
    assert fused(pair[1]) == [True]


@pytest.mark.parametrize("kind", KINDS)
def test_replaced_tensors_of_the_state_are_used(kind):
    pair = twins(kind)
    together(*pair, 2)
    for twin in pair:
        for weight in (twin.model[2].weight, twin.model[0].bias):
            state, key = twin.opt.state[weight], MOMENTS[kind]
            state[key] = torch.full_like(state[key], 0.5)
    together(*pair, 2, begin=2)
    assert fused(pair[1]) == [True]


def test_replaced_counters_of_the_state_are_used():
    pair = twins("adam")
    together(*pair, 2)
    for twin in pair:
        twin.opt.state[twin.model[4].weight]["step"] = torch.tensor(2.0)  # equal, another tensor
    together(*pair, 2, begin=2)
    assert pair[1].opt.state[pair[1].model[4].weight]["step"] == 4


def test_momentum_that_comes_and_goes():
    pair = twins("sgd")
    for number, momentum in enumerate((0.0, 0.9, 0.9, 0.0, 0.5)):
        for twin in pair:
            twin.opt.param_groups[0]["momentum"] = momentum
            twin.step(number)
        assert_twins(*pair, f"after step {number}")
        assert fused(pair[1]) == [True]


def test_a_weight_that_is_not_pruned_changes_its_dtype():
    """torch's fused step takes several dtypes, the op takes float32 alone."""
    pair = twins("sgd")
    together(*pair, 2)
    for twin in pair:
        bias = twin.model[4].bias
        bias.grad = None
        bias.data = bias.data.double()
        for p in twin.model.parameters():
            p.grad = torch.ones_like(p)
        twin.opt.step()
    assert "float64" in pair[1].opt.report[0].fallback_reason
    for a, b in zip(*(twin.model.parameters() for twin in pair), strict=True):
        assert_bitwise_equal(b.detach(), a.detach(), "a parameter")
    assert str(pair[0].pruner.summary()) == str(pair[1].pruner.summary())


def test_a_parameter_of_the_group_is_replaced():
    pair = twins("adam")
    together(*pair, 2)
    for twin in pair:
        params, old = twin.opt.param_groups[0]["params"], twin.model[4].bias
        number = next(i for i, p in enumerate(params) if p is old)
        params[number] = twin.model[4].bias = nn.Parameter(torch.ones(64))
        twin.step(2)
        twin.opt.state.pop(old)
    assert_twins(*pair, "after step 2")
    assert fused(pair[1]) == [True]


def test_assigned_parameters_are_pruned_though_the_optimizer_does_not_have_them():
    """The optimizer updates the parameters it has; the pruner shrinks those of the model."""
    pair = twins("adam")
    together(*pair, 2)
    for twin in pair:
        state = {name: x.clone() for name, x in twin.model.state_dict().items()}
        olds = list(twin.model.parameters())
        twin.model.load_state_dict(state, assign=True)
        for p, old in zip(twin.model.parameters(), olds, strict=True):
            old.grad = torch.ones_like(p)
        twin.opt.step()
        assert not any(torch.equal(p, old) for p, old in zip(state.values(), olds, strict=True))
    assert_twins(*pair, "after the step")
    assert "shrunk after the update" in pair[1].opt.report[0].fallback_reason


def test_other_devices_are_left_to_torch():
    weight = torch.nn.Parameter(torch.empty(4, device="meta"))
    weight.grad = torch.empty_like(weight)
    with pytest.raises(UnsupportedByFusedOp, match="weights on meta"):
        FusedStepPlan([weight], None)


def test_sparse_gradients_are_left_to_torch():
    twin = Twin("adam", True)
    twin.step(0)
    backward(twin.model, 1)
    weight = twin.model[4].weight
    weight.grad = weight.grad.to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        twin.opt.step()
    assert "sparse" in twin.opt.report[0].fallback_reason
    twin.step(2)
    assert fused(twin) == [True]


def test_an_op_that_fails_is_called_once_and_its_error_shows(monkeypatch):
    twin = Twin("adam", True)
    twin.step(0)
    calls = []

    def failing(*args):
        calls.append(args)
        raise RuntimeError("no such kernel")

    before = twin.tensors()
    backward(twin.model, 1)
    monkeypatch.setattr(ops, "adam_soft_shrink_", failing)
    with pytest.raises(RuntimeError, match="no such kernel"):
        twin.opt.step()
    assert len(calls) == 1 and twin.opt.take_remaining() is None
    for name, x in twin.tensors().items():
        assert_bitwise_equal(x, before[name], name)
    monkeypatch.undo()
    twin.step(2)
    assert twin.pruner.step_count == 2


# The pruner and the optimizer


def test_an_unchanged_plan_is_kept():
    twin = Twin("adam", True)
    twin.step(0)
    plan = twin.opt._plans[0]
    for number in range(1, 3):
        twin.step(number)
    assert twin.opt._plans[0] is plan


def test_a_prune_step_is_immutable_and_what_remains_is_taken_once():
    twin = Twin("adam", True, groups=lambda model: [{"params": [p]} for p in model.parameters()])
    backward(twin.model, 0)
    twin.model[2].weight.grad = None
    begun, taken = [], []
    begin, take = twin.opt._begin_step, twin.opt.take_remaining
    twin.opt._begin_step = lambda *args: (begun.append(begin(*args)), begun[-1])[1]
    twin.opt.take_remaining = lambda: (taken.append(take()), taken[-1])[1]
    twin.opt.step()
    (prune_step,), (remaining,) = begun, taken
    assert len(prune_step.buckets) == 3 and isinstance(prune_step.buckets, tuple)
    assert [[x.name for x in bucket.layers] for bucket in remaining] == [["2"]]
    assert prune_step.remaining(prune_step.buckets) == () and take() is None
    for field in dataclasses.fields(prune_step):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(prune_step, field.name, None)
    assert twin.pruner.summary().rows[1].selected > 0  # by the hook


def test_the_second_pruner_of_an_optimizer_works_in_its_hook():
    model = network()
    opt = issp.optim.Adam(model.parameters(), lr=1e-2)
    first = issp.attach(model, opt, sparsity=0.8, types=nn.Conv2d)
    second = issp.attach(model, opt, sparsity=0.5, types=nn.Linear)
    backward(model, 0)
    opt.step()
    assert opt.report[0].pruned == 2 and not opt.attach_pruner(lambda found_inf: None)
    assert first.summary().selected > 0 and second.summary().selected == 512
    first.detach()
    assert "no pruner" in opt.report[0].fallback_reason
    opt.step()
    assert (first.step_count, second.step_count) == (1, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_scaling_is_left_to_the_step_only_if_the_op_takes_all_groups(kind):
    def groups(model):
        return [{"params": [p]} for p in model.parameters()]

    twin = Twin(kind, True, groups=groups)
    assert twin.opt._step_supports_amp_scaling
    twin.opt.param_groups[1]["fused"] = False
    assert not twin.opt._step_supports_amp_scaling
    twin.opt.param_groups[1]["fused"] = True
    assert twin.opt._step_supports_amp_scaling
    twin.pruner.detach()
    assert not twin.opt._step_supports_amp_scaling
