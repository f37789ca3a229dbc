"""Every sparse op x back end x case against float64, and against itself: order, threads, inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import issp
from issp import ops
from tests.asserts import assert_as_close_as_dense, assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST, BackEnd
from tests.cases import DTYPES
from tests.ops.sparse.cases import (
    CONVS,
    FEW_CONVS,
    FEW_MATMULS,
    MATMULS,
    ConvCase,
    MatmulCase,
    names,
    random_convs,
)

pytestmark = pytest.mark.sampled(slow_only=True, most=4)
ACTIVATIONS = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}
# The reference puts the dense weight together by the lists: it is compared like the others.
REFERENCE = BackEnd("reference", "cpu", lambda: issp.backends.implementations("reference"))
TESTED = [REFERENCE, *BACK_ENDS]


def op_of(back_end: BackEnd, name: str) -> Callable:
    """The back end's own op; a test of the reference in its place would prove nothing."""
    native = torch._C._dispatch_has_kernel_for_dispatch_key(f"issp::{name}", "CPU")
    assert native or not back_end.name.startswith("cpp"), f"the library has no {name}"
    return back_end[name]


def dense_conv(p, case: ConvCase, dtype: torch.dtype) -> torch.Tensor:
    """The result by torch's dense convolution in `dtype`."""
    return epilogue(
        dense_linear_conv(padded_input(p, case, dtype), p.weight.to(dtype), case), p, case
    )


def padded_input(p, case: ConvCase, dtype: torch.dtype) -> torch.Tensor:
    """The input as a convolution without padding would read it."""
    x, (up_y, up_x) = p.x.to(dtype), case.upsample
    spread = x.new_zeros(*x.shape[:2], x.shape[2] * up_y, x.shape[3] * up_x)
    spread[:, :, ::up_y, ::up_x] = x
    sides = []
    for i in (1, 0):
        needed = (case.outputs()[i] - 1) * case.stride[i] + 1
        needed += case.dilation[i] * (case.weight.kernel[i] - 1)
        sides += [case.padding[i], needed - case.padding[i] - spread.shape[2 + i]]
    return F.pad(spread, sides)


def dense_linear_conv(x, weight, case: ConvCase) -> torch.Tensor:
    return F.conv2d(x, weight, None, case.stride, 0, case.dilation)


def epilogue(y, p, case):
    if p.bias is not None:
        y = y + p.bias.to(y.dtype).view(-1, *[1] * (len(case.tail()) and 2))
    y = ACTIVATIONS[case.activation](y)
    return y if p.residual is None else y + p.residual.to(y.dtype)


def dense_matmul(p, case: MatmulCase, dtype: torch.dtype) -> torch.Tensor:
    return epilogue(F.linear(p.x.to(dtype), p.weight.flatten(1).to(dtype)), p, case)


def pairs(cases, few):
    """(back end, case, dtypes): everything where it is fast, one of each kind where it is slow.

    Slow back ends see more in tests/kernels.
    """
    chosen = []
    for back_end in TESTED:
        dtypes = (torch.float32, torch.bfloat16) if back_end.slow else DTYPES
        for case in few if back_end.slow else cases:
            chosen.append(pytest.param(back_end, case, dtypes, id=f"{back_end}-{case.name}"))
    return chosen


@cache
def dense_results(dense: Callable, case, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The result in float64 and by torch's dense product in `dtype`, once for all back ends."""
    p = case.build(dtype)
    return dense(p, case, torch.float64), dense(p, case, dtype)


def check(back_end, case, dtypes, name, dense):
    call = op_of(back_end, name)
    for dtype in dtypes:
        p = case.build(dtype, back_end.device)
        before = [t.clone() for t in (p.x, p.values, p.columns, p.starts)]
        y = call(*p.args(), case.activation)
        what = f"{back_end}, {case.name} in {dtype}"
        assert_as_close_as_dense(y, *dense_results(dense, case, dtype), what)
        for kept, now in zip(before, (p.x, p.values, p.columns, p.starts), strict=True):
            assert_bitwise_equal(now, kept, f"an input of {what}")


@pytest.mark.parametrize("back_end, case, dtypes", pairs(CONVS, FEW_CONVS))
def test_conv2d(back_end, case, dtypes):
    check(back_end, case, dtypes, "sparse_conv2d", dense_conv)


@pytest.mark.parametrize("back_end, case, dtypes", pairs(MATMULS, FEW_MATMULS))
def test_matmul(back_end, case, dtypes):
    check(back_end, case, dtypes, "sparse_matmul", dense_matmul)


RANDOM = random_convs(60)


@pytest.mark.parametrize("case", RANDOM, ids=names(RANDOM))
@pytest.mark.parametrize("back_end", [REFERENCE, *FAST], ids=str)
def test_random_convolutions(back_end, case):
    dtypes = (torch.float32, torch.bfloat16)
    check(back_end, case, dtypes, "sparse_conv2d", dense_conv)
    if case in PLAIN:
        check_values_grad(back_end, case, dtypes, "sparse_conv2d_values_grad", dense_conv_grad)


def gather_entries(weight, p, v):
    """The stored positions of a dense gradient, [E, v]."""
    blocks = torch.repeat_interleave(p.starts.diff().long())
    return weight.reshape(len(p.starts) - 1, v, -1)[blocks, :, p.columns.long()]


def dense_conv_grad(p, case, dtype):
    weight = p.weight.to(dtype).requires_grad_()
    y = dense_linear_conv(padded_input(p, case, dtype), weight, case)
    return gather_entries(torch.autograd.grad(y, weight, p.grad.to(dtype))[0], p, case.weight.v)


def dense_matmul_grad(p, case, dtype):
    weight = p.weight.flatten(1).to(dtype).requires_grad_()
    y = F.linear(p.x.to(dtype), weight)
    return gather_entries(torch.autograd.grad(y, weight, p.grad.to(dtype))[0], p, case.weight.v)


PLAIN = [c for c in (*CONVS, *RANDOM) if c.upsample == (1, 1) and c.activation == "none"]
PLAIN_CONVS = [c for c in PLAIN if c in CONVS]
PLAIN_MATMULS = [c for c in MATMULS if c.activation == "none"]


def check_values_grad(back_end, case, dtypes, name, dense):
    call = op_of(back_end, name)
    for dtype in dtypes:
        p = case.build(dtype, back_end.device)
        arguments = (p.x, p.grad, p.columns, p.starts, case.weight.v)
        geometry = case.grad_tail()
        grad = call(*arguments, *geometry)
        what = f"{back_end}, gradient of {case.name} in {dtype}"
        assert_as_close_as_dense(grad, *dense_results(dense, case, dtype), what)


@pytest.mark.parametrize("back_end, case, dtypes", pairs(PLAIN_CONVS, FEW_CONVS))
def test_conv2d_values_grad(back_end, case, dtypes):
    check_values_grad(back_end, case, dtypes, "sparse_conv2d_values_grad", dense_conv_grad)


@pytest.mark.parametrize("back_end, case, dtypes", pairs(PLAIN_MATMULS, FEW_MATMULS))
def test_matmul_values_grad(back_end, case, dtypes):
    check_values_grad(back_end, case, dtypes, "sparse_matmul_values_grad", dense_matmul_grad)


LARGER = [c for c in (*CONVS, *MATMULS) if c.work > 4e5]


def calls_of(back_end, case, dtype):
    """The product and the gradient of its values, as functions without arguments."""
    kind = "conv2d" if isinstance(case, ConvCase) else "matmul"
    forward = op_of(back_end, f"sparse_{kind}")
    backward = op_of(back_end, f"sparse_{kind}_values_grad")
    p = case.build(dtype, back_end.device)
    arguments = (p.x, p.grad, p.columns, p.starts, case.weight.v, *case.grad_tail())
    return lambda: forward(*p.args(), case.activation), lambda: backward(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGER, ids=[c.name for c in LARGER])
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_the_same_bits_in_every_run_and_for_any_number_of_threads(back_end, case, dtype, threads):
    for call in calls_of(back_end, case, dtype):
        threads(1)
        expected = call()
        for count in (1, 2, 3):
            threads(count)
            assert_bitwise_equal(call(), expected, f"{case.name} by {count} threads")


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.slow], ids=str)
def test_the_same_bits_in_every_run_where_slow(back_end):
    for case in (FEW_CONVS[0], FEW_MATMULS[0]):
        for call in calls_of(back_end, case, torch.float32):
            assert_bitwise_equal(call(), call(), f"{case.name} twice")


@pytest.mark.parametrize("back_end", TESTED, ids=str)
def test_a_batch_of_nothing(back_end):
    case = FEW_CONVS[0]
    p = case.build(torch.float32, back_end.device)
    empty = op_of(back_end, "sparse_conv2d")(p.x[:0], *p.args()[1:])
    assert empty.shape == (0, *p.grad.shape[1:])
    arguments = (p.x[:0], p.grad[:0], p.columns, p.starts, case.weight.v, *case.grad_tail())
    grad = op_of(back_end, "sparse_conv2d_values_grad")(*arguments)
    assert_bitwise_equal(grad, torch.zeros_like(p.values), "the gradient of nothing")


GEOMETRIES = [
    dict(stride=1, padding=1),
    dict(stride=2, padding=(1, 0)),
    dict(stride=(1, 3), padding=[2, 5], dilation=2),
    dict(padding=6, dilation=(1, 2)),
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_public_convolution(geometry):
    x, bias = torch.randn(2, 8, 9, 11), torch.randn(16)
    weight = ops.nm_prune(torch.randn(16, 8, 3, 3), issp.Keep(1, of=4, v=4))
    expected = F.conv2d(x, weight, bias, **geometry)
    residual = torch.randn_like(expected)
    for call, p in (
        (ops.sparse_conv2d, ops.sparse_pack(weight, v=2)),
        (ops.nm_conv2d, ops.nm_pack(weight, issp.Keep(1, of=4, v=4))),
    ):
        torch.testing.assert_close(call(x, p, bias, **geometry), expected)
        finished = call(x, p, bias, **geometry, residual=residual, activation="gelu")
        torch.testing.assert_close(finished, F.gelu(expected) + residual)


def test_public_matmul():
    x, bias = torch.randn(2, 5, 8), torch.randn(16)
    weight = ops.nm_prune(torch.randn(16, 8), issp.Keep(2, of=4))
    expected = F.linear(x, weight, bias)
    residual = torch.randn_like(expected)
    for call, p in (
        (ops.sparse_matmul, ops.sparse_pack(weight)),
        (ops.nm_matmul, ops.nm_pack(weight, issp.Keep(2, of=4))),
    ):
        torch.testing.assert_close(call(x, p, bias), expected)
        finished = call(x, p, bias, residual=residual, activation="relu")
        torch.testing.assert_close(finished, F.relu(expected) + residual)


def test_input_of_any_memory_format():
    p = ops.sparse_pack(torch.randn(6, 8, 3, 3))
    x = torch.randn(2, 16, 9, 7)
    contiguous = x[:, ::2].contiguous()
    expected = ops.sparse_conv2d(contiguous, p)
    for strange in (x[:, ::2], contiguous.to(memory_format=torch.channels_last)):
        assert not strange.is_contiguous()
        y = ops.sparse_conv2d(strange, p)
        assert y.is_contiguous()
        assert_bitwise_equal(y, expected, "the result for another memory format")
    residual = torch.randn_like(expected).to(memory_format=torch.channels_last)
    with_residual = ops.sparse_conv2d(contiguous, p, residual=residual)
    torch.testing.assert_close(with_residual, expected + residual)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_autocast_does_as_for_a_dense_convolution(grad):
    weight, bias = torch.randn(6, 8, 3, 3), torch.randn(6)
    x = torch.randn(2, 8, 9, 7, requires_grad=grad)
    p = ops.sparse_pack(weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = ops.sparse_conv2d(x, p, bias), F.conv2d(x, weight, bias)
        assert ops.sparse_conv2d(x.double(), p.to(torch.float64)).dtype == torch.float64
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)
    if grad:
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        assert grad_x.dtype == torch.float32
