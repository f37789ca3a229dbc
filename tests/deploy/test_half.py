"""Parts of a packed model that compute in float16 from one sparse layer to the next."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import issp
from issp.deploy.half_layers import HalfConv2d, HalfLinear, half_layer, rows_per_block
from issp.ops import sparse
from issp.ops.formats import SparseRows
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import copies, line, prune_
from tests.deploy.test_fusion import Block
from tests.sr.networks import every_small, small_edsr

X = (2, 4, 9, 7)


@pytest.fixture(name="timed")
def timed_fixture(timed):
    timed["float16"] = 0.5
    return timed


def pack(model, cache, shape=X):
    example = torch.randn(shape)
    return issp.pack(prune_(model, 0.7).eval(), example, cache=cache, dtype=torch.float16)


def conversions(packed):
    source = packed._fused_program._source
    return [source.count(".half()"), source.count(".to(torch.float32)")]


def computed(conv, x, residual=None, activation="none", scale=1.0):
    """What the op makes of a float16 image."""
    rows = SparseRows.from_dense(conv.weight.half(), conv.v)
    geometry = {"stride": 1, "padding": conv.kernel_size[0] // 2, "dilation": 1}
    bias = conv.bias.half()
    return sparse.conv2d(x, rows, bias, residual, activation, **geometry, scale=scale)


@torch.no_grad()
def test_a_residual_block_is_converted_once_at_each_end(cache, timed):
    packed = pack(Block(lambda b, y: F.relu(y), lambda x, y: x + y * 0.5), cache)
    assert isinstance(packed.conv1, HalfConv2d) and conversions(packed) == [1, 1]
    for shape in (X, (1, 4, 12, 17)):
        x = torch.randn(shape)
        y = computed(packed.conv1, x.half(), activation="relu")
        y = computed(packed.conv2, y, residual=x.half(), scale=0.5)
        assert_bitwise_equal(packed(x), y.float(), "the result")


@torch.no_grad()
def test_layers_without_zeros_stay_outside(cache, timed):
    class Net(Block):
        def forward(self, x):
            return super().forward(self.head(x))

    block = Net(lambda b, y: F.relu(y), lambda x, y: x + y, head=nn.Conv2d(4, 4, 1))
    prune_(block, 0.7)
    nn.init.ones_(block.head.weight)
    packed = issp.pack(block.eval(), torch.randn(X), cache=cache, dtype=torch.float16)
    assert type(packed.head) is nn.Conv2d and isinstance(packed.conv1, HalfConv2d)
    assert conversions(packed) == [1, 1]
    x = torch.randn(X)
    torch.testing.assert_close(packed(x), block(x), rtol=5e-3, atol=5e-3)


@every_small
@torch.no_grad()
def test_every_network(make, cache, timed):
    network = make()
    packed = pack(network, cache, (1, 3, 16, 16))
    assert any(isinstance(m, HalfConv2d | HalfLinear) for m in packed.modules())
    x = torch.rand(2, 3, 16, 16)
    y = packed(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, network(x), rtol=5e-3, atol=5e-3)


@torch.no_grad()
def test_what_is_written_in_place_was_read_before(cache, timed):
    def between(block, y):
        block.seen = y * 1.5
        return F.leaky_relu(y)

    packed = pack(Block(between, lambda x, y: (y, F.relu(y), y + x)), cache)
    x = torch.randn(X)
    y, rectified, added = packed(x)
    assert_bitwise_equal(rectified, F.relu(y), "the activation")
    torch.testing.assert_close(added, y + x, rtol=2e-3, atol=2e-3)


@torch.no_grad()
def test_state_copies_and_report(cache, timed):
    packed = pack(small_edsr(), cache, (1, 3, 8, 8))
    x = torch.rand(1, 3, 9, 11)
    for other in copies(packed):
        assert_bitwise_equal(other(x), packed(x), "the result")
    assert list(packed.state_dict()) == list(small_edsr().state_dict())
    dense = issp.unpack(packed)
    assert_bitwise_equal(dense.conv_first.weight, packed.conv_first.weight, "the weight")
    assert type(dense.conv_first) is nn.Conv2d
    assert line(packed, "conv_first").choice == "float16 v=1"
    assert "times as fast as in its own dtype" in line(packed, "conv_first").reason


def test_rows_per_block():
    weight = torch.zeros(16, 8, 3, 3)
    weight[:, 3, 1, 1] = 1.0
    assert rows_per_block(weight) == 8
    weight[::2] = 0
    assert rows_per_block(weight) == 1
    weight[:4, 5] = weight[12:, 5] = 1.0
    assert rows_per_block(weight) == 4
    assert rows_per_block(torch.rand(3, 2)) == 1


def test_a_layer_by_itself():
    conv = prune_(nn.Conv2d(4, 8, 3, padding=1), 0.6)
    alone = half_layer(conv, conv.weight)
    x = torch.randn(X)
    with torch.no_grad():
        assert_bitwise_equal(alone(x), computed(alone, x.half()).float(), "the result")
        assert alone(x.half()).dtype == torch.float16
    torch.testing.assert_close(alone(x), conv(x))  # torch's, where a gradient may be wanted
    linear = prune_(nn.Linear(4, 8), 0.5)
    with torch.no_grad():
        y = half_layer(linear, linear.weight)(torch.ones(3, 4))
        torch.testing.assert_close(y, linear(torch.ones(3, 4)), rtol=2e-3, atol=2e-3)
