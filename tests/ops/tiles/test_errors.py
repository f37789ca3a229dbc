"""What the tiled ops refuse: the sentence, by the public functions and by the raw ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import issp
from issp.ops import (
    TiledImage,
    TiledWeight,
    from_tiles,
    tiled_conv2d,
    tiled_conv2d_by_taps,
    to_tiles,
)
from tests.ops.tiles.cases import TileCase

CASE = TileCase("refused", 32, 6, size=(4, 20), residual=True)
NAMES = ("x", "values", "positions", "tile_starts", "bias", "residual", "geometry", "activation")
NATIVE = issp.backends.active("cpu") == "cpp"


def changed(**changes: Any) -> list[Any]:
    """The raw op's arguments with some replaced."""
    arguments = dict(zip((*NAMES, "scale"), CASE.build().args(CASE), strict=True))
    return list((arguments | changes).values())


def positions(*numbers: int) -> torch.Tensor:
    """The positions of the case, the first of them replaced."""
    changed = CASE.build().w.positions.clone()
    changed.view(-1)[: len(numbers)] = torch.tensor(numbers, dtype=torch.int32)
    return changed


def data(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


TILES = len(CASE.build().w.values)
X = (1, 6, 4, 48, 2)
REFUSED = {
    "dtype of x": (dict(x=data(*X, dtype=torch.float16)), "x has dtype torch.float16"),
    "dimensions of x": (dict(x=data(6, 4, 48, 2)), r"x must be \[N, H \+ 2"),
    "planes of x": (dict(x=data(1, 6, 5, 48, 2)), "x has shape"),
    "pitch of x": (dict(x=data(1, 6, 4, 32, 2)), "x has shape"),
    "rows of x": (dict(x=data(1, 1, 4, 48, 2)), r"x must be \[N, H \+ 2"),
    "strides of x": (dict(x=data(1, 6, 4, 2, 48).mT), "x is not contiguous"),
    "channels": (dict(geometry=[9, 20, 32, 3, 1]), "x has shape"),
    "width": (dict(geometry=[6, 50, 32, 3, 1]), "x has shape"),
    "negative width": (dict(geometry=[6, -1, 32, 3, 1]), "has no tile layout"),
    "kernel": (dict(geometry=[6, 20, 32, 5, 1]), "5 x 5 has no tile layout"),
    "smaller kernel": (dict(geometry=[6, 20, 32, 1, 1]), "positions do not lie"),
    "rows": (dict(geometry=[6, 20, 48, 3, 1]), "tile_starts has shape"),
    "no rows": (dict(geometry=[6, 20, 0, 3, 1]), "has 0 rows"),
    "geometry": (dict(geometry=[6, 20, 32, 3]), "geometry has 4 numbers"),
    "shuffle": (dict(geometry=[6, 20, 32, 3, 3], residual=None), "shuffle is 3"),
    "no shuffle": (dict(geometry=[6, 20, 32, 3, 0]), "shuffle is 0"),
    "residual and shuffle": (dict(geometry=[6, 20, 32, 3, 2]), "residual with shuffle = 2"),
    "residual": (dict(residual=data(1, 6, 16, 48, 2)), "residual has shape"),
    "residual's batch": (dict(residual=data(2, 6, 17, 48, 2)), "residual has shape"),
    "bias": (dict(bias=torch.zeros(31)), "bias has shape"),
    "bias in bfloat16": (dict(bias=data(32)), "bias has dtype torch.bfloat16"),
    "activation": (dict(activation="silu"), 'activation is "silu"'),
    "values' dtype": (dict(values=data(TILES, 1, 16, 32, dtype=torch.float32)), "values has dtype"),
    "values": (dict(values=data(TILES, 3, 16, 32)), "values must be"),
    "values' tiles": (dict(values=data(TILES + 1, 1, 16, 32)), "positions has shape"),
    "positions' dtype": (dict(positions=positions().long()), "positions has dtype"),
    "a position": (dict(positions=positions(16 * 4)), "positions do not lie"),
    "a negative position": (dict(positions=positions(-1)), "positions do not lie"),
    "a tap": (dict(positions=positions(16 + 9)), "positions do not lie"),
    "plane 0 aside": (dict(positions=positions(3)), "positions do not lie"),
    "starts down": (dict(tile_starts=torch.tensor([0, 9, TILES]).int()), "tile_starts must ascend"),
    "starts beyond": (dict(tile_starts=torch.tensor([0, 1, 9]).int()), "tile_starts must ascend"),
    "starts above 0": (dict(tile_starts=torch.tensor([1, 1, TILES]).int()), "tile_starts must"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_arguments(what):
    changes, words = REFUSED[what]
    arguments = changed(**changes)
    with pytest.raises((TypeError, ValueError), match=words):
        issp.backends.implementations("reference")["tiled_conv2d"](*arguments)
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.ops.issp.tiled_conv2d(*arguments)
    out = to_tiles(torch.ones(1, 32, 4, 20)).data
    before = out.clone()
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        torch.ops.issp.tiled_conv2d_out(*arguments, out)
    assert torch.equal(out, before), "nothing is written before a refusal"


@pytest.mark.parametrize("numbers", [(17 + 16,), (16 * 3 + 8, 16 * 3 + 8), (16,)])
def test_positions_in_any_order_are_computed(numbers):
    """Order and repetition protect no memory: they are another sum, in the plan's order."""
    arguments = changed(positions=positions(*numbers))
    expected = issp.backends.implementations("reference")["tiled_conv2d"](*arguments)
    assert torch.equal(torch.ops.issp.tiled_conv2d(*arguments), expected)


def public(**changes: Any) -> TiledImage:
    p = CASE.build()
    return tiled_conv2d(**({"t": p.t, "w": p.w, "bias": p.bias} | changes))


@pytest.mark.parametrize(
    "changes, kind, words",
    [
        (dict(t=to_tiles(torch.ones(1, 8, 4, 20))), ValueError, "has 8 channels"),
        (dict(bias=torch.ones(31)), ValueError, "bias has shape"),
        (dict(bias=torch.ones(32).bfloat16()), TypeError, "bias.float()"),
        (dict(activation="silu"), ValueError, "activation is"),
        (dict(shuffle=3), ValueError, "shuffle is 3"),
        (dict(residual=to_tiles(torch.ones(1, 32, 4, 21))), ValueError, "residual is of shape"),
        (
            dict(shuffle=2, residual=to_tiles(torch.ones(1, 8, 8, 40))),
            ValueError,
            "residual with shuffle = 2",
        ),
        (dict(out=to_tiles(torch.ones(2, 32, 4, 20))), ValueError, "out is of shape"),
    ],
)
def test_refused_by_the_public_function(changes, kind, words):
    with pytest.raises(kind, match=words):
        public(**changes)


REFUSED_BY_TAPS = {
    "channels": (dict(t=to_tiles(torch.ones(1, 8, 4, 20))), ValueError, "has 8 channels"),
    "bias": (dict(bias=torch.ones(4)), ValueError, r"bias has shape \(4,\)"),
    "bias in bfloat16": (dict(bias=torch.ones(3).bfloat16()), TypeError, "bias.float()"),
    "kernel": (dict(kernel=5), ValueError, "no rows for the taps of a kernel of 5 x 5"),
    "rows": (
        dict(w=TiledWeight.from_weight(torch.ones(3, 6))),
        ValueError,
        "make it by TiledWeight.from_taps",
    ),
    "a weight with taps": (
        dict(w=TiledWeight.from_weight(torch.ones(9, 6, 3, 3))),
        ValueError,
        "make it by TiledWeight.from_taps",
    ),
}


@pytest.mark.parametrize("what", REFUSED_BY_TAPS)
def test_refused_by_taps(what):
    changes, kind, words = REFUSED_BY_TAPS[what]
    w = TiledWeight.from_taps(torch.ones(3, 6, 3, 3))
    arguments = {"t": to_tiles(torch.ones(1, 6, 4, 20)), "w": w, "bias": torch.ones(3)}
    with pytest.raises(kind, match=words):
        tiled_conv2d_by_taps(**(arguments | changes))


@pytest.mark.parametrize(
    "geometry, words",
    [
        ([6, 20, 3], "geometry has 3 numbers"),
        ([6, 20, 3, 5], "5 x 5 has no tile layout"),
        ([6, 20, 0, 3], "has 0 rows"),
        ([6, 20, 4, 3], "tile_starts has shape"),
        ([9, 20, 3, 3], "x has shape"),
        ([6, 20, 2**62, 3], "rows"),
    ],
)
def test_refused_geometry_by_taps(geometry, words):
    w = TiledWeight.from_taps(torch.ones(3, 6, 3, 3))
    t = to_tiles(torch.ones(1, 6, 4, 20))
    arguments = (t.data, w.values, w.positions, w.tile_starts, None, geometry)
    with pytest.raises(ValueError, match=words):
        issp.backends.implementations("reference")["tiled_conv2d_by_taps"](*arguments)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.issp.tiled_conv2d_by_taps(*arguments)


def test_refused_places_of_the_result():
    p = CASE.build()
    w = TiledWeight.from_weight(torch.randn(6, 6, 3, 3))
    before = p.t.data.clone()
    with pytest.raises(ValueError, match="overlaps another argument"):
        tiled_conv2d(p.t, w, out=p.t)
    assert torch.equal(p.t.data, before)
    memory = torch.zeros(2 * p.t.data.numel(), dtype=torch.bfloat16)
    shifted = [memory[i : i + p.t.data.numel()].view(p.t.data.shape) for i in (0, 32)]
    with pytest.raises(ValueError, match="only the residual may be out itself"):
        tiled_conv2d(p.t, w, None, p.t._replace(data=shifted[0]), out=p.t._replace(data=shifted[1]))


@pytest.mark.parametrize(
    "x, kind, words",
    [
        (torch.ones(6, 4, 20), ValueError, r"x must be \[N, C, H, W\]"),
        (torch.ones(1, 6, 4, 20).double(), TypeError, "x has dtype torch.float64"),
        (torch.ones(1, 6, 4, 20).long(), TypeError, "x has dtype torch.int64"),
        (torch.ones(1, 0, 4, 20), ValueError, "needs a channel"),
        (torch.ones(1, 6, 4, 20).to_sparse(), ValueError, "x is torch.sparse_coo"),
        (torch.ones(1).expand(1, 2, 1, 2**25), ValueError, "has no tile layout"),
        (torch.ones(1).expand(1, 2**22, 1, 2**10), ValueError, "too large for the tile layout"),
        (torch.ones(1, 6, 4, 20, requires_grad=True), ValueError, "requires a gradient"),
    ],
)
def test_refused_images(x, kind, words):
    with pytest.raises(kind, match=words):
        to_tiles(x)


def test_refused_dtypes():
    t = to_tiles(torch.ones(1, 6, 4, 20))
    with pytest.raises(TypeError, match="tile layout is bfloat16"):
        to_tiles(torch.ones(1, 6, 4, 20), torch.float16)
    with pytest.raises(TypeError, match="dtype is torch.float64"):
        from_tiles(t, torch.float64)
    with pytest.raises(ValueError, match="data has shape"):
        from_tiles(t._replace(channels=9))


@pytest.mark.skipif(not NATIVE, reason="issp/_C was not built: there is nothing to select")
def test_refused_kernels():
    with pytest.raises(RuntimeError, match="use scalar, avx512 or amx, not avx2"):
        torch.ops.issp._tile_capability("avx2")
