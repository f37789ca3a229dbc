"""issp.optim refuses a saved state that its step could not go on with, before anything changes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import issp
from tests.asserts import assert_bitwise_equal

KINDS = {
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "SGD": {"lr": 0.1, "momentum": 0.9},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def trained(kind, library=issp.optim, seed=1):
    torch.manual_seed(seed)
    layer = nn.Linear(6, 4)
    opt = getattr(library, kind)(layer.parameters(), **KINDS[kind])
    for p in layer.parameters():
        p.grad = torch.randn(p.shape)
    opt.step()
    return layer, opt


def tensors(layer, opt):
    found = {f"parameter {i}": p.detach().clone() for i, p in enumerate(layer.parameters())}
    for i, state in opt.state_dict()["state"].items():
        found |= {f"{name} of {i}": x.clone() for name, x in state.items()}
    return found


def in_state(entry, value, parameter=0):
    def damage(saved):
        saved["state"][parameter][entry] = value(saved["state"][parameter][entry])

    return damage


def without(*path):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        del saved[path[-1]]

    return damage


def with_value(value, *path):
    def damage(saved):
        for key in path[:-1]:
            saved = saved[key]
        saved[path[-1]] = value

    return damage


MOMENTS = {
    "Adam": ["exp_avg", "exp_avg_sq"],
    "AdamW": ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"],
    "SGD": ["momentum_buffer"],
}
MISFITS = {
    "longer": (lambda x: torch.zeros(4, 60), "has shape (4, 60) but the parameter (4, 6)"),
    "shorter": (lambda x: x[:, :2].contiguous(), "has shape (4, 2) but the parameter (4, 6)"),
    "one number": (lambda x: torch.tensor(0.0), "has shape () but the parameter (4, 6)"),
    "transposed": (lambda x: x.t(), "has shape (6, 4) but the parameter (4, 6)"),
    "integers": (lambda x: x.int(), "has dtype torch.int32 but the parameter torch.float32"),
    "complex": (lambda x: x + 0j, "has dtype torch.complex64 but the parameter torch.float32"),
    "compressed": (lambda x: x.to_sparse_csr(), "has layout torch.sparse_csr"),
    "without values": (lambda x: x.to("meta"), "has no values"),
    "a list": (lambda x: x.tolist(), "is no tensor"),
}


def assert_refused(kind, damage, message):
    layer, opt = trained(kind)
    _, other = trained(kind, seed=2)
    before, options = tensors(layer, opt), copy.deepcopy(opt.state_dict()["param_groups"])
    saved = copy.deepcopy(other.state_dict())
    damage(saved)
    with pytest.raises(ValueError) as refusal:
        opt.load_state_dict(saved)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)
    after = tensors(layer, opt)
    assert after.keys() == before.keys() and opt.state_dict()["param_groups"] == options
    for name, x in after.items():
        assert_bitwise_equal(x, before[name], name)


@pytest.mark.parametrize("misfit", MISFITS)
@every_kind
def test_moments_unlike_their_parameter(kind, misfit):
    value, message = MISFITS[misfit]
    for name in MOMENTS[kind]:
        start = f"{name} in the optimizer's state of parameter 0 "
        assert_refused(kind, in_state(name, value), start + message)


@pytest.mark.parametrize("kind", ["Adam", "AdamW"])
def test_entries_that_are_missing(kind):
    for name in ("step", *MOMENTS[kind]):
        message = f"the optimizer's state of parameter 1 lacks {name}: it was saved by another"
        assert_refused(kind, without("state", 1, name), message)
    for step in (-1.0, float("nan"), torch.ones(2), "1", torch.tensor(-3.0), torch.tensor(1j)):
        message = "step in the optimizer's state of parameter 0 is no number"
        assert_refused(kind, in_state("step", lambda _, step=step: step), message)


@every_kind
def test_what_is_no_state(kind):
    nothing = "the optimizer's state has no state and param_groups: it is something else"
    group = "parameter group 0 of the optimizer's state "
    for damage, message in [
        (without("state"), nothing),
        (without("param_groups"), nothing),
        (with_value([], "state"), nothing),
        (with_value(3, "param_groups"), nothing),
        (with_value([3], "param_groups"), group + "has no params"),
        (without("param_groups", 0, "params"), group + "has no params"),
        (with_value([[], 1], "param_groups", 0, "params"), group + "is damaged"),
        (without("param_groups", 0, "lr"), group + "lacks lr"),
        (with_value("fast", "param_groups", 0, "lr"), group + "has lr fast"),
        (with_value(-1.0, "param_groups", 0, "lr"), group + "has lr -1.0"),
        (with_value(10**400, "param_groups", 0, "lr"), group + "has lr 1000"),
        (with_value(float("nan"), "param_groups", 0, "weight_decay"), "has weight_decay nan"),
        (with_value(7, "state", 0), "the optimizer's state of parameter 0 is damaged"),
    ]:
        assert_refused(kind, damage, message)
    _, opt = trained(kind)
    for thing in (None, [1, 2], "state"):
        with pytest.raises(ValueError, match="it is something else"):
            opt.load_state_dict(thing)
    if kind != "SGD":
        for betas in ((0.9,), None, (0.9, "b"), 0.9):
            assert_refused(kind, with_value(betas, "param_groups", 0, "betas"), "has betas")


def test_the_state_of_another_optimizer():
    for kind, other, message in [
        ("Adam", "SGD", "lacks betas"),
        ("SGD", "Adam", "lacks momentum"),
    ]:
        _, opt = trained(kind)
        with pytest.raises(ValueError, match=message):
            opt.load_state_dict(trained(other)[1].state_dict())


@every_kind
def test_the_state_of_another_model_is_torchs_to_refuse(kind):
    _, opt = trained(kind)
    saved = opt.state_dict()
    saved["param_groups"][0]["params"] = [0]
    with pytest.raises(ValueError, match="size of optimizer's group"):
        opt.load_state_dict(saved)


@every_kind
def test_good_states_of_every_form_load(kind):
    """Of torch's class, of another dtype, with numbers for counters, of a parameter not stepped."""
    layer, opt = trained(kind)
    _, other = trained(kind, torch.optim, seed=2)
    saved = copy.deepcopy(other.state_dict())
    for entries in saved["state"].values():
        for name in MOMENTS[kind]:
            entries[name] = entries[name].double()
        if "step" in entries:
            entries["step"] = 1
    del saved["state"][1]
    opt.load_state_dict(saved)
    for name in MOMENTS[kind]:
        expected = other.state_dict()["state"][0][name]
        assert_bitwise_equal(opt.state[layer.weight][name], expected, name)
    assert not opt.state.get(layer.bias)
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    opt.step()


def test_hooks_may_translate_a_state_before_it_is_checked():
    layer, opt = trained("Adam")

    def translate(_, saved):
        groups = [{**group, "params": [0, 1]} for group in saved["groups"]]
        return {"state": saved["by number"], "param_groups": groups}

    opt.register_load_state_dict_pre_hook(translate)
    _, other = trained("Adam", seed=2)
    saved = other.state_dict()
    foreign = {"by number": saved["state"], "groups": saved["param_groups"]}
    opt.load_state_dict(foreign)
    expected = saved["state"][0]["exp_avg"]
    assert_bitwise_equal(opt.state[layer.weight]["exp_avg"], expected, "exp_avg")
    foreign["by number"][0]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match="has shape"):
        opt.load_state_dict(foreign)
    assert_bitwise_equal(opt.state[layer.weight]["exp_avg"], expected, "exp_avg")


def test_sparse_momentum_of_sgd_loads():
    table = nn.Embedding(5, 3, sparse=True)
    opt = issp.optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    table(torch.tensor([1, 2])).sum().backward()
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    assert saved["state"][0]["momentum_buffer"].is_sparse
    opt.load_state_dict(saved)
    opt.step()
