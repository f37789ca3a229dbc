"""The tiled ops as torch sees them: fakes, compilation, export, copies of images."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from issp.ops import TiledWeight, from_tiles, tiled_conv2d, tiled_conv2d_by_taps, to_tiles
from tests.asserts import assert_bitwise_equal
from tests.ops.tiles.cases import CASES, TileCase

# No autograd: they are for inference.
TESTS = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case", [CASES[i] for i in (3, 19)], ids=lambda case: case.name)
def test_opcheck_convolution(case):
    p = case.build()
    args = p.args(case)
    opcheck(torch.ops.issp.tiled_conv2d.default, args, test_utils=TESTS)
    out = torch.ops.issp.tiled_conv2d(*args).zero_()
    opcheck(torch.ops.issp.tiled_conv2d_out.default, (*args, out), test_utils=TESTS)


def test_opcheck_convolution_by_taps():
    x, w = to_tiles(torch.randn(2, 5, 4, 21)), TiledWeight.from_taps(torch.randn(2, 5, 3, 3))
    args = (x.data, w.values, w.positions, w.tile_starts, torch.randn(2), [5, 21, 2, 3])
    opcheck(torch.ops.issp.tiled_conv2d_by_taps.default, args, test_utils=TESTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_opcheck_conversions(dtype):
    x = torch.randn(2, 3, 4, 21).to(dtype)
    opcheck(torch.ops.issp.to_tiles.default, (x,), test_utils=TESTS)
    data = torch.ops.issp.to_tiles(x)
    opcheck(torch.ops.issp.from_tiles.default, (data, 3, 21, dtype), test_utils=TESTS)


@pytest.mark.full
def test_a_chain_compiles_to_one_graph_for_any_size():
    case = TileCase("chain", 16, 16, keep=0.4, activation="relu")
    p = case.build()

    def chain(x):
        t = to_tiles(x)
        y = tiled_conv2d(t, p.w, p.bias, activation="relu")
        return from_tiles(tiled_conv2d(y, p.w, p.bias, t, "none", 0.1))

    compiled = torch.compile(chain, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((5, 20), (7, 33), (4, 50)):
        x = torch.randn(2, 16, *size)
        assert_bitwise_equal(compiled(x), chain(x), f"{size} under compile")


def test_export_with_dynamic_sizes():
    case = TileCase("export", 12, 6, keep=0.4)
    p = case.build()
    last = TiledWeight.from_taps(torch.randn(3, 3, 3, 3))

    class Upscale(torch.nn.Module):
        def forward(self, x):
            t = tiled_conv2d(to_tiles(x), p.w, p.bias, shuffle=2)
            return from_tiles(t) + tiled_conv2d_by_taps(t, last)

    sizes = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2)}
    program = torch.export.export(
        Upscale(), (torch.randn(1, 6, 8, 20),), dynamic_shapes={"x": sizes}
    )
    for size in ((8, 20), (3, 41)):
        x = torch.randn(1, 6, *size)
        assert_bitwise_equal(program.module()(x), Upscale()(x), f"{size} exported")
