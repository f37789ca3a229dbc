"""Derivatives of the sparse ops, and the ops as torch sees them: opcheck, compilation."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

import issp
from issp import ops
from issp.ops.formats import SparseRows
from tests.asserts import assert_bitwise_equal
from tests.ops.sparse.cases import CONVS, FEW_CONVS, FEW_MATMULS, names

op = torch.ops.issp

# gradcheck asks for one product per number: the small ones.
SMALL = [c for c in FEW_CONVS if c.work < 3e4] + [
    c
    for c in CONVS
    if c.name in ("negative padding", "one channel", "odd rows, v=3", "fewer outputs")
]
SPREAD = [c for c in CONVS if c.upsample != (1, 1)]
SMALL_MATMULS = [c for c in FEW_MATMULS if c.work < 1e4]


def leaves(p, values=True):
    """x, values and bias of a product as leaves that want gradients."""
    wanted = [p.x, p.values, p.bias] if values else [p.x, p.bias]
    return [t.requires_grad_() for t in wanted if t is not None]


@pytest.mark.parametrize("has_lists", [True, False], ids=["transposed", "found anew"])
@pytest.mark.parametrize("case", SMALL, ids=names(SMALL))
def test_gradcheck_conv2d(case, has_lists):
    p = case.build(torch.float64)
    args = p.args()
    transposed = p.transposed if has_lists else []

    def call(x, values, bias):
        return op.sparse_conv2d(x, values, *args[2:4], transposed, bias, *args[6:])

    assert torch.autograd.gradcheck(call, leaves(p), fast_mode=True)


@pytest.mark.parametrize("case", SPREAD, ids=names(SPREAD))
def test_gradcheck_of_an_input_spread_by_zeros(case):
    p = case.build(torch.float64)
    args = p.args()

    def call(x, bias):
        return op.sparse_conv2d(x, *args[1:5], bias, *args[6:])

    assert torch.autograd.gradcheck(call, leaves(p, values=False), fast_mode=True)


@pytest.mark.parametrize("has_lists", [True, False], ids=["transposed", "found anew"])
@pytest.mark.parametrize("case", SMALL_MATMULS, ids=names(SMALL_MATMULS))
def test_gradcheck_matmul(case, has_lists):
    p = case.build(torch.float64)
    transposed = p.transposed if has_lists else []

    def call(x, values, bias):
        return op.sparse_matmul(x, values, p.columns, p.starts, transposed, bias, None)

    assert torch.autograd.gradcheck(call, leaves(p), fast_mode=True)


def dense_twin(weight, v):
    """A packed weight whose values want gradients, and its dense copy that does as well."""
    p = ops.sparse_pack(weight, v)
    p.values.requires_grad_()
    return p, weight.clone().requires_grad_()


def gather_entries(gradient, p):
    """The entries of a dense gradient."""
    blocks = torch.repeat_interleave(p.crow_indices.diff().long())
    return gradient.reshape(len(p.crow_indices) - 1, p.v, -1)[blocks, :, p.col_indices.long()]


@pytest.mark.parametrize("activation", ["none", "relu", "gelu"])
@pytest.mark.parametrize("v", [1, 4])
def test_public_gradients_are_the_dense_ones(v, activation):
    weight = torch.randn(8, 6, 3, 3, dtype=torch.float64)
    weight *= torch.rand(8 // v, 6, 3, 3).lt(0.4).repeat_interleave(v, 0)
    p, dense = dense_twin(weight, v)
    x = torch.randn(2, 6, 9, 8, dtype=torch.float64).to(memory_format=torch.channels_last)
    bias, residual = torch.randn(8).double(), torch.randn(2, 8, 5, 4).double()
    geometry = dict(stride=2, padding=1)
    act = {"none": lambda y: y, "relu": F.relu, "gelu": F.gelu}[activation]
    inputs = [t.clone().requires_grad_() for t in (x, bias, residual)]
    y = ops.sparse_conv2d(
        *(inputs[0], p, inputs[1]), **geometry, residual=inputs[2], activation=activation
    )
    expected = act(F.conv2d(inputs[0], dense, inputs[1], **geometry)) + inputs[2]
    torch.testing.assert_close(y, expected)
    factor = torch.randn_like(y)
    actual = torch.autograd.grad((y * factor).sum(), [*inputs, p.values])
    wanted = torch.autograd.grad((expected * factor).sum(), [*inputs, dense])
    torch.testing.assert_close(actual[:3], wanted[:3])
    torch.testing.assert_close(actual[3], gather_entries(wanted[3], p))


def test_matmul_gradients_are_the_dense_ones():
    weight = torch.randn(8, 6, dtype=torch.float64) * torch.rand(8, 6).lt(0.5)
    p, dense = dense_twin(weight, 1)
    x = torch.randn(4, 5, 6, dtype=torch.float64).transpose(0, 1).requires_grad_()
    bias = torch.randn(8, dtype=torch.float64, requires_grad=True)
    y, expected = ops.sparse_matmul(x, p, bias, activation="gelu"), F.gelu(F.linear(x, dense, bias))
    actual = torch.autograd.grad(y.square().sum(), [x, bias, p.values])
    wanted = torch.autograd.grad(expected.square().sum(), [x, bias, dense])
    torch.testing.assert_close(actual[:2], wanted[:2])
    torch.testing.assert_close(actual[2], gather_entries(wanted[2], p))


class Recorded(torch.utils._python_dispatch.TorchDispatchMode):
    """Names of the ops of issp that ran."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "issp":
            self.seen.append(func._schema.name.removeprefix("issp::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "wanted, expected",
    [
        ("x", ["sparse_conv2d"]),
        ("values", ["sparse_conv2d_values_grad"]),
        ("bias", []),
        ("x values bias", ["sparse_conv2d", "sparse_conv2d_values_grad"]),
    ],
)
def test_only_gradients_that_are_wanted_are_computed(wanted, expected):
    p = FEW_CONVS[0].build(torch.float64)
    for name in wanted.split():
        getattr(p, name).requires_grad_()
    y = op.sparse_conv2d(*p.args())
    saved = {id(t) for t in y.grad_fn.saved_tensors if t is not None}
    assert (id(p.x) in saved) == ("values" in wanted)
    with Recorded() as recorded:
        y.sum().backward()
    assert recorded.seen == expected


def test_transposed_lists_are_made_once():
    p = ops.sparse_pack(torch.randn(6, 4, 3, 3))
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    for expected in (1, 0):
        with Recorded() as recorded:
            ops.sparse_conv2d(x, p).sum().backward()
        assert recorded.seen.count("_sparse_transpose") == expected


def test_inference_is_one_kernel():
    p = ops.sparse_pack(torch.randn(6, 4, 3, 3))
    p.values.requires_grad_()
    x, residual = torch.randn(1, 4, 5, 5), torch.randn(1, 6, 3, 3)
    with torch.no_grad(), Recorded() as recorded:
        ops.sparse_conv2d(x, p, residual=residual, activation="gelu")
    assert recorded.seen == ["sparse_conv2d"]


def test_gradients_have_the_same_bits_in_every_run_and_for_any_number_of_threads(threads):
    weight = torch.randn(16, 12, 3, 3) * torch.rand(16, 12, 3, 3).lt(0.2)
    x, bias = torch.randn(2, 12, 17, 19, requires_grad=True), torch.randn(16, requires_grad=True)
    p, _ = dense_twin(weight, 1)

    def gradients():
        y = ops.sparse_conv2d(x, p, bias, padding=1)
        return torch.autograd.grad(y.square().sum(), [x, p.values])

    threads(1)
    expected = gradients()
    for count in (1, 2):
        threads(count)
        for actual, wanted in zip(gradients(), expected, strict=True):
            assert_bitwise_equal(actual, wanted, f"gradient by {count} threads")


OPCHECKED = [c for c in FEW_CONVS if c.name in ("stride, padding, dilation", "0.5 v=4 1x1")]


@pytest.mark.parametrize("has_lists", [True, False], ids=["transposed", "found anew"])
@pytest.mark.parametrize("case", OPCHECKED, ids=names(OPCHECKED))
def test_opcheck_conv2d(case, has_lists):
    p = case.build()
    leaves(p)
    args = list(p.args())
    args[4] = p.transposed if has_lists else []
    opcheck(op.sparse_conv2d.default, tuple(args))


def test_opcheck_epilogues_without_gradients():
    conv = next(c for c in CONVS if c.residual and c.activation == "gelu")
    opcheck(op.sparse_conv2d.default, (*conv.build().args(), "gelu"))
    p = FEW_MATMULS[0].build()
    residual = torch.randn_like(p.grad)
    opcheck(op.sparse_matmul.default, (*p.args()[:6], residual, "relu"))


def test_opcheck_matmul():
    p = FEW_MATMULS[0].build()
    leaves(p)
    opcheck(op.sparse_matmul.default, p.args())


def test_opcheck_values_grad_and_transpose():
    case = OPCHECKED[0]
    p, v = case.build(), case.weight.v
    geometry = case.grad_tail()
    arguments = (p.x, p.grad, p.columns, p.starts, v)
    opcheck(op.sparse_conv2d_values_grad.default, (*arguments, *geometry))
    taps = case.weight.kernel[0] * case.weight.kernel[1]
    opcheck(op._sparse_transpose.default, (p.columns, p.starts, v, case.weight.inputs, taps))
    case = FEW_MATMULS[0]
    p = case.build()
    arguments = (p.x, p.grad, p.columns, p.starts, case.weight.v)
    opcheck(op.sparse_matmul_values_grad.default, arguments)


class Attribute(torch.nn.Module):
    """A module that holds a packed weight as a plain attribute."""

    def __init__(self, p: SparseRows):
        super().__init__()
        self.p = p

    def forward(self, x, bias):
        return ops.nm_conv2d(x, self.p, bias, padding=1, activation="gelu")


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_training_compiles_to_one_graph(backend):
    keep = issp.Keep(1, of=4, v=2)
    weight = ops.nm_prune(torch.randn(6, 8, 3, 3), keep)
    x, bias = torch.randn(2, 8, 7, 9, requires_grad=True), torch.randn(6, requires_grad=True)

    def argument(x, p, bias):
        return ops.nm_conv2d(x, p, bias, padding=1, activation="gelu")

    gradients = []
    for compiled in (False, True):
        p = ops.nm_pack(weight, keep)
        p.values.requires_grad_()
        calls = [lambda x, p, bias: Attribute(p)(x, bias), argument]
        if compiled:
            module = torch.compile(Attribute(p), fullgraph=True, backend=backend)
            calls = [
                lambda x, p, bias, module=module: module(x, bias),
                torch.compile(argument, fullgraph=True, backend=backend),
            ]
        for call in calls:
            y = call(x, p, bias)
            gradients.append([y, *torch.autograd.grad(y.square().sum(), [x, p.values, bias])])
    for others in gradients[1:]:
        torch.testing.assert_close(others, gradients[0])


def test_inference_and_autocast_compile_to_one_graph():
    p = ops.sparse_pack(torch.randn(6, 8) * torch.rand(6, 8).lt(0.5))
    call = torch.compile(ops.sparse_matmul, fullgraph=True, backend="aot_eager")
    x, residual = torch.randn(5, 8), torch.randn(5, 6)
    with torch.no_grad():
        assert_bitwise_equal(
            call(x, p, None, residual, "gelu"),
            ops.sparse_matmul(x, p, None, residual, "gelu"),
            "the compiled product",
        )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(x, p).dtype == torch.bfloat16


@pytest.mark.parametrize("inputs", [1, 2], ids=["x", "x and values"])
def test_second_derivatives_say_why_not(inputs):
    p = ops.sparse_pack(torch.randn(6, 8))
    wanted = [torch.randn(5, 8, requires_grad=True), p.values.requires_grad_()][:inputs]
    y = ops.sparse_matmul(wanted[0], p).square().sum()
    first = torch.autograd.grad(y, wanted, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"no second derivatives: leave create_graph"):
        torch.autograd.grad(first[0].square().sum(), wanted)
