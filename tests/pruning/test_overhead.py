"""Python in every step: as much for 480 tensors as for a few, and one call of an op for all.

Counted in calls of functions, which no other process on the machine changes; microseconds are in
`python -m bench overhead`.
"""

import gc
import itertools
import sys

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import issp
from issp.pruning import buckets
from tests.asserts import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("one_thread")


class Idle(torch.optim.SGD):
    """Its step does nothing: what remains is the pruner's."""

    def step(self, closure=None):
        pass


OPTIMIZERS = {
    "hook": lambda p: Idle(p, 0.1),
    "Adam": lambda p: issp.optim.Adam(p, 1e-3),
    "SGD": lambda p: issp.optim.SGD(p, 0.1, momentum=0.9),
}
MORE_OPTIMIZERS = {"Adam, torch's step": lambda p: issp.optim.Adam(p, 1e-3, fused=False)}


def tiny_layers(name, count, frozen=False, overrides=None):
    gc.collect()  # pruners of other tests, which the step of every optimizer asks
    torch.manual_seed(count)
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(count)))
    opt = (OPTIMIZERS | MORE_OPTIMIZERS)[name](model.parameters())
    pruner = issp.attach(model, opt, sparsity=0.5, overrides=overrides)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    for _ in range(3):
        opt.step()
    if frozen:
        pruner.freeze()
        opt.step()
    return model, opt, pruner


def calls_of(function):
    """How many functions of Python, and of C from Python, a call calls."""
    counts = {"call": 0, "c_call": 0}

    def count(frame, event, argument):
        if event in counts:
            counts[event] += 1

    sys.setprofile(count)
    try:
        function()
    finally:
        sys.setprofile(None)
    return counts["call"], counts["c_call"]


# Calls in a step with any number of tensors, torch's own among them (about 50).
@pytest.mark.parametrize(("name", "most"), [("hook", 200), ("Adam", 270), ("SGD", 250)])
@pytest.mark.parametrize("frozen", [False, True], ids=["pruning", "frozen"])
def test_python_does_not_grow_with_the_number_of_tensors(name, frozen, most):
    few = calls_of(tiny_layers(name, 3, frozen)[1].step)
    many = calls_of(tiny_layers(name, 480, frozen)[1].step)
    assert many == few
    assert sum(few) <= most


# Every other layer in an N:M pattern, or none.
PATTERNS = {"unstructured": {}, "N:M": {str(t): issp.Keep(2, of=4) for t in range(0, 480, 2)}}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("frozen", [False, True], ids=["pruning", "frozen"])
@pytest.mark.parametrize("patterns", PATTERNS)
def test_all_tensors_go_to_one_call(name, frozen, patterns):
    _, opt, pruner = tiny_layers(name, 480, frozen, PATTERNS[patterns])
    assert (pruner.buckets.column(lambda b: b.k)["0"] == 8) and len(pruner.buckets) == 1
    called = []

    class Ops(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "issp":
                called.append((func.name(), len(args[0])))
            return func(*args, **(kwargs or {}))

    with Ops():
        opt.step()
    assert len(called) == 1 and called[0][1] == 480


# Weights whose memory is replaced, where only some of them are compared in a step


def to_double(layer):
    layer.weight.data = layer.weight.data.double()


def to_new_memory(layer):
    layer.weight.data = layer.weight.data.clone()


def to_transposed_memory(layer):
    layer.weight.data = layer.weight.data.t().contiguous().t()


def to_a_new_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach().clone())


CHANGES = [to_double, to_new_memory, to_transposed_memory, to_a_new_parameter]


@pytest.mark.parametrize("frozen", [False, True], ids=["pruning", "frozen"])
@pytest.mark.parametrize(
    ("name", "change"),
    [*itertools.product(["hook", "Adam"], CHANGES), ("Adam, torch's step", to_double)],
)
def test_replaced_memory_changes_no_bit(change, frozen, name, monkeypatch):
    """As a pruner does that compares all of the memory in every step."""
    runs = []
    for compared in (buckets._COMPARED, 10**9):
        monkeypatch.setattr(buckets, "_COMPARED", compared)
        model, opt, pruner = tiny_layers(name, 80, frozen)
        change(model[77])
        assert len(pruner.buckets) == 1
        for number in range(3):
            for layer in model:
                layer.weight.data.mul_(1 + 0.1 * torch.sin(torch.arange(16.0).view(4, 4) + number))
            opt.step()
        runs.append((model, pruner))
    (few, first), (all_, second) = runs
    for a, b in zip(few, all_, strict=True):
        assert_bitwise_equal(a.weight.detach(), b.weight.detach(), "a weight")
    for name, mask in second.masks().items():
        assert_bitwise_equal(first.masks()[name], mask, f"mask of {name}")
    assert first.step_count == second.step_count
    assert len(first.buckets) == len(second.buckets) == (2 if change is to_double else 1) or frozen


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_number_of_weights_is_noticed_within_some_steps(name):
    """The masks of 12 and of 16 weights are as long in memory, so the op cannot tell."""
    model, opt, _ = tiny_layers(name, 80)
    model[77].weight.data = torch.ones(3, 4)
    with pytest.raises(ValueError, match=r"77: the mask has shape \(4, 4\).*attach anew"):
        for _ in range(2):  # the parts of 80 tensors
            opt.step()


def test_replaced_moments_are_masked():
    model, opt, pruner = tiny_layers("Adam", 100)
    opt.step()
    hooked = torch.optim.Adam(model.parameters(), 1e-3)
    for p in model.parameters():
        hooked.state[p] = {
            "step": torch.ones(()),
            "exp_avg": torch.ones_like(p),
            "exp_avg_sq": torch.ones_like(p),
        }
    pruner.reattach(hooked)
    pruner.freeze()
    hooked.step()
    weight = model[40].weight
    kept = pruner.masks()["40"]
    for replace in ("entry", "memory"):
        ones = torch.ones_like(weight)
        if replace == "entry":
            hooked.state[weight]["exp_avg"] = ones
        else:
            hooked.state[weight]["exp_avg"].data = ones
        hooked.step()
        moment = hooked.state[weight]["exp_avg"]
        assert_bitwise_equal((moment != 0), kept, f"a moment with a new {replace}")
