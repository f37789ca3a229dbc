"""`TiledWeight`: what is stored, and back to the dense weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from issp import Keep
from issp.ops import TiledWeight, nm_pack, nm_prune, sparse_pack
from tests.asserts import assert_bitwise_equal
from tests.ops.tiles.cases import CASES, NAMES


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_back_to_dense(case):
    p = case.build()
    assert_bitwise_equal(p.w.to_dense(), p.weight.bfloat16(), case.name)


def test_taps_as_rows():
    weight = torch.randn(3, 5, 3, 3)
    w = TiledWeight.from_taps(weight, 32)
    assert w.shape == (27, 5) and w.v == 32
    assert torch.equal(w.to_dense()[9 + 5], weight[1, :, 1, 2].bfloat16())
    assert torch.equal(TiledWeight.from_taps(weight[:, :, :1, :1]).to_dense(), w.to_dense()[::9])


def test_a_unit_is_stored_once_and_k_tiles_are_full():
    weight = torch.zeros(40, 6, 3, 3)
    weight[3, 2, 0, 1] = 1.0  # unit of rows 0..15, channels 2 and 3
    weight[9, 3, 0, 1] = 2.0
    weight[39, 5, 2, 2] = 3.0
    w = TiledWeight.from_weight(weight)
    assert w.v == 16 and w.kernel == 3 and w.tile_starts.tolist() == [0, 1, 1, 2]
    assert w.values.shape == (2, 1, 16, 32) and w.density == 2 * 16 * 32 / weight.numel()
    filled = [4] * 15  # plane 0, middle tap
    assert w.positions.tolist() == [[16 * 2 + 1, *filled], [16 * 3 + 8, *filled]]
    assert w.values[0, 0, 3, :2].tolist() == [1.0, 0.0]
    assert w.values[0, 0, 9, :2].tolist() == [0.0, 2.0]
    assert w.values[1, 0, 7, :2].tolist() == [0.0, 3.0]
    assert w.values.count_nonzero() == 3


@pytest.mark.parametrize("v", [16, 32])
def test_seventeen_units_need_two_k_tiles(v):
    weight = torch.zeros(v, 34)
    weight[0, ::2] = 1.0
    w = TiledWeight.from_weight(weight, v)
    assert w.tile_starts.tolist() == [0, 2] and w.positions[1].tolist() == [16 * 17, *[0] * 15]


def test_packed_weights():
    weight = nm_prune(torch.randn(32, 8, 3, 3), Keep(1, of=4, v=16))
    for packed in (sparse_pack(weight, 16), nm_pack(weight, Keep(1, of=4, v=16)), weight):
        assert torch.equal(TiledWeight.from_weight(packed).to_dense(), weight.bfloat16())


def test_copies():
    w = TiledWeight.from_weight(torch.randn(20, 5), 32)
    buffer = io.BytesIO()
    torch.save(w, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(w), torch.load(buffer, weights_only=False)):
        assert other.shape == w.shape
        assert_bitwise_equal(other.to_dense(), w.to_dense(), "a copy")


@pytest.mark.parametrize(
    "weight, v, kind, words",
    [
        (torch.randn(4), 16, ValueError, r"must be \[O, I\] or \[O, I, k, k\]"),
        (torch.randn(4, 4, 5, 5), 16, ValueError, "5 x 5 has no tile layout"),
        (torch.randn(4, 4, 1, 3), 16, ValueError, "1 x 3 has no tile layout"),
        (torch.randn(4, 4), 8, ValueError, "v is 8"),
        (torch.randn(4, 4).long(), 16, TypeError, "dtype torch.int64"),
        ("weight", 16, TypeError, "must be a tensor"),
    ],
    ids=["vector", "5x5", "1x3", "v", "dtype", "type"],
)
def test_refused_weights(weight, v, kind, words):
    with pytest.raises(kind, match=words):
        TiledWeight.from_weight(weight, v)
