"""Packed weights: what is stored, what comes back, the transposed lists, copies."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import issp
from issp import ops
from issp.ops.formats import NMTensor, SparseRows
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES
from tests.ops.sparse.cases import CONVS, KEEPS, names

WEIGHTS = [c for c in CONVS if c.name.endswith("3x3") or "5x3" in c.name or "1x7" in c.name]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", WEIGHTS, ids=names(WEIGHTS))
def test_rows_there_and_back(case, dtype):
    p = case.build(dtype)
    rows = SparseRows.from_dense(p.weight, case.weight.v)
    assert_bitwise_equal(rows.to_dense(), p.weight, "the dense weight")
    assert_bitwise_equal(rows.col_indices, p.columns, "columns")
    assert_bitwise_equal(rows.crow_indices, p.starts, "starts")
    assert_bitwise_equal(rows.values, p.values, "values")
    assert rows.shape == tuple(p.weight.shape) and rows.v == case.weight.v
    stored = p.values.numel() / p.weight.numel()
    assert rows.sparsity == pytest.approx(1 - stored)


@pytest.mark.parametrize("case", WEIGHTS, ids=names(WEIGHTS))
def test_transposed_lists_make_the_weight_of_the_gradient(case):
    p = case.build(torch.float64)
    rows = SparseRows.from_dense(p.weight, case.weight.v)
    columns, starts, order = rows.transposed
    assert [t.dtype for t in rows.transposed] == [torch.int32] * 3
    turned = p.weight.transpose(0, 1).flip(2, 3).contiguous()
    values = rows.values.flatten()[order.long()][:, None]
    transposed = SparseRows(values, columns, starts, turned.shape)  # checks the order
    assert_bitwise_equal(transposed.to_dense(), turned, "the transposed weight")
    assert all(a is b for a, b in zip(rows.transposed, rows.transposed, strict=True))


@pytest.mark.parametrize("v", [1, 4])
@pytest.mark.parametrize("kernel", [(), (3, 3), (1, 7)], ids=str)
@pytest.mark.parametrize("keep, inputs", KEEPS, ids=str)
def test_every_pattern_there_and_back(keep, inputs, kernel, v):
    keep = issp.Keep(keep.n, of=keep.of, v=v)
    weight = ops.nm_prune(torch.randn(8, inputs, *kernel), keep) + 0.0  # -0 is not kept
    p = ops.nm_pack(weight, keep)
    assert_bitwise_equal(p.to_dense(), weight, "the dense weight")
    per_block = inputs // keep.of * keep.n * torch.Size(kernel).numel()
    assert p.indices.shape == (8 // v, per_block) and p.indices.dtype == torch.int32
    assert p.values.shape == (8 // v * per_block, v)
    assert p.sparsity == pytest.approx(keep.sparsity)
    assert p.keep == keep and isinstance(p, SparseRows)


def test_groups_with_fewer_weights_are_filled_by_their_first_zeros():
    weight = torch.zeros(2, 8)
    weight[0, 3], weight[1, 6] = 1.0, float("nan")
    p = NMTensor.from_dense(weight, issp.Keep(2, of=4))
    assert p.indices.tolist() == [[0, 3, 4, 5], [0, 1, 4, 6]]
    assert_bitwise_equal(p.to_dense(), weight, "the dense weight")


@pytest.mark.parametrize("kernel", [(), (3, 3)], ids=str)
def test_every_channel_of_a_unit_has_an_entry(kernel):
    keep = issp.Keep(4, of=8, v=4, c=2)
    weight = ops.nm_prune(torch.randn(8, 16, *kernel), keep) + 0.0
    weight[:, ::4] = 0  # a channel of a unit may be zero
    p = ops.nm_pack(weight, keep)
    assert_bitwise_equal(p.to_dense(), weight, "the dense weight")
    taps = torch.Size(kernel).numel()
    assert p.indices.shape == (2, 8 * taps) and "v=4, c=2" in repr(p)
    channel, tap = p.indices.long() // taps, p.indices.long() % taps
    for block in range(2):
        counts = torch.bincount(channel[block] // 2 * taps + tap[block], minlength=8 * taps)
        assert set(counts.tolist()) == {0, 2}


def test_units_that_are_missing_are_filled_by_the_first_units_of_zeros():
    weight = torch.zeros(2, 8)
    weight[0, 5] = 1.0
    p = NMTensor.from_dense(weight, issp.Keep(4, of=8, c=2))
    assert p.indices.tolist() == [[0, 1, 4, 5], [0, 1, 2, 3]]
    assert_bitwise_equal(p.to_dense(), weight, "the dense weight")
    parts = (p.values, torch.tensor([0, 3, 4, 5, 0, 1, 2, 3], dtype=torch.int32), p.crow_indices)
    assert NMTensor(*parts, (2, 8), issp.Keep(4, of=8)).keep.c == 1
    with pytest.raises(ValueError, match="do not keep 4 of every 8 channels, 2 together, in a we"):
        NMTensor(*parts, (2, 8), issp.Keep(4, of=8, c=2))
    weight[0, 0] = weight[0, 2] = 1.0
    with pytest.raises(ValueError, match="1 groups hold more than 4 weights per 8"):
        NMTensor.from_dense(weight, issp.Keep(4, of=8, c=2))


def test_rows_that_share_keep_the_union():
    weight = torch.tensor([[1.0, 0, 0], [0, 2, 0], [0, 0, 0], [0, 0, 0]])
    p = ops.sparse_pack(weight, v=2)
    assert p.col_indices.tolist() == [0, 1] and p.crow_indices.tolist() == [0, 2, 2]
    assert p.values.tolist() == [[1, 0], [0, 2]]
    # A zero of either sign is nothing; NaN is something.
    signed = ops.sparse_pack(torch.tensor([[-0.0, float("nan"), 0.0]]))
    assert signed.col_indices.tolist() == [1]


def test_memory_formats_of_the_weight_do_not_matter():
    weight = torch.randn(4, 6, 3, 3) * torch.rand(4, 6, 3, 3).lt(0.5)
    expected = ops.sparse_pack(weight)
    for strange in (
        weight.to(memory_format=torch.channels_last),
        torch.stack([weight, weight], 1)[:, 0],
    ):
        assert_bitwise_equal(ops.sparse_pack(strange).values, expected.values, "values")


def test_packing_leaves_the_graph_and_the_weight_alone():
    weight = torch.nn.Parameter(torch.randn(4, 6))
    p = ops.sparse_pack(weight)
    assert p.values.is_leaf and not p.values.requires_grad
    p.values.zero_()
    assert weight.ne(0).all()


def packed():
    weight = ops.nm_prune(torch.randn(8, 12, 3, 3), issp.Keep(1, of=4, v=2))
    return [ops.sparse_pack(weight), ops.nm_pack(weight, issp.Keep(1, of=4, v=2))]


@pytest.mark.parametrize("p", packed(), ids=lambda p: type(p).__name__)
def test_copies_and_conversions(p):
    p.transposed  # noqa: B018  (made before, so that it has to follow)
    for twin in (copy.deepcopy(p), pickle.loads(pickle.dumps(p))):
        assert type(twin) is type(p)
        assert_bitwise_equal(twin.to_dense(), p.to_dense(), "the copy")
    half = p.to(torch.bfloat16)
    assert type(half) is type(p) and half.dtype == torch.bfloat16 and p.dtype == torch.float32
    assert_bitwise_equal(half.to_dense(), p.to_dense().bfloat16(), "the converted weight")
    assert half.col_indices.dtype == half.crow_indices.dtype == torch.int32
    assert p.to("cpu") is p
    meta = p.to("meta")
    assert {t.device.type for t in (meta.col_indices, meta.crow_indices, *meta.transposed)} == {
        "meta"
    }


@pytest.mark.parametrize("p", packed(), ids=lambda p: type(p).__name__)
def test_bsr_there_and_back(p):
    bsr = p.to_bsr()
    assert bsr.layout == torch.sparse_bsr and bsr.shape == (8, 108)
    assert torch.equal(bsr.to_dense().view(p.shape), p.to_dense())
    rows = SparseRows.from_bsr(bsr, p.shape)
    assert type(rows) is SparseRows and rows.shape == p.shape and rows.v == p.v
    assert_bitwise_equal(rows.to_dense(), p.to_dense(), "the weight there and back")
    if isinstance(p, NMTensor):
        twin = NMTensor.from_bsr(bsr, p.keep, p.shape)
        assert_bitwise_equal(twin.indices, p.indices, "the positions there and back")


def test_bsr_of_another_kind_is_refused():
    dense = torch.eye(4)
    for bsr, kind, words in (
        (dense, TypeError, "it must be torch.sparse_bsr"),
        (dense.to_sparse_bsr((2, 2)), ValueError, r"blocks \(2, 2\): they must be \(v, 1\)"),
    ):
        with pytest.raises(kind, match=words):
            SparseRows.from_bsr(bsr)
    with pytest.raises(ValueError, match="that is no weight of shape"):
        SparseRows.from_bsr(dense.to_sparse_bsr((2, 1)), (4, 5))


def test_it_says_what_it_is():
    rows, nm = packed()
    assert repr(rows) == (
        "SparseRows(shape=(8, 12, 3, 3), v=1, sparsity=0.7500, torch.float32, cpu)"
    )
    assert repr(nm) == (
        "NMTensor(shape=(8, 12, 3, 3), keep=1:4, v=2, sparsity=0.7500, torch.float32, cpu)"
    )
