"""Activations, residual additions and pixel shuffles of a packed model, done by its layers."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import issp
from issp.deploy import pack as pack_module
from issp.deploy import tracing
from issp.deploy.fused_forward import FusedForward, remove_
from issp.deploy.fusion import fuse
from issp.deploy.paths import WholeRowsPixelShuffle
from issp.nn import SparseConv2d
from issp.nn.pixel_shuffle import PixelShuffle
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import copies, prune_
from tests.sr.networks import every_small, small_edsr

X = (2, 4, 9, 7)


class Block(nn.Module):
    """Two convolutions, and what `between` and `after` make of their results."""

    def __init__(self, between, after, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.act = nn.ReLU(inplace=True)
        self.between, self.after = between, after

    def forward(self, x):
        return self.after(x, self.conv2(self.between(self, self.conv1(x))))


def plain(block, y):
    return y


def last(x, y):
    return y


def add_to_result(x, y):
    y += x
    return y


def add_to_input(x, y):
    x = x * 1.0
    x += y
    return x


# What stands between the layers and behind them -> arguments that the layers get.
FUSED = [
    (lambda b, y: F.relu(y), last, ["relu", None]),
    (lambda b, y: F.relu(y, inplace=True), last, ["relu", None]),
    (lambda b, y: b.act(y), last, ["relu", None]),
    (lambda b, y: y.relu_(), last, ["relu", None]),
    (lambda b, y: torch.relu(y), lambda x, y: x + y, ["relu", "x"]),
    (lambda b, y: F.gelu(y), lambda x, y: y + x, ["gelu", "x"]),
    (plain, lambda x, y: torch.add(x, y), [None, "x"]),
    (plain, add_to_result, [None, "x"]),
    (plain, lambda x, y: F.relu(y) + x, [None, "relu x"]),
    (plain, lambda x, y: F.relu(y + x), [None, "x"]),
    (plain, add_to_input, [None, "x"]),  # torch.fx records + for +=
]
UNFUSED = [
    (lambda b, y: F.gelu(y, approximate="tanh"), last),
    (lambda b, y: F.leaky_relu(y), last),
    (lambda b, y: F.relu(y) + y, last),
    (plain, lambda x, y: (x * 1.0).add_(y)),
    (plain, lambda x, y: x[:1] + y),
    (plain, lambda x, y: torch.add(x, y, alpha=2)),
    (plain, lambda x, y: y + 1.0),
    (plain, lambda x, y: y + y),
]


def pack(model, cache, shape=X):
    return issp.pack(prune_(model, 0.7).eval(), torch.randn(shape), cache=cache)


def calls(module):
    """What the program passes to each sparse layer, in words; None: nothing."""
    source = module._fused_program._source
    said = []
    for name in ("conv1", "conv2"):
        call = next(line for line in source.splitlines() if f"self.{name}(" in line)
        activation = "relu" if "'relu'" in call else "gelu" if "'gelu'" in call else ""
        residual = "x" if "residual = " in call and "residual = None" not in call else ""
        said.append(" ".join(filter(None, (activation, residual))) or None)
    return said


def own_result(module, *args):
    """Of the module without its program."""
    module = copy.deepcopy(module)
    remove_(module)
    return module(*args)


@pytest.mark.parametrize(("between", "after", "expected"), FUSED)
@torch.no_grad()
def test_layers_do_what_lies_between_them(between, after, expected, cache, timed):
    packed = pack(Block(between, after), cache)
    assert isinstance(packed.conv1, SparseConv2d) and calls(packed) == expected
    for shape in (X, (1, 4, 12, 17)):
        x = torch.randn(shape)
        y, own = packed(x.clone()), own_result(packed, x.clone())
        # GELU of the op and of torch differ in the last bits.
        if "gelu" in expected:
            torch.testing.assert_close(y, own, rtol=1e-6, atol=1e-7)
        else:
            assert_bitwise_equal(y, own, "the result")


@pytest.mark.parametrize(("between", "after"), UNFUSED)
@torch.no_grad()
def test_what_a_layer_cannot_do_stays(between, after, cache, timed):
    packed = pack(Block(between, after), cache)
    assert isinstance(packed.conv1, SparseConv2d) and not isinstance(packed, FusedForward)
    x = torch.randn(X)
    assert packed(x).shape == X


@torch.no_grad()
def test_a_factor_joins_the_addition(cache, timed):
    packed = pack(Block(plain, lambda x, y: F.relu(x + torch.tanh(y) * 0.1)), cache)
    assert not isinstance(packed, FusedForward)  # alone it is no reason
    packed = pack(Block(lambda b, y: F.relu(y), lambda x, y: x + torch.tanh(y) * 0.1), cache)
    assert "alpha = 0.1" in packed._fused_program._source
    x = torch.randn(X)
    torch.testing.assert_close(packed(x), own_result(packed, x), rtol=1e-6, atol=1e-7)


@torch.no_grad()
def test_a_convolution_scales_before_the_addition(cache, timed):
    packed = pack(Block(plain, lambda x, y: x + F.relu(y) * 0.1), cache)
    source = packed._fused_program._source
    assert "scale = 0.1" in source and "shuffle = 1" in source and " + " not in source
    for shape in (X, (1, 4, 12, 17)):
        x = torch.randn(shape)
        assert_bitwise_equal(packed(x), own_result(packed, x), "the result")


class Upsampler(nn.Module):
    """A convolution and a PixelShuffle, a module or a function."""

    def __init__(self, own):
        super().__init__()
        self.conv = nn.Conv2d(4, 36, 3, padding=1)
        self.shuffle = nn.PixelShuffle(3) if own else None

    def forward(self, x):
        y = F.relu(self.conv(x))
        return self.shuffle(y) if self.shuffle else F.pixel_shuffle(y, 3)


@pytest.mark.parametrize("own", [True, False])
@torch.no_grad()
def test_a_convolution_shuffles_pixels(own, cache, timed):
    packed = pack(Upsampler(own), cache)
    assert "shuffle = 3" in packed._fused_program._source
    for shape in (X, (1, 4, 12, 17)):
        x = torch.randn(shape)
        assert_bitwise_equal(packed(x), own_result(packed, x), "the result")


@torch.no_grad()
def test_a_hook_on_a_shuffle_runs(cache, timed):
    packed, seen = pack(Upsampler(True), cache), []
    packed.shuffle.register_forward_hook(lambda *_: seen.append(1))
    packed(torch.randn(X))
    assert seen == [1]


def test_a_packed_upsampler_has_gradients(cache, timed):
    packed = pack(Upsampler(False), cache)
    x = torch.randn(X, requires_grad=True)
    (gradient,) = torch.autograd.grad(packed(x).square().sum(), x)
    dense = issp.unpack(packed)
    (expected,) = torch.autograd.grad(dense(x).square().sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


class TestWhereTheProgramDoesNotHold:
    """There the module computes by its own `forward`."""

    @pytest.fixture(name="packed")
    def packed_fixture(self, cache, timed):
        packed = pack(nn.Sequential(Block(lambda b, y: F.relu(y), lambda x, y: x + y)), cache)
        assert isinstance(packed, FusedForward)
        return packed

    def test_a_hook_on_a_module_that_the_program_passes_by_runs(self, packed):
        seen = []
        handle = packed[0].register_forward_hook(lambda *_: seen.append(1))
        with torch.no_grad():
            hooked = packed(x := torch.randn(X))
            handle.remove()
            assert_bitwise_equal(hooked, packed(x), "the result")
        assert seen == [1]

    def test_hooks_before_packing_keep_their_module(self, cache, timed):
        block, seen = Block(lambda b, y: F.relu(y), lambda x, y: x + y), []
        model = nn.Sequential(block)
        block.register_forward_hook(lambda *_: seen.append(1))
        packed = pack(model, cache)
        seen.clear()
        with torch.no_grad():
            packed(torch.randn(X))
        assert seen == [1]
        assert isinstance(packed[0], FusedForward) and not isinstance(packed, FusedForward)

    def test_a_hook_on_a_fused_activation_runs(self, cache, timed):
        block, seen = Block(lambda b, y: b.act(y), lambda x, y: x + y), []
        packed = pack(block, cache)
        assert calls(packed)[0] == "relu"
        with torch.no_grad():
            packed(x := torch.randn(X))
            packed.act.register_forward_hook(lambda *_: seen.append(1))
            packed(x)
        assert seen == [1]
        block.act.register_forward_hook(lambda *_: seen.append(2))
        again = pack(block, cache)  # and it does not stop the addition
        assert calls(again) == [None, "x"]
        seen.clear()
        with torch.no_grad():
            again(x)
        assert seen == [2]

    def test_dropout_that_is_switched_on_by_itself_drops(self, cache, timed):
        packed = pack(Block(lambda b, y: b.drop(F.relu(y)), last, drop=nn.Dropout(0.5)), cache)
        assert isinstance(packed, FusedForward)
        packed.drop.train()
        with torch.no_grad():
            x = torch.randn(X)
            assert not torch.equal(packed(x), packed(x))

    def test_hooks_of_layers_see_what_the_layer_gives(self, packed):
        seen = []
        packed[0].conv1.register_forward_hook(lambda m, args, y: seen.append(y))
        with torch.no_grad():
            packed(torch.randn(X))
        assert seen[0].min() == 0

    def test_training_mode_and_gradients(self, packed):
        x = torch.randn(X, requires_grad=True)
        packed(x).sum().backward()
        own = x.grad.clone()
        x.grad = None
        packed.train()(x).sum().backward()
        assert_bitwise_equal(x.grad, own, "the gradient")

    def test_autocast(self, packed):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = torch.randn(X)
            y = packed(x)
            assert y.dtype == torch.float32
            assert_bitwise_equal(y, own_result(packed, x), "the result")

    def test_the_trace_of_another_is_the_models_own(self, packed):
        graph = torch.fx.symbolic_trace(packed).graph
        assert F.relu in {node.target for node in graph.nodes}


class TestModule:
    """A packed model remains an ordinary module of its class."""

    @pytest.fixture(name="packed")
    def packed_fixture(self, cache, timed):
        packed = pack(small_edsr(), cache, (1, 3, 8, 8))
        assert isinstance(packed, FusedForward)
        return packed

    @torch.no_grad()
    def test_copied_and_pickled(self, packed):
        x = torch.rand(1, 3, 11, 9)
        for other in copies(packed):
            assert isinstance(other, FusedForward) and other._fused_program.module is other
            assert_bitwise_equal(other(x), packed(x), "the result")
            other.conv_first.bias += 1.0
            assert not torch.equal(other(x), packed(x))

    def test_its_class_and_signature(self, packed):
        assert isinstance(packed, issp.models.EDSR) and type(packed).__name__ == "EDSR"
        assert list(packed.state_dict()) != [] and "_fused_program" not in packed.state_dict()
        with pytest.raises(ValueError, match="takes images"):
            packed(torch.rand(3, 8, 8))

    def test_unpacked_it_is_of_its_own_class(self, packed):
        unpacked = issp.unpack(packed)
        assert type(unpacked) is issp.models.EDSR
        assert not any(isinstance(m, FusedForward) for m in unpacked.modules())


@every_small
@torch.no_grad()
def test_every_network_gives_its_own_result(make, cache, timed):
    network, size = make(), 16
    packed = issp.pack(prune_(network).eval(), torch.rand(1, 3, size, size), cache=cache)
    assert any(isinstance(m, FusedForward) for m in packed.modules())
    x = torch.rand(2, 3, size, size)
    torch.testing.assert_close(packed(x), network(x), rtol=1e-4, atol=1e-5)


class Stubborn(nn.Module):
    """Its control flow depends on the input; its child's does not."""

    def __init__(self):
        super().__init__()
        self.inner = Block(lambda b, y: F.relu(y), lambda x, y: x + y)
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        if x.mean() > 0:
            return self.inner(self.conv(x))
        return self.conv(self.inner(x))


@torch.no_grad()
def test_control_flow_leaves_the_children_their_programs(cache, timed):
    packed = pack(Stubborn(), cache)
    assert not isinstance(packed, FusedForward) and isinstance(packed.inner, FusedForward)
    for x in (torch.rand(X), -torch.rand(X)):
        unfused = copy.deepcopy(packed)
        remove_(unfused.inner)
        assert_bitwise_equal(packed(x), unfused(x), "the result")


@torch.no_grad()
def test_a_program_that_computes_something_else_is_not_used(cache, timed, monkeypatch):
    def wrong(trace):
        fusion = fuse(trace)
        output = next(node for node in fusion.graph.nodes if node.op == "output")
        with fusion.graph.inserting_before(output):
            output.args = (fusion.graph.call_function(torch.mul, (output.args[0], 1.5)),)
        return fusion

    monkeypatch.setattr(pack_module, "SPARSE", replace(pack_module.SPARSE, fuse=wrong))
    packed = pack(Block(lambda b, y: F.relu(y), lambda x, y: x + y), cache)
    assert not isinstance(packed, FusedForward)


@torch.no_grad()
def test_pixel_shuffle_of_any_network_in_whole_rows(cache, timed):
    net = prune_(nn.Sequential(nn.Conv2d(4, 16, 3, padding=1), nn.PixelShuffle(2))).eval()
    packed = issp.pack(net, torch.randn(X), cache=cache)
    assert isinstance(packed[1], WholeRowsPixelShuffle) and isinstance(packed[1], PixelShuffle)
    x = torch.randn(X)
    assert_bitwise_equal(packed[1](packed[0](x)), packed(x), "the result")
    assert type(issp.unpack(packed)[1]) is nn.PixelShuffle and type(net[1]) is nn.PixelShuffle


def test_results_are_compared_in_every_form():
    x = torch.ones(3)
    same = tracing.same_result
    assert same({"a": [x, (x, 1)]}, {"a": [x + 1e-4, (x, 1)]}, 1e-3)
    assert not same({"a": [x, (x, 1)]}, {"a": [x + 1e-2, (x, 1)]}, 1e-3)
    assert not same([x], [x, x], 1.0) and not same({"a": x}, {"b": x}, 1.0)
    assert not same(x, x.double(), 1.0) and not same(x, x[:2], 1.0) and not same((x, 1), (x, 2), 1)
    assert same(x * 0, x * 0, 0.0) and not same(x > 0, x < 0, 1.0)
