"""Parts of a packed model that stay in the tile layout of matrix engines, in bfloat16."""

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

import issp
from issp.deploy import parts, tiling
from issp.deploy.fused_forward import FusedForward
from issp.deploy.tiled_layers import (
    PictureConv2d,
    TapConv2d,
    TiledConv2d,
    TiledLinear,
    picture_to_tiles,
    tiled_layer,
    unsupported_reason,
)
from issp.ops.schemas.tiles import chain_layers
from issp.ops.tiles import TiledWeight, from_tiles, tiled_conv2d, tiled_conv2d_by_taps, to_tiles
from issp.sr.models.layers import Mlp
from tests.asserts import assert_bitwise_equal
from tests.deploy.networks import copies, line, prune_
from tests.deploy.test_fusion import Block
from tests.sr.networks import small_edsr, small_swinir

X = (2, 4, 9, 7)


@pytest.fixture(autouse=True)
def engine(monkeypatch):
    """Without a matrix engine the same bits are computed, slowly."""
    monkeypatch.setattr(parts, "tiles_supported", lambda: True)


@pytest.fixture(name="timed")
def timed_fixture(timed):
    timed["tiles"] = 0.5
    return timed


def pack(model, cache, shape=X):
    example = torch.randn(shape)
    return issp.pack(prune_(model, 0.7).eval(), example, cache=cache, dtype=torch.bfloat16)


def source(packed):
    return packed._fused_program._source


def conversions(packed):
    return [source(packed).count(f"_{name}(") for name in ("to_tiles", "from_tiles")]


def chains(packed):
    """The plans of the chains of a program."""
    plans = re.findall(r"compute_chain\(\([^()]*\), \([^()]*\), \(([-\d, ]+)\)", source(packed))
    return [chain_layers([int(number) for number in plan.split(",")]) for plan in plans]


def tiled(layer, t, **epilogue):
    """What the op makes of an image in tiles."""
    weight = TiledWeight.from_weight(layer.weight, layer.v)
    return tiled_conv2d(t, weight, layer.bias.float(), **epilogue)


class TestRuns:
    @torch.no_grad()
    def test_a_residual_block_is_converted_once_at_each_end(self, cache, timed):
        block = Block(lambda b, y: F.relu(y), lambda x, y: x + y * 0.5)
        packed = pack(block, cache)
        assert isinstance(packed.conv1, TiledConv2d) and isinstance(packed.conv2, TiledConv2d)
        assert conversions(packed) == [1, 1]
        for shape in (X, (1, 4, 12, 17)):
            x = torch.randn(shape)
            t = to_tiles(x)
            y = tiled(packed.conv1, t, activation="relu")
            y = tiled(packed.conv2, y, scale=0.5, residual=t)
            assert_bitwise_equal(packed(x), from_tiles(y), "the result")
            torch.testing.assert_close(packed(x), block(x), rtol=0.05, atol=0.05)

    @torch.no_grad()
    def test_a_whole_network_with_shuffles(self, cache, timed):
        network = small_edsr(upscale=4, num_block=2, res_scale=0.1)
        packed = pack(network, cache, (1, 3, 8, 8))
        # The last layer, of three channels, gives what torch reads.
        assert conversions(packed) == [1, 0] and isinstance(packed.conv_last, TapConv2d)
        assert [layer.shuffle for layer in chains(packed)[0]] == [1, 1, 1, 1, 1, 1, 2, 2]
        x = torch.rand(2, 3, 11, 9)
        assert packed(x).dtype == torch.float32
        torch.testing.assert_close(packed(x), network(x), rtol=0.01, atol=0.01)

    @torch.no_grad()
    def test_a_layer_of_few_channels_rounds_once_to_what_the_model_gives(self, cache, timed):
        def network(channels):
            layers = [nn.Conv2d(4, 8, 3, padding=1), nn.ReLU()]
            return nn.Sequential(*layers, nn.Conv2d(8, channels, 3, padding=1), nn.ReLU())

        for channels in (1, 3):
            for dtype in (torch.float32, torch.bfloat16):
                packed = pack(network(channels), cache).to(dtype)
                x = torch.randn(X).to(dtype)
                packed = issp.pack(packed, x, cache=cache, dtype=torch.bfloat16)
                assert conversions(packed) == [1, 0] and isinstance(packed[2], TapConv2d)
                t = tiled(packed[0], to_tiles(x), activation="relu")
                w = TiledWeight.from_taps(packed[2].weight)
                y = tiled_conv2d_by_taps(t, w, packed[2].bias.float())
                assert_bitwise_equal(packed(x), F.relu(y.to(dtype)), f"{channels} in {dtype}")
        packed = pack(network(4), cache)
        assert conversions(packed) == [1, 1] and isinstance(packed[2], TiledConv2d)

    @torch.no_grad()
    def test_pictures_are_not_rounded(self, cache, timed):
        torch.manual_seed(0)
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
        packed = pack(nn.Sequential(*layers), cache, (1, 3, 8, 8))
        first = packed[0]
        assert isinstance(first, PictureConv2d) and conversions(packed) == [1, 1]
        x = torch.randint(0, 256, (2, 3, 11, 9)) / 255
        exact = F.conv2d(x.double(), first.weight.double(), first.bias.double(), padding=1)
        y = first(x).double()
        # bfloat16 has 8 bits; what else is lost is some 2^-16 of the largest product.
        half_ulp = torch.exp2(exact.abs().log2().floor() - 8)
        assert ((y - exact).abs() <= half_ulp + 2**-15).all()
        t = tiled_conv2d(picture_to_tiles(x), *first._derived(), activation="relu")
        expected = from_tiles(tiled(packed[2], t))
        assert_bitwise_equal(packed(x), expected, "the result")
        x[0, 0, 5, 5] = torch.inf
        assert torch.equal(first(x).isnan(), F.conv2d(x, first.weight, padding=1).isnan())

    @torch.no_grad()
    def test_no_result_lies_where_a_picture_was(self, cache, timed):
        layers = [nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 1), nn.Conv2d(3, 3, 1)]
        packed = pack(nn.Sequential(*layers), cache, (1, 3, 8, 8))
        assert isinstance(packed[0], PictureConv2d) and isinstance(packed[2], TiledConv2d)
        x = torch.rand(2, 3, 11, 9)
        y = tiled_conv2d(picture_to_tiles(x), *packed[0]._derived())
        for layer in (packed[1], packed[2]):
            y = tiled(layer, y)
        assert_bitwise_equal(packed(x), from_tiles(y), "the result")

    @torch.no_grad()
    def test_few_channels_within_a_network(self, cache, timed):
        layers = [nn.Conv2d(4, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)]
        packed = pack(nn.Sequential(*layers, nn.Conv2d(2, 8, 3, padding=1)), cache)
        assert conversions(packed) == [3, 1]
        x = torch.randn(X)
        torch.testing.assert_close(packed(x), issp.unpack(packed)(x), rtol=0.02, atol=0.02)

    @torch.no_grad()
    def test_layers_write_where_nobody_reads_any_more(self, cache, timed, monkeypatch):
        network = small_edsr(num_block=4)
        packed = pack(network, cache, (1, 3, 8, 8))
        # New memory: the head, which is read at the end again, the two of a block, the upsampling.
        (layers,) = chains(packed)
        assert len(layers) == 11 and len({layer.target for layer in layers}) == 4
        x = torch.rand(2, 3, 11, 9)
        y = packed(x)
        monkeypatch.setattr(tiling, "_reuse_memory", lambda *_: None)
        own = pack(network, cache, (1, 3, 8, 8))
        assert len({layer.target for layer in chains(own)[0]}) == 11
        assert_bitwise_equal(y, own(x), "the result")
        assert_bitwise_equal(y, packed(x), "the second result")

    @torch.no_grad()
    def test_a_chain_writes_into_what_it_is_given(self, cache, timed, monkeypatch):
        """Its input is a conversion that nobody else reads, of the shape of a result."""
        block = Block(lambda b, y: F.relu(y), lambda x, y: y)
        packed = pack(block, cache)
        first, second = chains(packed)[0]
        assert (first.target, second.target) == (1, 0)
        x = torch.randn(X)
        kept = x.clone()
        monkeypatch.setattr(tiling, "_runs", lambda *_: [])
        single = pack(block, cache)
        assert not chains(single)
        assert_bitwise_equal(packed(x), single(x), "the result")
        assert_bitwise_equal(x, kept, "the input")

    @torch.no_grad()
    def test_a_chain_ends_where_others_read_its_result(self, cache, timed):
        class Skip(Block):
            def forward(self, x):
                y = F.relu(self.conv2(self.conv1(x)))
                return self.conv1(self.conv2(F.leaky_relu(self.conv1(self.conv2(y)))) + y)

        packed = pack(Skip(None, None), cache)
        assert [len(layers) for layers in chains(packed)] == [2, 2, 2]
        conv1, conv2, x = packed.conv1, packed.conv2, torch.randn(X)
        t = tiled(conv2, tiled(conv1, to_tiles(x)), activation="relu")
        y = F.leaky_relu(from_tiles(tiled(conv1, tiled(conv2, t))))
        y = tiled(conv1, tiled(conv2, to_tiles(y), residual=t))
        assert_bitwise_equal(packed(x), from_tiles(y), "the result")

    @torch.no_grad()
    def test_what_no_layer_can_compute_stands_between_two_runs(self, cache, timed):
        packed = pack(Block(lambda b, y: F.leaky_relu(y), lambda x, y: y), cache)
        assert conversions(packed) == [2, 2]
        x = torch.randn(X)
        y = F.leaky_relu(from_tiles(tiled(packed.conv1, to_tiles(x))))
        assert_bitwise_equal(packed(x), from_tiles(tiled(packed.conv2, to_tiles(y))), "the result")

    @torch.no_grad()
    def test_a_result_that_is_read_inside_and_outside(self, cache, timed):
        packed = pack(Block(lambda b, y: y, lambda x, y: (y, y.mean())), cache)
        y, mean = packed(torch.randn(X))
        assert torch.equal(mean, y.mean())

    @torch.no_grad()
    def test_tokens(self, cache, timed):
        mlp = Mlp(8, 2.0, 0.1)
        for shape in ((2, 6, 5, 8), (2, 6, 8), (7, 8), (3, 2, 2, 5, 8)):
            packed = pack(mlp, cache, shape)
            assert isinstance(packed.fc1, TiledLinear)
            assert [layer.activation for layer in chains(packed)[0]] == [2, 0]
            assert [source(packed).count(f"tokens_{x}_tiles(") for x in ("to", "from")] == [1, 1]
            x = torch.randn(shape)
            assert packed(x).shape == shape and packed(x).is_contiguous()
            torch.testing.assert_close(packed(x), mlp(x), rtol=0.05, atol=0.02)

    @torch.no_grad()
    def test_a_network_that_cannot_be_traced_as_a_whole(self, cache, timed):
        network = small_swinir()
        packed = pack(network, cache, (1, 3, 16, 16))
        blocks = packed.layers[0].residual_group["blocks"]
        assert all(isinstance(block.mlp, FusedForward) for block in blocks)
        x = torch.rand(1, 3, 24, 16)
        torch.testing.assert_close(packed(x), network(x), rtol=0.02, atol=0.02)


class TestChoice:
    def test_parts_that_are_slower_in_tiles_stay_without(self, cache, timed):
        timed["tiles"] = 1.5
        packed = pack(Block(lambda b, y: F.relu(y), lambda x, y: x + y), cache)
        assert isinstance(packed.conv1, issp.nn.SparseConv2d)
        assert line(packed, "conv1").choice == "rows"

    def test_the_report_says_what_a_run_brings(self, cache, timed):
        packed = pack(Block(lambda b, y: F.relu(y), lambda x, y: x + y), cache)
        said = line(packed, "conv1")
        assert said.choice == "tiles v=16" and said.is_sparse
        assert said.reason == (
            "in a run of 2 layers that is 6.00 times as fast as dense and 2.00 times as fast as "
            "in its own dtype"
        )
        assert "tiles v=16" in packed.report()

    def test_without_an_engine_one_line_says_so(self, cache, timed, monkeypatch):
        monkeypatch.setattr(parts, "tiles_supported", lambda: False)
        packed = pack(Block(lambda b, y: F.relu(y), lambda x, y: x + y), cache)
        assert isinstance(packed.conv1, issp.nn.SparseConv2d)
        assert line(packed, "conv1").reason.endswith(parts.NO_ENGINE)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
    def test_another_dtype_is_refused(self, dtype):
        with pytest.raises(ValueError, match="torch.bfloat16"):
            issp.pack(nn.Linear(2, 2), torch.rand(2), dtype=dtype)

    @pytest.mark.parametrize(
        ("layer", "reason"),
        [
            (nn.Conv2d(4, 4, 5, padding=2), "3x3 and 1x1"),
            (nn.Conv2d(4, 4, 3), "3x3 and 1x1"),
            (nn.Conv2d(4, 4, 3, padding=1, stride=2), "3x3 and 1x1"),
            (nn.Conv2d(4, 4, 3, padding=2, dilation=2), "3x3 and 1x1"),
            (nn.Conv2d(4, 4, 3, padding=1, groups=2), "groups"),
            (nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), "padding than zeros"),
            (nn.ConvTranspose2d(4, 4, 3, padding=1), "ConvTranspose2d"),
            (nn.Conv2d(4, 4, 3, padding="same"), ""),
            (nn.Conv2d(4, 4, 1, padding="valid"), ""),
            (nn.Linear(4, 4), ""),
        ],
    )
    def test_unsupported_layers(self, layer, reason):
        assert reason in unsupported_reason(layer) and bool(reason) == bool(
            unsupported_reason(layer)
        )

    def test_rows_per_unit(self):
        weight = torch.zeros(64, 64)
        weight[::2] = 1.0
        assert parts.rows_per_unit(weight) == 32
        weight = torch.zeros(64, 64)
        weight[:16, :32] = weight[16:32, 32:] = 1.0
        assert parts.rows_per_unit(weight) == 16


class TestModule:
    @pytest.fixture(name="packed")
    def packed_fixture(self, cache, timed):
        return pack(small_edsr(), cache, (1, 3, 8, 8))

    @torch.no_grad()
    def test_copied_pickled_and_loaded(self, packed):
        x = torch.rand(1, 3, 11, 9)
        y = packed(x)
        for other in copies(packed):
            assert_bitwise_equal(other(x), y, "the result")
            state = {name: 2 * value for name, value in other.state_dict().items()}
            other.load_state_dict(state)
            assert not torch.equal(other(x), y)
        assert_bitwise_equal(packed(x), y, "the result")

    def test_gradients_are_those_of_the_dense_network(self, packed):
        dense = issp.unpack(packed)
        assert type(dense.conv_first) is nn.Conv2d
        x = torch.rand(1, 3, 8, 8)
        for network in (packed, dense):
            network(x).square().sum().backward()
        for (name, one), other in zip(packed.named_parameters(), dense.parameters(), strict=True):
            assert_bitwise_equal(one.grad, other.grad, name)

    def test_the_state_is_the_dense_one(self, packed):
        assert list(packed.state_dict()) == list(small_edsr().state_dict())
        assert issp.unpack(packed).state_dict().keys() == packed.state_dict().keys()

    @torch.no_grad()
    def test_a_hook_on_a_layer_sees_torchs_tensors(self, packed):
        seen = []
        packed.conv_after_body.register_forward_hook(lambda m, args, y: seen.append((*args, y)))
        packed(torch.rand(1, 3, 8, 8))
        assert [type(x) for x in seen[0]] == [torch.Tensor, torch.Tensor]

    @torch.no_grad()
    def test_other_hooks_and_a_forward_of_the_user(self, packed):
        x, seen = torch.rand(1, 3, 8, 8), []
        y = packed(x)
        torch.nn.modules.module.register_module_forward_hook(note := lambda m, *_: seen.append(m))
        try:
            packed(x)
        finally:
            torch.nn.modules.module._global_forward_hooks.clear()
        assert note and packed.body[0].conv1 in seen and packed.body[0] in seen
        layer = packed.body[0].conv1
        layer.forward = lambda input: torch.zeros_like(input)
        assert not torch.equal(packed(x), y)
        del layer.forward
        assert_bitwise_equal(packed(x), y, "the result")

    def test_threads_share_a_model(self, packed):
        images = [torch.rand(1, 3, 20 + i, 30) for i in range(4)]

        @torch.no_grad()
        def results(_=None):
            return [packed(x) for x in images]

        expected = results()
        with ThreadPoolExecutor(4) as pool:
            for several in pool.map(results, range(8)):
                for y, x in zip(several, expected, strict=True):
                    assert_bitwise_equal(y, x, "in another thread")

    @torch.no_grad()
    def test_exported_and_compiled(self, packed):
        size = {2: Dim("h", min=4, max=64), 3: Dim("w", min=4, max=64)}
        program = torch.export.export(
            packed, (torch.rand(1, 3, 16, 12),), dynamic_shapes=(size,)
        ).module()
        compiled = torch.compile(packed, dynamic=True, backend="aot_eager")
        for height, width in ((16, 12), (9, 31)):
            x = torch.rand(1, 3, height, width)
            torch.testing.assert_close(program(x), packed(x), rtol=0.05, atol=0.02)
            torch.testing.assert_close(compiled(x), packed(x), rtol=0.05, atol=0.02)

    @torch.no_grad()
    def test_packed_again(self, packed, cache):
        again = issp.pack(packed, torch.rand(1, 3, 8, 8), cache=cache)
        assert isinstance(again.conv_first, issp.nn.SparseConv2d)


@torch.no_grad()
def test_a_layer_by_itself_takes_and_gives_torchs_tensors():
    conv = prune_(nn.Conv2d(5, 7, 3, padding=1), 0.5)
    alone = tiled_layer(conv, 16)
    x = torch.randn(2, 5, 6, 9)
    assert_bitwise_equal(alone(x), from_tiles(tiled(alone, to_tiles(x))), "the result")
    assert alone(x.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(alone(x[0]), conv(x[0]))  # without a batch it is torch's
    assert alone.weight is conv.weight
    few = tiled_layer(nn.Conv2d(5, 3, 3, padding=1), 16)
    assert isinstance(few, TapConv2d) and few(x.half()).dtype == torch.float16
    assert_bitwise_equal(few(x), few(to_tiles(x)), "the result of few channels")
    assert few(x[0]).shape == (3, 6, 9)
