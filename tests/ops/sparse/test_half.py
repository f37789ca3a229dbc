"""float16 convolutions of AVX512-FP16: their rounding, bit for bit, and how exact it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from issp import backends, ops
from tests.asserts import assert_bitwise_equal
from tests.ops.sparse import test_parity as parity
from tests.ops.sparse.cases import CONVS, ConvCase, Weight, names, random_convs
from tests.ops.sparse.half_sums import sparse_sums

BEST = torch.ops.issp._cpu_capability() if backends.active("cpu") == "cpp" else ""
pytestmark = pytest.mark.skipif(
    BEST != "avx512fp16", reason=f"no AVX512-FP16 here: the best kernels are {BEST or 'not built'}"
)


def conv2d(p, case: ConvCase) -> torch.Tensor:
    return torch.ops.issp.sparse_conv2d(*p.args(), case.activation)


def expected(p, case: ConvCase) -> torch.Tensor:
    """The result by the rounding that the schema defines."""
    y = sparse_sums(parity.padded_input(p, case, torch.float16), case, p)
    return parity.epilogue(y, replace(p, bias=None), case).half()


def conv(name: str, weight: Weight, image=(9, 17), padding=(1, 1), **more) -> ConvCase:
    return ConvCase(name, weight, image=image, padding=padding, **more)


# Rows of more than 64 entries; all channels at once, or in runs that end within a sum.
DENSER = Weight(12, 320, (3, 3), 0.15)
LONG = [
    conv("many sums", Weight(4, 30, (3, 3), 1.0)),
    conv("64 entries", Weight(4, 64, (1, 1), 1.0), padding=(0, 0)),
    *(conv(f"runs, v={v}", replace(DENSER, v=v)) for v in (1, 2, 3, 4)),
    conv("runs, uneven", replace(DENSER, pattern="uneven"), bias=False),
    conv("runs, empty rows", replace(DENSER, pattern="empty rows"), (5, 49)),
    conv("runs, stride 2", DENSER, (9, 37), stride=(2, 2), residual=True),
    conv("runs, 1x1", Weight(12, 512, (1, 1), 0.6), (9, 17), (0, 0), batch=2),
    conv("runs, finished", DENSER, (9, 11), residual=True, activation="relu", batch=2),
    conv("v=8", Weight(16, 40, (3, 3), 0.3, 8), (7, 48)),
]
SIZES = [
    conv(f"{h} x {w}, {kernel}", Weight(4, 9, (kernel, kernel), 0.3, v), (h, w), (kernel // 2,) * 2)
    for h, w in ((1, 1), (2, 16), (3, 33), (13, 47), (12, 48), (7, 64), (5, 65), (4, 100), (3, 130))
    for kernel, v in ((1, 1), (3, 1), (3, 4), (5, 2))
]
EXACT = [c for c in (*CONVS, *random_convs(60), *SIZES, *LONG) if c.activation != "gelu"]
EXACT = [c for c in EXACT if c.work < 4e6 or c in LONG]


@pytest.mark.sampled(slow_only=True, most=8)
@pytest.mark.parametrize("case", EXACT, ids=names(EXACT))
def test_every_sum_is_rounded_as_defined(case):
    p = case.build(torch.float16)
    assert_bitwise_equal(conv2d(p, case), expected(p, case), case.name)


def test_gelu_of_the_same_sums():
    case = conv("gelu", Weight(8, 20, (3, 3), 0.3, 4), (9, 40), activation="gelu", residual=True)
    p = case.build(torch.float16)
    torch.testing.assert_close(conv2d(p, case), expected(p, case), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("case", LONG, ids=names(LONG))
def test_the_same_bits_for_any_number_of_threads_in_either_mode(case, threads):
    p = case.build(torch.float16)
    threads(1)
    once = conv2d(p, case)
    try:
        for flush, count in ((False, 2), (False, 3), (False, 5), (True, 1), (True, 2)):
            torch.set_flush_denormal(flush)
            threads(count)
            assert_bitwise_equal(conv2d(p, case), once, f"{count} threads, flushing {flush}")
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("scale", [1e-4, 1e-6, 2e4])
def test_denormals_and_overflow(scale):
    """Sums far below the smallest normal number, and beyond the largest number."""
    case = conv("scaled", Weight(8, 40, (3, 3), 0.3, 4), (6, 48), bias=False)
    p = case.build(torch.float16)
    p = replace(p, x=p.x * scale)
    y = conv2d(p, case)
    assert_bitwise_equal(y, expected(p, case), f"x * {scale}")
    assert bool(y.isinf().any()) == (scale > 1) and int(y.count_nonzero()) > y.numel() / 2


def test_nan_and_infinity_stay_where_they_are():
    case = conv("strange", Weight(8, 12, (3, 3), 0.5), (20, 50), activation="relu")
    p = case.build(torch.float16)
    for i, number in enumerate((float("nan"), float("inf"), -float("inf"))):
        p.x[0, i, 3 * i, 7 * i] = number
    y, exact = conv2d(p, case), expected(p, case)
    assert_bitwise_equal(y.isnan(), exact.isnan(), "NaN")
    assert y.isnan().any() and y.isinf().any()
    assert_bitwise_equal(y[~y.isnan()], exact[~y.isnan()], "the rest")


@pytest.mark.parametrize("v", [1, 4])
@pytest.mark.parametrize("sparsity", [0.9, 0.95, 0.99])
def test_the_error_is_below_that_of_bfloat16(sparsity, v):
    case = conv("256 channels", Weight(16, 256, (3, 3), 1 - sparsity, v), (24, 48), bias=False)
    p = case.build(torch.float32)
    exact = parity.dense_conv(p, case, torch.float64)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        rounded = replace(p, x=p.x.to(dtype), values=p.values.to(dtype))
        errors[dtype] = (conv2d(rounded, case).double() - exact).square().mean().sqrt()
    assert 0 < errors[torch.float16] < errors[torch.bfloat16] / 2


@pytest.mark.parametrize("v", [1, 4])
def test_gradients(v):
    """The transposed product has the same sums; that of the values is summed in float32."""
    weight = torch.randn(16, 24, 3, 3) * (torch.rand(16 // v, 1, 24, 3, 3) < 0.2).expand(
        -1, v, -1, -1, -1
    ).reshape(16, 24, 3, 3)
    packed, x = ops.sparse_pack(weight.half(), v), torch.randn(2, 24, 13, 20).half()
    x.requires_grad_(), packed.values.requires_grad_()
    y = ops.sparse_conv2d(x, packed, padding=1)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, (x, packed.values), grad)
    wide = weight.half().double().requires_grad_()
    wide_x = x.detach().double().requires_grad_()
    dense = torch.nn.functional.conv2d(wide_x, wide, padding=1)
    exact_x, exact_w = torch.autograd.grad(dense, (wide_x, wide), grad.double())
    counts = packed.crow_indices.diff().long()
    block = torch.repeat_interleave(counts)
    exact = (exact_x, exact_w.view(16 // v, v, -1)[block, :, packed.col_indices.long()])
    for name, ours, true in zip(("x", "values"), actual, exact, strict=True):
        assert ours.dtype == torch.float16
        error = (ours.double() - true).square().mean().sqrt() / true.square().mean().sqrt()
        assert error < 1e-3, f"the gradient of {name} is off by {error:.2g}"
