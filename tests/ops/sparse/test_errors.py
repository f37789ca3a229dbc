"""Wrong input to sparse ops, packing and layers: one clear sentence of the right kind."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import issp
from issp import Keep, backends, ops
from issp.nn import NMConv2d, NMLinear, SparseConv2d, SparseLinear, convert
from issp.ops import sparse, validation
from issp.ops.formats import NMTensor, SparseRows
from issp.ops.geometry import Geometry
from tests.backends import BACK_ENDS
from tests.ops.sparse.cases import ConvCase, MatmulCase, Weight
from tests.ops.sparse.test_parity import op_of

CONV = ConvCase("wrong", Weight(8, 6, (3, 3), 0.4, 4), residual=True, padding=(1, 1))
MATMUL = MatmulCase("wrong", Weight(8, 6, pattern=0.8, v=4), residual=True)
CONV_NAMES = (
    *("x", "values", "col_indices", "crow_indices", "transposed", "bias", "residual"),
    *("geometry", "activation"),
)


def moved(index, by):
    """The list with one entry changed."""

    def change(t):
        t = t.clone()
        t[index] += by
        return t

    return change


def swapped(t):
    t = t.clone()
    t[0], t[1] = t[1].item(), t[0].item()
    return t


# argument: (what is done to it, kind of error, words); the same for both ops.
BAD = {
    "x: a list": (lambda t: t.tolist(), TypeError, "x must be a tensor, not list"),
    "x: integers": (lambda t: t.int(), TypeError, "x has dtype torch.int32: use float32"),
    "x: not contiguous": (lambda t: t.transpose(0, -1), ValueError, "x is not contiguous"),
    "x: sparse": (lambda t: t.to_sparse(), ValueError, r"x is torch.sparse_coo: pass x.to_dense"),
    "x: another dtype": (lambda t: t.double(), TypeError, "float32 but x is torch.float64"),
    "x: fewer channels": (lambda t: t.narrow(CHANNEL[t.dim()], 0, 2).contiguous(), ValueError,
                          r"col_indices must lie in 0\.\.\d+.*same number of channels"),
    "values: one dimension": (lambda t: t.flatten(), ValueError, r"must be \[entries, v\]"),
    "values: too few": (lambda t: t[1:].contiguous(), ValueError, "rows of values for"),
    "values: another device": (lambda t: t.to("meta"), ValueError, "values are on meta"),
    "bias: another device": (lambda t: t.to("meta"), ValueError, "bias is on meta but x is on cpu"),
    "col_indices: int64": (lambda t: t.long(), TypeError,
                           "col_indices has dtype torch.int64.*int32"),
    "col_indices: another device": (lambda t: t.to("meta"), ValueError,
                                    "col_indices is on meta but x is on cpu"),
    "col_indices: None": (lambda t: None, TypeError, "col_indices must be a tensor"),
    "col_indices: two dimensions": (lambda t: t[None], ValueError, "col_indices must be contig"),
    "col_indices: too large": (moved(-1, 1000), ValueError, "col_indices must lie in"),
    "col_indices: negative": (moved(0, -1000), ValueError, "col_indices must lie in"),
    "col_indices: not ascending": (swapped, ValueError, "ascend strictly within each block"),
    "col_indices: twice": (lambda t: torch.cat([t[1:2], t[1:]]), ValueError, "ascend strictly"),
    "crow_indices: int64": (lambda t: t.long(), TypeError, "crow_indices has dtype torch.int64"),
    "crow_indices: no block": (lambda t: t[:1], ValueError, "crow_indices has no block"),
    "crow_indices: not from 0": (moved(0, 1), ValueError, "crow_indices must ascend from 0"),
    "crow_indices: beyond the end": (moved(-1, 1), ValueError, "crow_indices must ascend from 0"),
    "crow_indices: descending": (moved(1, 1000), ValueError, "crow_indices must ascend from 0"),
    "transposed: two lists": (lambda t: t[:2], ValueError, "transposed must be empty or hold"),
    "transposed: another weight's": (lambda t: [t[0][1:], *t[1:]], ValueError,
                                     "transposed col_indices has .* belongs to another weight"),
    "transposed: int64": (lambda t: [x.long() for x in t], TypeError, "transposed col_indices has"),
    "bias: too short": (lambda t: t[1:], ValueError, r"bias has shape \(7,\): it must be \(8,\)"),
    "bias: another dtype": (lambda t: t.half(), TypeError, "bias has dtype torch.float16"),
    "residual: another shape": (lambda t: t[..., :1].contiguous(), ValueError, "residual has sha"),
    "residual: not contiguous": (lambda t: t.transpose(-1, -2).contiguous().transpose(-1, -2),
                                 ValueError, "residual is not contiguous"),
    "activation: unknown": (lambda t: "tanh", ValueError, 'activation is "tanh": use one of none'),
}  # fmt: skip
CHANNEL = {4: 1, 2: 1}
BAD_CONV = {
    "x: three dimensions": (lambda t: t[0], ValueError, r"x must be \[N, C, H, W\]"),
    "kernel: zero": (lambda t: (3, 0), ValueError, r"kernel is \(3, 0\)"),
    "kernel: smaller": (lambda t: (1, 1), ValueError, "col_indices must lie in"),
    "stride: zero": (lambda t: (0, 1), ValueError, r"stride is \(0, 1\): it must be two"),
    "dilation: negative": (lambda t: (1, -1), ValueError, "dilation is"),
    "upsample: zero": (lambda t: (0, 0), ValueError, "upsample is"),
    "size: zero": (lambda t: (0, 4), ValueError, "size is"),
    "size: another": (lambda t: (3, 4), ValueError, "residual has shape"),
    "geometry: too short": (lambda t: t[:-1], ValueError, "geometry has 11 numbers: it must have "
                            "12, the height and width of kernel, stride, padding, dilation, ups"),
    "geometry: too long": (lambda t: (*t, 1), ValueError, "geometry has 13 numbers"),
    "geometry: none": (lambda t: (), ValueError, "geometry has 0 numbers"),
}  # fmt: skip


def spoilt(case, name, change):
    arguments = dict(zip(CONV_NAMES, case.build().args(), strict=False)) | {"activation": "none"}
    which = name.partition(":")[0]
    if which in Geometry._fields:
        by = case.geometry()
        changed = by._replace(**{which: change(getattr(by, which))})
        arguments["geometry"] = changed.for_conv2d()
    else:
        arguments[which] = change(arguments[which])
    return tuple(arguments.values())


def refuses(op, check, args, kind, words):
    """Native code refuses in its own words; the check behind it finds the exact ones."""
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        op(*args)
    with pytest.raises(kind, match=words) as caught:
        check(*args)
    assert "\n" not in str(caught.value).strip()


@pytest.mark.parametrize("name", [*BAD, *BAD_CONV])
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_conv2d_refuses(back_end, name):
    change, kind, words = (BAD | BAD_CONV)[name]
    args = spoilt(CONV, name, change)
    refuses(op_of(back_end, "sparse_conv2d"), validation.check_sparse_conv2d, args, kind, words)
    with pytest.raises(kind, match=words):
        sparse._conv2d(*args)


def test_sparse_layouts_and_sizes_are_refused_by_the_public_functions():
    """Before torch is asked to make them contiguous, or to allocate anything."""
    weight, image = torch.randn(4, 4), torch.randn(1, 1, 4, 4)
    p, one = ops.sparse_pack(weight), ops.sparse_pack(torch.ones(1, 1, 1, 1))
    for call in (
        lambda: ops.sparse_matmul(weight.to_sparse(), p),
        lambda: ops.sparse_conv2d(image.to_sparse(), one),
        lambda: ops.magnitude_threshold([weight.to_sparse()], [3]),
    ):
        with pytest.raises(ValueError, match=r"is torch.sparse_coo: pass \S+.to_dense\(\)"):
            call()
    for grad in (False, True):
        p.values.requires_grad_(grad)
        with pytest.raises(ValueError, match=r"residual is torch.sparse_coo: pass residual.to_de"):
            ops.sparse_matmul(weight, p, residual=weight.to_sparse())
    huge = torch.empty(1, 1, 1, 2**31, device="meta")
    with pytest.raises(ValueError, match="x has the shape .* no size may exceed 2147483647"):
        ops.sparse_conv2d(huge, one)


def test_the_fake_of_a_convolution_needs_an_output_size():
    args = [
        x.to("meta") if isinstance(x, torch.Tensor) else x for x in spoilt(CONV, "x", lambda t: t)
    ]
    args[CONV_NAMES.index("transposed")] = []
    args[CONV_NAMES.index("geometry")] = CONV.geometry().for_values_grad()
    with pytest.raises(ValueError, match="the geometry has no output size: pass 12 numbers"):
        torch.ops.issp.sparse_conv2d(*args)


BAD_MATMUL = {
    "x: a single number": (lambda t: torch.tensor(1.0), ValueError, r"the shape \[\.\.\., I\]"),
}


@pytest.mark.parametrize("name", BAD | BAD_MATMUL)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_matmul_refuses(back_end, name):
    change, kind, words = (BAD | BAD_MATMUL)[name]
    args = spoilt(MATMUL, name, change)
    refuses(op_of(back_end, "sparse_matmul"), validation.check_sparse_matmul, args, kind, words)
    with pytest.raises(kind, match=words):
        sparse._matmul(*args)


BAD_GRAD = {
    "x: a single number": (lambda t: torch.tensor(1.0), ValueError, r"x must (have|be)"),
    "x: integers": (lambda t: t.int(), TypeError, "x has dtype"),
    "x: fewer channels": (lambda t: t[:, :2].contiguous(), ValueError, "col_indices must lie in"),
    "grad: another dtype": (lambda t: t.double(), TypeError, "grad has dtype torch.float64"),
    "grad: other rows": (lambda t: t[:, 1:].contiguous(), ValueError, "grad has shape"),
    "grad: not contiguous": (lambda t: t.transpose(0, -1), ValueError, "grad is not contiguous"),
    "col_indices: not ascending": (swapped, ValueError, "ascend strictly"),
    "crow_indices: descending": (moved(1, 1000), ValueError, "crow_indices must ascend"),
    "v: zero": (lambda v: 0, ValueError, "v is 0"),
    "v: another": (lambda v: 2, ValueError, "grad has shape"),
}


@pytest.mark.parametrize("name", BAD_GRAD)
@pytest.mark.parametrize("case", [CONV, MATMUL], ids=["conv2d", "matmul"])
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_values_grad_refuses(back_end, case, name):
    change, kind, words = BAD_GRAD[name]
    p, which = case.build(), name.partition(":")[0]
    arguments = dict(x=p.x, grad=p.grad, col_indices=p.columns, crow_indices=p.starts, v=4)
    arguments[which] = change(arguments[which])
    op = f"sparse_{'conv2d' if case is CONV else 'matmul'}_values_grad"
    args = (*arguments.values(), *case.grad_tail())
    refuses(op_of(back_end, op), validation.SPARSE_OPS[op], args, kind, words)


BAD_GRAD_GEOMETRY = {
    "twelve numbers": (CONV.tail()[0], r"has 12 numbers: it must have 8,.*padding, dilation$"),
    "stride zero": ((3, 3, 0, 1, 1, 1, 1, 1), r"stride is \(0, 1\)"),
}


@pytest.mark.parametrize("name", BAD_GRAD_GEOMETRY)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_values_grad_refuses_a_geometry(back_end, name):
    geometry, words = BAD_GRAD_GEOMETRY[name]
    p, op = CONV.build(), "sparse_conv2d_values_grad"
    args = (p.x, p.grad, p.columns, p.starts, 4, geometry)
    refuses(op_of(back_end, op), validation.SPARSE_OPS[op], args, ValueError, words)


@pytest.mark.parametrize("grad", [False, True], ids=["inference", "training"])
def test_public_functions_refuse(grad):
    """The same sentences whether gradients are wanted or not."""
    x = torch.randn(2, 6, 5, 7, requires_grad=grad)
    y = torch.randn(3, 6, requires_grad=grad)
    conv, linear = ops.sparse_pack(torch.randn(8, 6, 3, 3)), ops.sparse_pack(torch.randn(8, 6))
    residual = torch.randn(2, 8, 1, 1)
    for call, kind, words in (
        (lambda: ops.sparse_conv2d(x[0], conv), ValueError, r"without a batch: pass x\[None\]"),
        (lambda: ops.sparse_conv2d(y, conv), ValueError, r"it must be \[N, C, H, W\]"),
        (lambda: ops.sparse_conv2d(x[:, 1:], conv), ValueError, "has 5 channels.*needs 6"),
        (lambda: ops.sparse_conv2d(x, linear), ValueError, r"is \[O, I, kh, kw\], not \(8, 6\)"),
        (lambda: ops.sparse_conv2d(x, conv.to_dense()), TypeError, "pack the weight, issp.ops.sp"),
        (lambda: ops.nm_conv2d(x, conv), TypeError, "is SparseRows, not NMTensor.*nm_pack"),
        (lambda: ops.sparse_conv2d([x], conv), TypeError, "x must be a tensor, not list"),
        (lambda: ops.sparse_conv2d(x.double(), conv), TypeError, "convert one of them"),
        (lambda: ops.sparse_conv2d(x, conv, stride=0), ValueError, "stride is 0: it must be at"),
        (lambda: ops.sparse_conv2d(x, conv, padding=-1), ValueError, "padding is -1"),
        (lambda: ops.sparse_conv2d(x, conv, padding="same"), TypeError, "an int or two of them"),
        (lambda: ops.sparse_conv2d(x, conv, dilation=(1, 2, 3)), TypeError, "dilation is"),
        (lambda: ops.sparse_conv2d(x, conv, dilation=4), ValueError, "does not fit.*pad more"),
        (lambda: ops.sparse_conv2d(x, conv, torch.ones(7)), ValueError, "bias has shape"),
        (lambda: ops.sparse_conv2d(x, conv, residual=residual), ValueError, "residual has shape"),
        (lambda: ops.sparse_conv2d(x, conv, activation="silu"), ValueError, 'is "silu": use one'),
        (lambda: ops.sparse_matmul(y, conv), ValueError, r"is \[O, I\], not \(8, 6, 3, 3\)"),
        (lambda: ops.sparse_matmul(y[:, 1:], linear), ValueError, "has 5 channels.*needs 6"),
        (lambda: ops.sparse_matmul(y[0, 0], linear), ValueError, r"it must be \[\.\.\., I\]"),
        (lambda: ops.nm_matmul(y, linear), TypeError, "not NMTensor"),
        (lambda: ops.sparse_matmul(y, linear, residual=torch.ones(8)), ValueError, "residual has"),
    ):
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_what_is_refused_does_not_depend_on_earlier_calls():
    """Geometries are looked up: 1.0 is equal to 1, and a list cannot be looked up."""
    x, p = torch.randn(2, 6, 5, 7), ops.sparse_pack(torch.randn(8, 6, 3, 3))
    expected = ops.sparse_conv2d(x, p, padding=1)
    for same in ((1, 1), [1, 1]):
        assert torch.equal(ops.sparse_conv2d(x, p, padding=same), expected)
    for _ in range(2):
        for wrong in (1.0, [1, 1, 1], "11"):
            with pytest.raises(
                TypeError, match="padding is .*: it must be an int or two"
            ) as caught:
                ops.sparse_conv2d(x, p, padding=wrong)
            assert caught.value.__context__ is None
        with pytest.raises(ValueError, match="has 5 channels"):
            ops.sparse_conv2d(x[:, 1:], p, padding=1)


@pytest.mark.parametrize("op", ["sparse_conv2d", "sparse_matmul"])
def test_the_ops_refuse_gradients_through_their_epilogues(op):
    case = CONV if op == "sparse_conv2d" else MATMUL
    call = getattr(torch.ops.issp, op)
    p = case.build()
    args = p.args()
    p.residual.requires_grad_()
    with pytest.raises(RuntimeError, match=f"{op} has no gradient.*use issp.ops.{op}"):
        call(*args)
    p.residual.requires_grad_(False)
    p.x.requires_grad_()
    call(*args)
    with pytest.raises(RuntimeError, match="no gradient through activation"):
        call(*args, "relu")
    with torch.no_grad():
        call(*args, "relu")


def test_the_op_refuses_the_gradient_of_values_under_an_input_spread_by_zeros():
    p = ConvCase("spread", Weight(8, 6, (3, 3), 0.4), padding=(1, 1), upsample=(2, 2)).build()
    p.values.requires_grad_()
    with pytest.raises(RuntimeError, match=r"needs upsample 1, not \(2, 2\)"):
        torch.ops.issp.sparse_conv2d(*p.args())


def test_packing_refuses():
    weight = torch.randn(8, 12, 3, 3)
    pruned = ops.nm_prune(weight, Keep(2, of=4))
    p = ops.nm_pack(pruned, Keep(2, of=4))
    parts = (p.values, p.col_indices, p.crow_indices)
    for call, kind, words in (
        (lambda: ops.nm_pack(weight, Keep(1, of=4)), ValueError,
         r"24 groups hold more than 1 weights per 4 \(the first: row 0, channels 0\.\.\.3\): "
         r"prune first, issp.ops.nm_prune\(weight, Keep\(n=1, of=4"),
        (lambda: ops.nm_pack(pruned, Keep(2, of=4, v=2)), ValueError, "groups hold more than 2"),
        (lambda: ops.nm_pack(weight, Keep(1, of=5)), ValueError, "does not divide into groups"),
        (lambda: ops.nm_pack(weight, Keep(1, of=4, layout="flat")), ValueError,
         "unstructured, use issp.ops.sparse_pack"),
        (lambda: ops.nm_pack(weight, 4), TypeError, "keep must be an issp.Keep, not int"),
        (lambda: ops.sparse_pack(weight, v=3), ValueError, "v = 3 does not divide the 8 rows"),
        (lambda: ops.sparse_pack(weight, v=0), ValueError, "v = 0 does not divide"),
        (lambda: ops.sparse_pack(weight[0]), ValueError, r"it must be \[O, I\] or"),
        (lambda: ops.sparse_pack(weight[:0]), ValueError, "every size must be at least 1"),
        (lambda: ops.sparse_pack(weight.int()), TypeError, "dtype torch.int32: use float32"),
        (lambda: ops.sparse_pack([1.0]), TypeError, "must be a tensor, not list"),
        (lambda: SparseRows(*parts, (9, 12, 3, 3)), ValueError, "describe 8 rows, but the shape"),
        (lambda: SparseRows(*parts, (8, 6, 3, 3)), ValueError, r"col_indices must lie in 0\.\.53"),
        (lambda: SparseRows(*parts, (8, 108, 1)), ValueError, "it must be"),
        (lambda: NMTensor(*parts, p.shape, Keep(1, of=4)), ValueError, "do not keep 1 of every 4"),
        (lambda: NMTensor(*parts, p.shape, Keep(2, of=4, v=2)), ValueError, "values have v = 1"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_layers_refuse():
    conv = nn.Conv2d(8, 6, 3)
    keep = Keep(1, of=4)
    for call, kind, words in (
        (lambda: NMConv2d.from_dense(conv, keep), ValueError, "prune first, issp.ops.nm_prune"),
        (lambda: NMConv2d.from_dense(conv, Keep(1, of=3), mask="ste"), ValueError,
         r"NMConv2d's weight \(6, 8, 3, 3\) does not divide"),
        (lambda: NMConv2d.from_dense(nn.Linear(8, 6), keep), TypeError,
         "NMConv2d is made from nn.Conv2d, not Linear"),
        (lambda: NMLinear(8, 6, keep=Keep(1, of=4, layout="flat")), ValueError, "sparse_pack"),
        (lambda: NMLinear(8, 6, keep=keep, mask="moving"), ValueError, 'mask is "moving": use'),
        (lambda: NMLinear(8, 6, keep=keep, activation="silu"), ValueError, "use one of none"),
        (lambda: NMConv2d(8, 8, 3, groups=2, keep=keep), ValueError, "groups = 1 only, not 2"),
        (lambda: NMConv2d(8, 8, 3, padding_mode="reflect", keep=keep), ValueError,
         'by zeros only, not by "reflect"'),
        (lambda: NMConv2d(8, 8, 2, padding="same", keep=keep), ValueError, "both sides"),
        (lambda: NMLinear.from_dense(nn.Linear(8, 8, device="meta"), keep), ValueError,
         "meta device, where no weight is zero: give it memory"),
        (lambda: SparseConv2d(8, 6, 3, sparsity=0.5, v=4), ValueError, "v = 4 does not divide"),
        (lambda: SparseLinear(8, 6, sparsity=1.5), ValueError, "it must lie in 0..1"),
        (lambda: SparseLinear.from_dense(nn.Linear(8, 6), mask="ste"), ValueError,
         '"ste" and "sr-ste" need a sparsity'),
        (lambda: SparseLinear.from_dense(nn.Linear(8, 6), sparsity=0.5), ValueError,
         '"fixed" keeps what is not zero'),
        (lambda: convert(nn.Linear(8, 6), keep=keep), ValueError, "itself one layer"),
        (lambda: convert(nn.Sequential(conv), keep=keep, exclude="x"), ValueError, "matches no"),
        (lambda: convert(nn.Sequential(conv), keep=keep, v=2), ValueError, "leave sparsity and v"),
    ):  # fmt: skip
        with pytest.raises(kind, match=words) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_loading_checks_the_pattern_and_changes_nothing():
    layer = NMLinear(8, 6, keep=Keep(1, of=4))
    other = NMLinear(8, 6, keep=Keep(2, of=4)).state_dict()
    good = NMLinear(8, 6, keep=Keep(1, of=4)).state_dict()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    shifted = dict(good, col_indices=(good["col_indices"] + 4) % 8)
    for state, words in (
        (other, "do not keep 1 of every 4 channels"),
        (shifted, "ascend strictly|do not keep"),
        (
            dict(good, crow_indices=good["crow_indices"].long()),
            "crow_indices has dtype torch.int64",
        ),
        (nn.Linear(8, 6).state_dict(), "holds no packed weight.*NMLinear.from_dense"),
    ):
        with pytest.raises(RuntimeError, match=words):
            layer.load_state_dict(state)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[name]), f"{name} has changed"
    rows = SparseLinear(8, 6, sparsity=0.5)
    with pytest.raises(RuntimeError, match="values have v = 2, the layer has v = 1"):
        rows.load_state_dict(SparseLinear(8, 6, sparsity=0.5, v=2).state_dict())


def test_a_layer_in_a_model_is_named_when_its_state_does_not_fit():
    model = nn.Sequential(nn.ReLU(), NMLinear(8, 6, keep=Keep(1, of=4)))
    other = nn.Sequential(nn.ReLU(), NMLinear(8, 6, keep=Keep(2, of=4)))
    with pytest.raises(RuntimeError, match="1: the positions do not keep"):
        model.load_state_dict(other.state_dict())


def test_the_package_names_its_layers():
    assert issp.nn.NMLinear is NMLinear and issp.ops.nm_pack is sparse.nm_pack


# What no back end can compute, or only after hours: geometry -> words.
HUGE = {
    "kernel": ([1 << 40, 1, 1, 1, 0, 0, 1, 1], "kernel"),
    "positions": ([1 << 20, 1 << 20, 1, 1, 0, 0, 1, 1], "positions"),
    "stride": ([1, 1, 1 << 31, 1, 0, 0, 1, 1], "stride"),
    "padding": ([1, 1, 1, 1, -(1 << 62), 0, 1, 1], "padding"),
    "dilation": ([3, 3, 1, 1, 0, 0, 1 << 30, 1 << 30], "too wide"),
    "dilation of one axis": ([1, 3, 1, 1, 0, 0, 1, 1 << 25], "too wide"),
}


@pytest.mark.parametrize("name", HUGE)
def test_windows_that_are_too_large(name):
    """Refused at once; products of such numbers used to leave 64 bits and divide by zero."""
    numbers, words = HUGE[name]
    x, rows = torch.ones(1, 1, 9, 9).double(), torch.zeros(2, dtype=torch.int32)
    values, columns = torch.zeros(0, 2).double(), torch.zeros(0, dtype=torch.int32)
    arguments = (x, values, columns, rows, [], None, None, [*numbers, 1, 1, 9, 9])
    if backends.active("cpu") == "cpp":
        with pytest.raises(RuntimeError, match=words):
            torch.ops.issp.sparse_conv2d(*arguments, "none")
    if words != "too wide":
        with pytest.raises(ValueError, match=words):
            validation.check_sparse_conv2d(*arguments, "none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("back_end", [*BACK_ENDS, None], ids=str)
def test_a_weight_without_inputs_gives_its_bias(back_end, dtype):
    """No sum is taken; the result used to be whatever the memory held."""
    table = backends.implementations("reference") if back_end is None else back_end
    device = "cpu" if back_end is None else back_end.device
    values = torch.zeros(0, 2, dtype=dtype, device=device)
    columns, starts = torch.zeros(0).int().to(device), torch.zeros(3).int().to(device)
    bias = torch.arange(4.0, dtype=dtype, device=device)
    weight = (values, columns, starts, [], bias, None)
    y = table["sparse_matmul"](torch.zeros(5, 0, dtype=dtype, device=device), *weight, "none")
    assert torch.equal(y, bias.expand(5, 4))
    geometry = (3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 6, 7)
    x = torch.zeros(2, 0, 6, 7, dtype=dtype, device=device)
    y = table["sparse_conv2d"](x, *weight, geometry, "none")
    assert torch.equal(y, bias.view(4, 1, 1).expand(2, 4, 6, 7))


def test_padding_that_crops_the_whole_image():
    """Negative padding beyond the image: every tap reads zeros, on the reference as well."""
    x = torch.ones(1, 2, 3, 3)
    values, columns = torch.ones(2, 1), torch.tensor([0, 5], dtype=torch.int32)
    starts, bias = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([7.0])
    arguments = (x, values, columns, starts, [], bias, None, [2, 2, 1, 1, -9, 1, 1, 1, 1, 1, 2, 3])
    for name in ("reference", *(["cpp"] if backends.active("cpu") == "cpp" else [])):
        y = backends.implementations(name)["sparse_conv2d"](*arguments, "none")
        assert torch.equal(y, torch.full((1, 1, 2, 3), 7.0)), name


TRANSPOSE = {
    "starts": ({"crow_indices": torch.tensor([0, 9], dtype=torch.int32)}, "must ascend from 0"),
    "columns": ({"col_indices": torch.tensor([0, 99], dtype=torch.int32)}, "col_indices must lie"),
    "taps": ({"taps": 0}, "1 tap or more"),
    "negative taps": ({"taps": -(1 << 63)}, "1 tap or more"),
    "inputs": ({"inputs": -1}, "give a number of channels"),
    "v": ({"v": 1 << 62}, "more than 2147483647 rows"),
    "entries": ({"v": 1 << 30, "taps": 4}, "at most 2147483647"),
    "int64": ({"col_indices": torch.tensor([0, 2])}, "must be int32"),
}


@pytest.mark.parametrize("name", TRANSPOSE)
def test_transposing_refuses(name):
    changes, words = TRANSPOSE[name]
    arguments = {
        "col_indices": torch.tensor([0, 2], dtype=torch.int32),
        "crow_indices": torch.tensor([0, 2], dtype=torch.int32),
        **{"v": 1, "inputs": 3, "taps": 4},
    }
    with pytest.raises((TypeError, ValueError), match=words):
        torch.ops.issp._sparse_transpose(*(arguments | changes).values())
