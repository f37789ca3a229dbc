"""Sparse layers against torch's: values, gradients, states, copies, compilation, conversion."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import issp
from issp import Keep, ops
from issp.nn import NMConv2d, NMLinear, SparseConv2d, SparseLinear, convert
from tests.asserts import assert_bitwise_equal

KEEP = Keep(1, of=4, v=2)
MASKS = ("fixed", "ste", "sr-ste")
CONV = partial(torch.randn, 2, 8, 9, 7)
LINEAR = partial(torch.randn, 3, 5, 8)
LAYERS = {
    "NMConv2d": (partial(NMConv2d, 8, 6, 3, stride=2, padding=1, keep=KEEP), CONV),
    "NMConv2d 1x7": (partial(NMConv2d, 8, 6, (1, 7), padding="same", keep=Keep(3, of=8)), CONV),
    "SparseConv2d": (partial(SparseConv2d, 8, 6, (5, 3), dilation=(1, 2), sparsity=0.9), CONV),
    "SparseConv2d v=3": (
        partial(SparseConv2d, 8, 6, 3, padding=4, sparsity=0.7, v=3, activation="relu"),
        CONV,
    ),
    "NMLinear": (partial(NMLinear, 8, 6, keep=KEEP, bias=False, activation="gelu"), LINEAR),
    "SparseLinear": (partial(SparseLinear, 8, 6, sparsity=0.5), LINEAR),
}


@pytest.fixture(params=LAYERS)
def made(request):
    """A constructor that takes `mask`, and an input."""
    make, x = LAYERS[request.param]
    return make, x()


def dense_of(layer):
    """(the whole dense twin, its torch layer)"""
    twin = layer.to_dense()
    return twin, twin[0] if isinstance(twin, nn.Sequential) else twin


def weight_of(layer):
    return layer.values if layer.mask == "fixed" else layer.weight


@pytest.mark.parametrize("mask", MASKS)
def test_results_are_those_of_the_dense_twin(made, mask):
    make, x = made
    layer = make(mask=mask)
    twin, _ = dense_of(layer)
    expected = twin(x)
    residual = torch.randn_like(expected)
    for train in (True, False):
        layer.train(train)
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(x, residual), expected + residual)
        with torch.no_grad():
            torch.testing.assert_close(layer(x, residual), expected + residual)
    if x.dim() == 4:
        torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), expected)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_are_those_of_the_dense_twin(made, mask):
    make, x = made
    layer = make(mask=mask).double()
    x = x.double().requires_grad_()
    twin, dense = dense_of(layer)
    layer(x).square().sum().backward()
    actual, x.grad = x.grad, None
    twin(x).square().sum().backward()
    torch.testing.assert_close(actual, x.grad)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)
    wanted = dense.weight.grad
    if mask == "sr-ste":
        kept = layer.packed()
        kept.values.fill_(1)
        wanted = wanted + 2e-4 * layer.weight * (1 - kept.to_dense())
    if mask == "fixed":
        p = layer.packed()
        blocks = torch.repeat_interleave(p.crow_indices.diff().long())
        wanted = wanted.reshape(len(p.crow_indices) - 1, p.v, -1)[blocks, :, p.col_indices.long()]
    torch.testing.assert_close(weight_of(layer).grad, wanted)


def test_an_ste_mask_follows_the_largest_magnitudes(made):
    make, x = made
    layer = make(mask="ste")
    for _ in range(2):
        with torch.no_grad():
            layer.weight.copy_(torch.randn_like(layer.weight))
        pruned = layer.packed().to_dense()
        if hasattr(layer, "keep"):
            expected = ops.nm_prune(layer.weight.detach(), layer.keep)
        else:
            shared = layer.weight.detach().view(6 // layer.v, layer.v, -1)
            scores = shared.abs().sum(1).flatten()
            count = issp.num_pruned(scores.numel(), 1 - layer._num_kept / scores.numel())
            keys = scores.sort(stable=True).indices[count:]
            mask = torch.zeros_like(scores).index_fill_(0, keys, 1).view(len(shared), 1, -1)
            expected = (shared * mask).view_as(layer.weight)
        assert_bitwise_equal(pruned.abs(), expected.abs(), "the pruned weight")
        dense = dense_of(layer)[0]
        torch.testing.assert_close(layer(x), dense(x))


@pytest.mark.parametrize("v", [1, 2])
def test_ties_of_an_ste_mask_prune_the_lowest_index_first(v):
    layer = SparseLinear.from_dense(nn.Linear(6, 4), v=v, mask="ste", sparsity=0.5)
    with torch.no_grad():
        layer.weight.fill_(0.25)
    positions = 24 // v
    expected = [i % 6 for i in range(positions // 2, positions)]
    assert layer.packed().col_indices.tolist() == expected


def test_a_constructor_prunes_what_torch_initialises():
    torch.manual_seed(3)
    dense = nn.Conv2d(8, 6, 3)
    torch.manual_seed(3)
    layer = NMConv2d(8, 6, 3, keep=KEEP)
    weight = ops.nm_prune(dense.weight.detach(), KEEP) + 0.0  # -0 is not kept
    assert_bitwise_equal(layer.to_dense().weight.detach(), weight, "the initial weight")
    assert_bitwise_equal(layer.bias.detach(), dense.bias.detach(), "the initial bias")
    rows = SparseLinear(100, 30, sparsity=0.95, dtype=torch.float64)
    assert rows.values.dtype == torch.float64
    assert rows.values.numel() == 3000 - issp.num_pruned(3000, 0.95)


@pytest.mark.parametrize("mask", MASKS)
def test_states_go_both_ways(made, mask):
    make, x = made
    layer, other = make(mask=mask), make(mask=mask)
    before = other(x)
    state = layer.state_dict()
    stored = {"values", "col_indices", "crow_indices"} if mask == "fixed" else {"weight"}
    assert set(state) == stored | ({"bias"} if layer.bias is not None else set())
    other.load_state_dict(state, strict=True)
    assert not torch.equal(before, layer(x))
    assert_bitwise_equal(other(x), layer(x), "the loaded layer's result")
    x.requires_grad_()
    first, second = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, other))
    assert_bitwise_equal(second, first, "the loaded layer's gradient")


def test_an_ste_layer_shares_its_states_with_the_dense_one():
    layer, dense = NMConv2d(8, 6, 3, keep=KEEP, mask="ste"), nn.Conv2d(8, 6, 3)
    dense.load_state_dict(layer.state_dict(), strict=True)
    layer.load_state_dict(dense.state_dict(), strict=True)
    assert [n for n, _ in layer.named_parameters()] == [n for n, _ in dense.named_parameters()]


@pytest.mark.parametrize("assign", [False, True])
def test_loading_adopts_another_pattern(assign):
    """Also one with more entries; the parameter stays the same object, for the optimizer."""
    layer, x = SparseConv2d(8, 6, 3, sparsity=0.9), CONV().requires_grad_()
    other = SparseConv2d(8, 6, 3, sparsity=0.5)
    before = layer.values
    layer(x).sum().backward()  # its transposed lists are made
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert assign or layer.values is before
    assert_bitwise_equal(layer(x), other(x), "the result")
    first, second = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (layer, other))
    assert_bitwise_equal(first, second, "the gradient")


@pytest.mark.parametrize("assign", [False, True])
def test_states_of_older_versions_are_loaded(assign):
    """They call the positions columns and starts; also in a model, where names have a prefix."""
    source = nn.Sequential(nn.ReLU(), SparseConv2d(8, 6, 3, sparsity=0.5))
    target = nn.Sequential(nn.ReLU(), SparseConv2d(8, 6, 3, sparsity=0.9))
    old = {"col_indices": "columns", "crow_indices": "starts"}
    state = {f"1.{old.get(name, name)}": tensor for name, tensor in source[1].state_dict().items()}
    before = list(state)
    target.load_state_dict(state, strict=True, assign=assign)
    assert list(state) == before
    x = CONV()
    assert_bitwise_equal(target(x), source(x), "the loaded model's result")
    alone = SparseConv2d(8, 6, 3, sparsity=0.9)
    alone.load_state_dict({name[2:]: tensor for name, tensor in state.items()}, strict=True)
    assert_bitwise_equal(alone(x), source[1](x), "the loaded layer's result")


@pytest.mark.parametrize("mask", MASKS)
def test_copies(made, mask):
    make, x = made
    layer = make(mask=mask)
    layer(x.requires_grad_()).sum().backward()
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert_bitwise_equal(twin(x), layer(x), "the copy's result")
        assert weight_of(twin) is not weight_of(layer)
        assert repr(twin) == repr(layer)


def test_moving_to_another_dtype_or_device_takes_everything_along(made):
    make, x = made
    layer = make(mask="fixed")
    x = x.requires_grad_()
    layer(x).sum().backward()
    layer.bfloat16()
    assert layer.col_indices.dtype == torch.int32 and layer.values.dtype == torch.bfloat16
    y = layer(x.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, layer.to_dense()(x.bfloat16()))
    assert {t.device.type for t in layer.transposed} == {"cpu"}
    assert {t.device.type for t in layer.to("meta").transposed} == {"meta"}


@pytest.mark.parametrize("mask", MASKS)
def test_from_dense_and_back(mask):
    keep = Keep(2, of=4)
    conv, linear = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(8, 6, bias=False)
    for dense in (conv, linear):
        with torch.no_grad():
            dense.weight.copy_(ops.nm_prune(dense.weight.detach(), keep) + 0.0)  # -0 is not kept
        dense.weight.requires_grad_(False)
        share = None if mask == "fixed" else 0.5
        nm, rows = (NMConv2d, SparseConv2d) if dense is conv else (NMLinear, SparseLinear)
        for layer in (
            nm.from_dense(dense, keep, mask=mask),
            rows.from_dense(dense, mask=mask, sparsity=share),
        ):
            back = layer.to_dense()
            assert type(back) is type(dense) and repr(back) == repr(dense)
            assert_bitwise_equal(back.weight, dense.weight, "the weight there and back")
            assert layer.sparsity == pytest.approx(0.5) and not weight_of(layer).requires_grad


def test_training_a_fixed_mask_keeps_it():
    layer = NMLinear(8, 6, keep=KEEP)
    before = layer.packed()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        layer(LINEAR()).square().sum().backward()
        optimizer.step()
    after = layer.packed()
    assert not torch.equal(before.values, after.values)
    assert after.to_dense().ne(0).sum() == before.values.numel()


@pytest.mark.parametrize("mask", MASKS)
def test_autocast(mask):
    layer = SparseConv2d(8, 6, 3, sparsity=0.5, mask=mask, activation="gelu")
    x = CONV().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x, torch.randn(2, 6, 7, 5))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == weight_of(layer).grad.dtype == torch.float32


@pytest.mark.parametrize("mask", MASKS)
def test_compiles_to_one_graph(mask):
    for name in ("NMLinear", "SparseConv2d v=3"):
        make, x = LAYERS[name]
        layer, x = make(mask=mask), x().requires_grad_()
        results = []
        torch._dynamo.reset()
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        for module in (layer, compiled):
            y = module(x)
            wanted = [x, *module.parameters()]
            results.append([y, *torch.autograd.grad(y.square().sum(), wanted)])
            with torch.no_grad():
                results[-1].append(module(x))
        torch.testing.assert_close(*results)


@pytest.mark.full
def test_inductor_compiles_an_ste_mask():
    layer, x = NMConv2d(8, 6, 3, keep=KEEP, mask="sr-ste"), CONV()
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True)
    gradients = []
    for module in (layer, compiled):
        gradients.append(torch.autograd.grad(module(x).square().sum(), list(module.parameters())))
    torch.testing.assert_close(*gradients)


class Net(nn.Module):
    """Layers of every kind: two that suit, and those that stay dense."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 8, 3, padding=1)
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 1))
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.mirrored = nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")
        self.tied = nn.Linear(8, 8)
        self.tied_too = nn.Linear(8, 8)
        self.tied_too.weight = self.tied.weight
        self.out = nn.Linear(8, 4)

    def forward(self, x):
        y = self.mirrored(self.grouped(self.body(self.head(x)))).flatten(2).transpose(1, 2)
        return self.out(self.tied_too(self.tied(y)))


def pruned_net(keep):
    net = Net()
    with torch.no_grad():
        for layer in (net.body[0], net.body[2], net.out):
            layer.weight.copy_(ops.nm_prune(layer.weight.detach(), keep))
    return net


def test_convert_replaces_layers_and_says_which_stay_dense():
    keep = Keep(2, of=4)
    net, x = pruned_net(keep), torch.randn(2, 3, 6, 5)
    expected = net(x)
    dense = convert(net, keep=keep, exclude="head")
    assert dense == {
        "grouped": "sparse layers have groups = 1 only, not 8",
        "mirrored": 'sparse layers pad by zeros only, not by "reflect"',
        "tied": "its weight is shared by tied, tied_too",
        "tied_too": "its weight is shared by tied, tied_too",
    }
    assert [type(m) for m in (net.body[0], net.body[2], net.out)] == [NMConv2d, NMConv2d, NMLinear]
    assert type(net.head) is nn.Conv2d
    torch.testing.assert_close(net(x), expected)


def test_convert_unstructured():
    net, x = pruned_net(Keep(1, of=4, v=2)), torch.randn(2, 3, 6, 5)
    expected = net(x)
    dense = convert(net, v=2)
    assert dense["head"].startswith("no weight is zero")
    assert isinstance(net.body[0], SparseConv2d) and net.body[0].v == 2
    torch.testing.assert_close(net(x), expected)
    dense_weights = Net()
    convert(dense_weights, mask="sr-ste", sparsity=0.9)
    assert dense_weights.body[0].mask == "sr-ste"
    assert dense_weights.head.sparsity == pytest.approx(0.9, abs=0.01)


def test_convert_changes_nothing_where_one_layer_does_not_suit():
    net = pruned_net(Keep(2, of=4))
    kinds = [type(m) for m in net.modules()]
    with pytest.raises(ValueError, match=r"^head: .*does not divide into groups of m = 4"):
        convert(net, keep=Keep(2, of=4))
    with pytest.raises(ValueError, match=r"^body\.0: .*more than 1 weights per 4.*nm_prune"):
        convert(net, keep=Keep(1, of=4), exclude="head")
    assert [type(m) for m in net.modules()] == kinds


def test_convert_leaves_tails_dense_where_asked():
    keep = Keep(2, of=4, tail="dense")
    net = pruned_net(keep)
    dense = convert(net, keep=keep)
    assert dense["head"].startswith("weight (8, 3, 3, 3) does not divide into groups of m = 4")
    assert isinstance(net.out, NMLinear)


def test_a_pruned_model_becomes_one_of_sparse_layers():
    """ISS-P in N:M from the first step to sparse layers, whose results are the dense ones."""
    keep = Keep(1, of=4, v=2, tail="dense")
    net, x = Net(), torch.randn(2, 3, 6, 5)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    pruner = issp.attach(net, optimizer, sparsity=keep, shrink=0.5)
    for _ in range(4):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
    pruner.finalize()
    expected = net(x)
    dense = convert(net, keep=keep)
    assert set(dense) == {"head", "grouped", "mirrored", "tied", "tied_too"}
    assert net.body[0].sparsity == 0.75
    torch.testing.assert_close(net(x), expected)


def test_second_derivatives_of_an_ste_mask_say_why_not():
    layer, x = NMLinear(8, 6, keep=KEEP, mask="ste"), LINEAR()
    (first,) = torch.autograd.grad(layer(x).square().sum(), layer.weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        first.square().sum().backward()


def test_the_activation_is_one_with_the_product_outside_training(monkeypatch):
    layer = NMConv2d(8, 6, 3, keep=KEEP, activation="gelu").eval()
    x = CONV()
    expected = F.gelu(F.conv2d(x, layer.packed().to_dense(), layer.bias))
    forbidden = dict.fromkeys(("none", "relu", "gelu"))
    monkeypatch.setattr(issp.ops.sparse, "ACTIVATIONS", forbidden)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())
