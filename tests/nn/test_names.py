"""Names inside wrappers, in any order and nesting."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

import issp
from issp.nn import names


class Forwarding(nn.Module):
    """As Fabric's wrapper: the network stands under two attributes."""

    def __init__(self, inner):
        super().__init__()
        self._forward_module = inner
        self._original_module = names.unwrap(inner)

    def forward(self, x):
        return self._forward_module(x)


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "Fabric": Forwarding,
    "AveragedModel": AveragedModel,
    "checkpoint": checkpoint_wrapper,
}
ORDERS = [*itertools.permutations(WRAPPERS, 2), tuple(WRAPPERS), tuple(reversed(WRAPPERS))]


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(8, 3, 3)))


def wrap(module, order):
    for wrapper in order:
        module = WRAPPERS[wrapper](module)
    return module


@pytest.mark.parametrize("order", ORDERS, ids="-".join)
def test_wrappers_around_a_network_and_inside_it_leave_its_names_alone(order):
    model = network()
    plain = list(model.state_dict())
    model[1] = wrap(model[1], order)
    model = wrap(model, order)
    parameters = dict(model.named_parameters())
    pruner = issp.attach(model, torch.optim.SGD(parameters.values(), 0.1), sparsity=0.5)
    assert list(pruner.masks()) == ["0", "1.1"]
    assert list(names.named_modules(model)) == ["", "0", "1", "1.0", "1.1"]
    assert list(names.matched(parameters, plain)) == plain
    # Back again: a plain checkpoint for the wrapped network.
    assert list(names.matched(network().state_dict(), parameters)) == list(parameters)


def test_a_layer_that_is_called_module_is_no_wrapper():
    model = nn.ModuleDict({"module": nn.Linear(4, 4), "tail": nn.Linear(4, 4)})
    assert list(names.named_modules(model)) == ["", "module", "tail"]
    wrapped = {f"module.{n}": p for n, p in model.named_parameters()}
    assert list(names.matched(wrapped, model.state_dict())) == list(model.state_dict())
    pruner = issp.attach(model, sparsity=0.5, exclude="module")
    assert list(pruner.masks()) == ["tail"]


def test_entries_that_stand_for_no_name_or_for_several_keep_their_own():
    entries = {"module.a": 1, "module.b.module.c": 2, "d": 3, "module.d": 4, "n_averaged": 5}
    expected = ["a", "module.b.c", "b.module.c", "d"]
    assert names.matched(entries, expected) == {
        "a": 1,  # found
        "module.b.module.c": 2,  # two could be meant
        "d": 3,
        "module.d": 4,  # "d" is there itself
        "n_averaged": 5,
    }


@pytest.mark.parametrize(
    "pattern",
    [
        "module.1.*",
        "module._orig_mod.1",
        "_orig_mod.1.1.weight",
        "re:module\\.1\\..*",
        "1.module.1",
    ],
)
def test_name_patterns_may_be_read_from_a_wrapped_model(pattern):
    model = network()
    pruner = issp.attach(nn.DataParallel(model), sparsity=0.5, exclude=pattern)
    assert list(pruner.masks()) == ["0"]
    pruner.detach()
    pruner = issp.attach(nn.DataParallel(model), sparsity=0.5, overrides={pattern: 0.25})
    assert pruner.summary().rows[1].target == 0.25


def test_a_pattern_of_the_plain_names_is_not_compared_with_the_wrapped_ones():
    model = nn.DataParallel(nn.ModuleDict({"modulator": nn.Linear(4, 4), "b": nn.Linear(4, 4)}))
    assert list(issp.attach(model, sparsity=0.5, exclude="mod*").masks()) == ["b"]
    with pytest.raises(ValueError, match='exclude: "module" matches no module'):
        issp.attach(model, sparsity=0.5, exclude="module")


@pytest.mark.parametrize("of_model", [(), ("compile",), ("DataParallel", "compile")])
@pytest.mark.parametrize("of_average", [(), ("AveragedModel",), ("DataParallel", "AveragedModel")])
@pytest.mark.parametrize("as_dict", [False, True])
def test_averages_are_masked_whatever_is_wrapped(of_model, of_average, as_dict):
    plain = network()
    inner = wrap(plain, of_model)
    average = wrap(wrap(copy.deepcopy(plain), of_model), of_average)
    tensors = {n: p.detach() for n, p in average.named_parameters()}
    opt = torch.optim.SGD(plain.parameters(), 0.1)
    pruner = issp.attach(inner, opt, sparsity=0.5, ema=tensors if as_dict else average)
    pruner.freeze()
    weights = [p for n, p in tensors.items() if n.endswith("weight")]
    assert len(weights) == 2
    for weight, mask in zip(weights, pruner.masks().values(), strict=True):
        assert torch.equal(weight != 0, mask)


def test_an_average_in_a_class_of_the_users_own():
    class Average(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.module = copy.deepcopy(model)

    model = network()
    average = Average(model)
    pruner = issp.attach(model, sparsity=0.5, ema=average)
    pruner.freeze()
    assert torch.equal(average.module[0].weight != 0, pruner.masks()["0"])


def test_converting_replaces_layers_inside_wrappers():
    model = network()
    issp.attach(model, sparsity=0.9).finalize()
    before = model(torch.ones(1, 3, 8, 8))
    model[1] = nn.DataParallel(model[1])
    assert issp.nn.convert(model) == {}
    assert isinstance(model[1].module[1], issp.nn.SparseConv2d)
    torch.testing.assert_close(model(torch.ones(1, 3, 8, 8)), before)
