"""Wrong plans, images and geometries at random: refused or computed, nothing else is written."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

import issp
from issp.ops import TiledWeight, to_tiles
from tests.asserts import assert_bitwise_equal
from tests.ops.tiles.cases import TileCase
from tests.tiers import quick_or_full

INTEGERS = (0, 1, -1, 2, 7, 16, 24, 25, 33, 64, 160, 2**15, 2**24, 2**31 - 1, -(2**31), 2**40)
GUARD = 4096  # elements around `out`, watched for writes


def spoil(source: random.Random, arguments: list) -> None:
    """Changes one argument of the raw op in a way that is wrong in most cases."""
    kind = source.choice(("positions", "positions", "starts", "geometry", "geometry", "shape"))
    if kind == "positions":
        positions = arguments[2] = arguments[2].clone()
        for _ in range(source.randint(1, 4)):
            at = source.randrange(positions.numel()) if positions.numel() else None
            if at is not None:
                positions.view(-1)[at] = source.choice([x for x in INTEGERS if abs(x) < 2**31])
    elif kind == "starts":
        starts = arguments[3] = arguments[3].clone()
        starts[source.randrange(len(starts))] = source.choice((0, 1, 2, 3, -1, 99, 2**31 - 1))
    elif kind == "geometry":
        geometry = arguments[6] = list(arguments[6])
        geometry[source.randrange(5)] = source.choice(INTEGERS)
    else:
        at = source.choice((0, 1, 2, 3, 4, 5))
        if isinstance(arguments[at], Tensor) and arguments[at].dim():
            arguments[at] = other_shape(source, arguments[at])


def other_shape(source: random.Random, x: Tensor) -> Tensor:
    axis = source.randrange(x.dim())
    if x.shape[axis] and source.random() < 0.5:
        return x.narrow(axis, 0, x.shape[axis] - 1)
    return torch.cat([x, x.narrow(axis, 0, min(1, x.shape[axis]))], axis)


@pytest.mark.skipif(issp.backends.active("cpu") != "cpp", reason="issp/_C was not built")
@pytest.mark.parametrize("seed", range(quick_or_full(4, 100)))
def test_random_calls(seed):
    source = random.Random(seed)
    reference = issp.backends.implementations("reference")["tiled_conv2d"]
    refused = 0
    for number in range(100):
        case = TileCase(
            f"fuzz {number}",
            rows=source.choice((4, 16, 36)),
            channels=source.randint(1, 5),
            kernel=source.choice((1, 3)),
            size=(source.randint(1, 3), source.choice((1, 16, 17))),
            v=source.choice((16, 32)),
            residual=source.random() < 0.3,
        )
        arguments = list(case.build().args(case))
        for _ in range(source.choice((1, 1, 2))):
            spoil(source, arguments)
        out, memory = guarded(to_tiles(torch.zeros(1, case.rows, *case.size)).data)
        try:
            torch.ops.issp.tiled_conv2d_out(*arguments, out)
        except (RuntimeError, ValueError, TypeError):
            refused += 1
            assert not out.any(), "nothing is written before a refusal"
        else:
            reference(*arguments)  # refuses what the native check should have refused
        assert torch.equal(memory[:GUARD], torch.ones(GUARD).bfloat16())
        assert torch.equal(memory[-GUARD:], torch.ones(GUARD).bfloat16())
    assert refused > 50


@pytest.mark.skipif(issp.backends.active("cpu") != "cpp", reason="issp/_C was not built")
@pytest.mark.parametrize("seed", range(quick_or_full(2, 100)))
def test_random_calls_by_taps(seed):
    source = random.Random(seed)
    reference = issp.backends.implementations("reference")["tiled_conv2d_by_taps"]
    refused = 0
    for _ in range(100):
        rows, channels, kernel = source.choice((1, 3)), source.randint(1, 5), source.choice((1, 3))
        size = (source.randint(1, 3), source.choice((1, 16, 17)))
        w = TiledWeight.from_taps(torch.ones(rows, channels, kernel, kernel))
        t = to_tiles(torch.ones(1, channels, *size))
        arguments = [t.data, w.values, w.positions, w.tile_starts, torch.ones(rows), None]
        arguments.append([channels, size[1], rows, kernel, 0])
        spoil(source, arguments)
        given = (*arguments[:5], arguments[6][:4])
        try:
            y = torch.ops.issp.tiled_conv2d_by_taps(*given)
        except (RuntimeError, ValueError, TypeError):
            refused += 1
        else:
            assert_bitwise_equal(y, reference(*given), "the result")
    assert refused > 30


def guarded(data: Tensor) -> tuple[Tensor, Tensor]:
    """A copy of a tensor between guards, and the memory of both."""
    memory = torch.ones(data.numel() + 2 * GUARD, dtype=data.dtype)
    inside = memory[GUARD:-GUARD].view(data.shape)
    inside.copy_(data)
    return inside, memory
