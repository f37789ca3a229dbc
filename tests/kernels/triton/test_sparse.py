"""What is Triton's own in the sparse ops: chunks, tiles, TF32, splits, positions outside, code.

Parity over the common cases stands in tests/ops/sparse/test_parity.py.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from issp import Keep
from tests.asserts import assert_as_close_as_dense, assert_bitwise_equal
from tests.ops.sparse.cases import ConvCase, MatmulCase, Weight
from tests.ops.sparse.test_parity import (
    dense_conv,
    dense_conv_grad,
    dense_matmul,
    dense_matmul_grad,
)

pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

import triton_kernels  # noqa: E402
from triton_kernels import sparse  # noqa: E402
from triton_kernels import sparse_conv2d as conv_module  # noqa: E402
from triton_kernels import sparse_matmul as matmul_module  # noqa: E402

pytestmark = pytest.mark.sampled(most=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = DEVICE == "cpu"
OPS = triton_kernels.implementations()


def name_of(case):
    return "sparse_conv2d" if isinstance(case, ConvCase) else "sparse_matmul"


def product(case, p, **tile):
    return OPS[name_of(case)](*p.args(), case.activation, **tile)


def values_grad(case, p, **tile):
    arguments = (p.x, p.grad, p.columns, p.starts, case.weight.v, *case.grad_tail())
    return OPS[f"{name_of(case)}_values_grad"](*arguments, **tile)


def calls_of(case, only=""):
    """Product and gradient of the values, each with its dense counterpart."""
    convolves = isinstance(case, ConvCase)
    if only != "gradient":
        yield product, dense_conv if convolves else dense_matmul
    if only != "product" and (not convolves or case.upsample == (1, 1)):
        yield values_grad, dense_conv_grad if convolves else dense_matmul_grad


def check(case, dtype=torch.float32, only="", **tile):
    """Against torch's dense products; `tile` names sizes of a program's tile."""
    p = case.build(dtype, DEVICE)
    for call, dense in calls_of(case, only):
        what = f"{call.__name__} of {case.name} in {dtype}"
        exact = dense(p, case, torch.float64)
        assert_as_close_as_dense(call(case, p, **tile), exact, dense(p, case, dtype), what)


def conv(name, weight, **geometry):
    geometry = {"padding": tuple(k // 2 for k in weight.kernel)} | geometry
    return ConvCase(name, weight, **geometry)


ENTRIES = (1, 15, 16, 17, 31, 32, 33, 100)


@pytest.mark.parametrize("kept", ENTRIES)
def test_entries_around_a_chunk(kept):
    """16 entries make a chunk of the product, 32 one of the gradient."""
    weight = Weight(8, 100, (1, 1), Keep(kept, of=100, v=4), 4)
    check(conv(f"{kept} entries", weight, image=(2, 3)))
    check(MatmulCase(f"{kept} entries", weight, lead=(5,)))


LONG_ROWS = (
    conv("long rows", Weight(1, 256, (3, 3), 1.0), image=(6, 7), bias=False),
    MatmulCase("long rows", Weight(8, 2304, pattern=1.0, v=8), False, lead=(64,)),
)


@pytest.mark.full
@pytest.mark.parametrize("case", LONG_ROWS, ids=name_of)
def test_long_rows_are_as_exact_as_those_of_a_dense_product(case):
    """With chunks of one entry the interpreter adds up in a chain, as compiled code does."""
    check(case, only="product", **({"CHUNK": 1} if INTERPRETED else {}))


@pytest.mark.parametrize("pixels", [15, 16, 17, 33])
def test_pixels_around_a_tile(pixels):
    weight = Weight(4, 5, (3, 3), 0.4, 2)
    case = conv(f"{pixels} pixels", weight, image=(1, pixels), batch=2, residual=True)
    check(case, PIXELS=16)
    flat = Weight(4, 45, (1, 1), 0.4, 2)
    check(MatmulCase(f"{pixels} rows", flat, residual=True, lead=(pixels,)), PIXELS=16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("v", [5, 24, 40, 65, 130])
def test_rows_that_fill_no_tile(v, dtype):
    """A program takes at most 64 rows of a block, of the gradient 32."""
    weight = Weight(2 * v, 6, (3, 3), 0.2, v)
    check(conv(f"v={v}", weight, image=(3, 4), residual=True, activation="gelu"), dtype)
    weight = Weight(2 * v, 40, (1, 1), 0.2, v)
    check(MatmulCase(f"v={v}", weight, residual=True, activation="relu", lead=(9,)), dtype)


@pytest.mark.parametrize("kernel", [(31, 1), (8, 4), (1, 33), (7, 7), (9, 9)], ids=str)
@pytest.mark.parametrize("upsample", [(1, 1), (3, 2)], ids=str)
def test_more_taps_than_a_word_has_bits(kernel, upsample):
    geometry = {"image": (9, 8), "stride": (2, 1), "dilation": (1, 2), "upsample": upsample}
    size = (5, 4)
    check(conv(f"{kernel}, {upsample}", Weight(2, 3, kernel, 0.3), **geometry, size=size))


def rounded_to_tf32(x):
    """To nearest, ties away from zero."""
    bits = x.cpu().view(torch.int32)
    return ((bits + 0x1000) & -0x2000).view(torch.float32).to(x.device)


@pytest.fixture
def tf32(monkeypatch):
    """Allows TF32 in matrix products, as a user would."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


BLOCKS = (
    conv("v=16", Weight(32, 24, (3, 3), 0.3, 16), image=(6, 7)),
    conv("v=4", Weight(8, 24, (3, 3), 0.3, 4), image=(6, 7)),
    MatmulCase("v=32", Weight(64, 80, (1, 1), 0.3, 32), lead=(21,)),
)


@pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case.name)
def test_tf32_rounds_the_inputs_and_nothing_else(tf32, case):
    """Cutting the bits off would bias every sum, and double the error of dense TF32."""
    p = case.build(torch.float32, DEVICE)
    for call, dense in calls_of(case):
        y, exact = call(case, p), dense(p, case, torch.float64)
        q = case.build(torch.float32, DEVICE)
        for name in ("x", "weight", "grad", "values"):
            setattr(q, name, rounded_to_tf32(getattr(q, name)))
        baseline = dense(q, case, torch.float64)
        assert_as_close_as_dense(y, exact, baseline.float(), f"TF32, {case.name}")
        assert float((y.double() - exact).abs().max()) > 1e-5, "no TF32 was used"
        # Of rounded inputs every product is exact: what is left is the sums' rounding.
        scale = float(baseline.abs().max())
        torch.testing.assert_close(y.double(), baseline, rtol=0, atol=3e-6 * scale)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_tf32_keeps_what_is_not_finite(tf32):
    """Every NaN, whatever its bits: rounding as integers would turn some into zeros."""
    patterns = (0x7FFFFFFF, 0x7FC00000, 0x7F800001, -1, 0x7F800000, -0x800000, 0x7F7FFFFF)
    x = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)[:, None].to(DEVICE)
    lists = (torch.tensor(n, dtype=torch.int32, device=DEVICE) for n in ([0], [0, 1]))
    y = OPS["sparse_matmul"](x, torch.ones(1, 16, device=DEVICE), *lists, [], None, None)
    inf = float("inf")
    expected = torch.tensor([float("nan")] * 4 + [inf, -inf, inf])
    torch.testing.assert_close(y[:, 3].cpu(), expected, equal_nan=True)


def test_float32_is_strict_by_default():
    assert torch.backends.cuda.matmul.fp32_precision != "tf32"
    assert sparse.precision(torch.float32) == "ieee"


def test_who_prefers_tensor_cores(tf32):
    prefers = triton_kernels.prefers_tensor_cores
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert prefers(dtype, 16) and prefers(dtype, 40) and not prefers(dtype, 15)
    assert not prefers(torch.float64, 16)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not prefers(torch.float32, 16) and prefers(torch.bfloat16, 16)
    torch.backends.cuda.matmul.allow_tf32 = True
    assert prefers(torch.float32, 16)


OUTSIDE = (
    conv("3x3", Weight(4, 3, (3, 3), 0.5, 2)),
    conv("7x7", Weight(4, 3, (7, 7), 0.2, 2)),
    MatmulCase("matmul", Weight(4, 30, (1, 1), 0.5, 2)),
)


@pytest.mark.parametrize("case", OUTSIDE, ids=lambda case: case.name)
def test_positions_outside_the_weight_count_as_zero(case):
    """On a GPU they are not checked: reading them would wait for the device."""
    p = case.build(torch.float32, DEVICE)
    expected, expected_grad = product(case, p), values_grad(case, p)
    entries = p.columns.numel()
    outside = [-1, -(2**31), case.weight.length, case.weight.length + 7, 2**31 - 1]
    p.columns = torch.cat([p.columns, torch.tensor(outside, dtype=torch.int32, device=DEVICE)])
    p.values = torch.cat([p.values, torch.ones(len(outside), 2, device=DEVICE)])
    p.starts[-1] += len(outside)
    torch.testing.assert_close(product(case, p), expected, rtol=1e-6, atol=1e-6)
    grad = values_grad(case, p)
    torch.testing.assert_close(grad[:entries], expected_grad, rtol=1e-5, atol=1e-5)
    assert_bitwise_equal(grad[entries:], torch.zeros_like(grad[entries:]), "positions outside")


@pytest.mark.parametrize("case", OUTSIDE, ids=lambda case: case.name)
def test_starts_outside_the_lists_read_nothing_there(case):
    p = case.build(torch.float32, DEVICE)
    expected = product(case, p)
    p.starts[0], p.starts[-1] = -5, p.columns.numel() + 40
    assert_bitwise_equal(product(case, p), expected, "the result")


LONG = (
    conv("long", Weight(6, 8, (3, 3), 0.05, 2), image=(5, 11), batch=2),
    MatmulCase("long", Weight(6, 72, (1, 1), 0.05, 2), lead=(121,)),
)


def split_into(monkeypatch, wanted):
    """Makes every launch small enough to be split; returns the numbers of splits seen."""
    monkeypatch.setattr(sparse, "PROGRAMS", wanted)
    seen = []

    def split_tiles(*args):
        programs, splits, tiles_per_split = sparse.split_tiles(*args)
        seen.append(splits)
        return programs, splits, tiles_per_split

    for module in (conv_module, matmul_module):
        monkeypatch.setattr(sys.modules[module.__module__], "split_tiles", split_tiles)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", LONG, ids=name_of)
def test_gradients_summed_over_splits(monkeypatch, case, dtype):
    for wanted, splits in ((1, 1), (12, 4), (500, 8)):
        seen = split_into(monkeypatch, wanted)
        check(case, dtype, only="gradient", PIXELS=16)
        assert seen == [splits]


def test_splits_cover_everything_in_bounded_memory():
    draw = random.Random(3)
    for _ in range(2000):
        entries, v, blocks = draw.randrange(1, 5000), draw.choice((1, 4, 32)), draw.randrange(1, 99)
        dense, tiles = entries * v + draw.randrange(10**6), draw.randrange(0, 3000)
        programs, splits, tiles_per_split = sparse.split_tiles(entries, v, dense, blocks, tiles)
        assert programs >= 1 and splits >= 1
        assert (splits - 1) * tiles_per_split < max(tiles, 1)
        assert splits * tiles_per_split >= tiles
        assert splits == 1 or splits * entries * v <= dense


@pytest.mark.skipif(not INTERPRETED, reason="the order can be set in the interpreter only")
@pytest.mark.parametrize("case", LONG, ids=name_of)
def test_the_order_of_the_programs_does_not_matter(monkeypatch, case):
    from triton.runtime import interpreter

    p = case.build(torch.float32)
    split_into(monkeypatch, 30)
    expected = product(case, p, PIXELS=16), values_grad(case, p, PIXELS=16)
    builder = interpreter.interpreter_builder
    plain, draw, orders = builder.set_grid_idx, random.Random(1), {}

    def shuffled(x, y, z):
        size = builder.grid_dim[0]
        if x == 0:
            orders[size] = draw.sample(range(size), size)
        plain(orders[size][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    assert_bitwise_equal(product(case, p, PIXELS=16), expected[0], "the result")
    assert_bitwise_equal(values_grad(case, p, PIXELS=16), expected[1], "the gradient")
    assert any(order != sorted(order) for order in orders.values())


@pytest.mark.parametrize(
    "case", (*LONG, OUTSIDE[1]), ids=lambda case: f"{name_of(case)} {case.name}"
)
def test_offsets_of_64_bits(monkeypatch, case):
    p = case.build(torch.float32, DEVICE)
    expected = product(case, p), values_grad(case, p)
    for module in (conv_module, matmul_module):
        monkeypatch.setattr(sys.modules[module.__module__], "index_of", lambda *counts: tl.int64)
    assert_bitwise_equal(product(case, p), expected[0], "the result")
    assert_bitwise_equal(values_grad(case, p), expected[1], "the gradient")


def test_large_tensors_get_offsets_of_64_bits():
    index = sys.modules["triton_kernels.sparse_conv2d"]._index
    for image, kind in (((64, 1024, 1023), tl.int32), ((64, 1024, 1024), tl.int64)):
        assert index(torch.empty(2, *image, device="meta"), 1, (9, 9), 7) == kind
    assert index(torch.empty(1, 1, 1, 1), 32, (2**13, 2**13), 7) == tl.int64
    assert index(torch.empty(1, 1, 1, 1), 32, (9, 9), 2**26) == tl.int64


def test_tiles_shrink_until_there_are_programs_enough():
    call = (torch.float32, "ieee", 16)
    sizes = [sparse.tile_sizes(*call, n, 48 * 48, 16, False) for n in (1, 3, 16)]
    assert [tile["PIXELS"] for tile in sizes] == [64, 128, 256]


@pytest.mark.skipif(INTERPRETED, reason="no GPU: tensor cores cannot be run")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("v", [16, 32, 64])
def test_tensor_cores_on_real_shapes(tf32, dtype, v):
    weight = Weight(256, 256, (3, 3), Keep(1, of=16, v=v), v)
    case = conv(f"256, v={v}", weight, image=(48, 48), batch=2)
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "tf32"
    try:
        check(case, dtype)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


# Each dtype on one target: `python -m triton_kernels.compile` has all of them, in minutes.
COMPILED = ((90, "float32"), (80, "float16"), (100, "bfloat16"))


def compiled(target, dtype):
    """Starts the compiler in a process without the interpreter."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "triton_kernels.compile", "--kernels", "sparse"]
    return subprocess.Popen(
        [*command, "--targets", str(target), "--dtypes", dtype],
        cwd=Path(triton_kernels.__file__).parent.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.full
def test_the_kernels_compile_without_spills_and_use_tensor_cores(capsys):
    """For sm_80, sm_90 and sm_100, with no GPU."""
    runs = [compiled(target, dtype) for target, dtype in COMPILED]
    rows = []
    for run in runs:
        out, errors = run.communicate()
        assert run.returncode == 0, errors
        rows += map(json.loads, out.splitlines())
    table = {
        f"{row['kernel']} v={row.get('V')} {row['dtype']} {row.get('PRECISION')} "
        f"sm_{row['target']}": (row["registers"], row["shared_bytes"], row["matrix"])
        for row in rows
    }
    with capsys.disabled():
        print(f"\nregisters, shared bytes, tensor core instructions: {table}")
    assert {row["kernel"] for row in rows} == {
        *("convolve", "convolve_values_grad", "multiply", "multiply_values_grad", "sum_splits")
    }
    for row in rows:
        assert row["local_bytes"] == 0, f"spills: {row}"
        if row["kernel"] == "sum_splits":
            continue
        strict = row["dtype"] == "float32" and row["PRECISION"] == "ieee"
        assert (row["matrix"] == 0) == strict, f"tensor cores used or not used: {row}"
    blocks = {(row["V"], row["dtype"]) for row in rows if row.get("matrix")}
    assert blocks >= {(16, "float32"), (32, "float32"), (16, "float16"), (32, "bfloat16")}
