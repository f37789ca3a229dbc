"""`sparse_conv2d_fused`: a factor and a PixelShuffle in the convolution, bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

from issp import ops
from issp.ops import sparse, validation
from tests.asserts import assert_bitwise_equal
from tests.backends import FAST
from tests.cases import DTYPES
from tests.ops.sparse.cases import CONVS, ConvCase, Weight, names
from tests.ops.sparse.test_parity import REFERENCE, op_of

pytestmark = pytest.mark.sampled(slow_only=True, most=4)
ON_CPU = [REFERENCE, *(b for b in FAST if b.device == "cpu")]
W12 = Weight(36, 9, (3, 3), 0.3)
# Few entries are read directly, many through tiles; 1x1 has no rows of pixels.
SHUFFLED = [
    ConvCase("few entries", Weight(36, 24, (3, 3), 0.03), image=(16, 48), padding=(1, 1)),
    ConvCase("few entries, v=4", Weight(36, 24, (3, 3), 0.02, 4), image=(7, 16), padding=(1, 1)),
    ConvCase("many entries", Weight(36, 24, (3, 3), 0.6), image=(13, 37), padding=(1, 1), batch=2),
    ConvCase("strided", W12, image=(13, 38), stride=(2, 2), activation="relu", batch=2),
    ConvCase("1x1", Weight(36, 24, (1, 1), 0.5), image=(9, 17), activation="relu", batch=2),
    ConvCase("1x1, few entries", Weight(36, 24, (1, 1), 0.1), image=(8, 16), bias=False),
    ConvCase("upsampled", W12, image=(5, 9), upsample=(2, 2), padding=(2, 2)),
]
SCALED = [c for c in CONVS if c.work < 4e6]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHUFFLED, ids=names(SHUFFLED))
@pytest.mark.parametrize("back_end", ON_CPU, ids=str)
def test_pixels_are_shuffled_and_halved_exactly(back_end, case, dtype):
    p = case.build(dtype)
    y = op_of(back_end, "sparse_conv2d")(*p.args(), case.activation)
    for shuffle in (1, 2, 3, 6):
        fused = op_of(back_end, "sparse_conv2d_fused")(*p.args(), case.activation, 0.5, shuffle)
        assert fused.is_contiguous()
        assert_bitwise_equal(fused, F.pixel_shuffle(y * 0.5, shuffle), f"shuffle {shuffle}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", SCALED, ids=names(SCALED))
@pytest.mark.parametrize("back_end", ON_CPU, ids=str)
def test_the_factor_comes_before_the_residual(back_end, case, dtype):
    p = case.build(dtype)
    args, residual = list(p.args()), p.grad
    args[6] = None
    y = op_of(back_end, "sparse_conv2d")(*args, case.activation)
    args[6] = residual
    fused = op_of(back_end, "sparse_conv2d_fused")(*args, case.activation, -0.3, 1)
    assert_bitwise_equal(fused, y * -0.3 + residual, "the result")


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_gives_the_same(threads):
    case = ConvCase("threads", Weight(64, 32, (3, 3), 0.05), image=(64, 64), padding=(1, 1))
    for dtype in DTYPES:
        p = case.build(dtype)
        one = torch.ops.issp.sparse_conv2d_fused(*p.args(), "relu", 0.7, 2)
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(threads)
            several = torch.ops.issp.sparse_conv2d_fused(*p.args(), "relu", 0.7, 2)
        finally:
            torch.set_num_threads(before)
        assert_bitwise_equal(several, one, f"{threads} threads")


def test_torch_knows_the_op():
    p = SHUFFLED[2].build()
    opcheck(torch.ops.issp.sparse_conv2d_fused.default, (*p.args(), "relu", 0.5, 3))


def test_operations_are_counted_once():
    from torch.utils.flop_counter import FlopCounterMode

    p = SHUFFLED[2].build()
    with FlopCounterMode(display=False) as plain:
        torch.ops.issp.sparse_conv2d(*p.args(), "none")
    with FlopCounterMode(display=False) as fused:
        torch.ops.issp.sparse_conv2d_fused(*p.args(), "none", 1.0, 3)
    assert plain.get_total_flops() == fused.get_total_flops() > 0


@pytest.mark.parametrize(
    ("shuffle", "has_residual", "words"),
    [
        (0, False, "shuffle is 0: its square must divide the 36 channels"),
        (4, False, "shuffle is 4: its square must divide the 36 channels"),
        (2, True, "a residual cannot be added before a PixelShuffle"),
    ],
)
def test_what_cannot_be_shuffled_is_refused(shuffle, has_residual, words):
    p = SHUFFLED[2].build()
    args = list(p.args())
    args[6] = p.grad if has_residual else None
    with pytest.raises((RuntimeError, ValueError)):
        torch.ops.issp.sparse_conv2d_fused(*args, "none", 1.0, shuffle)
    with pytest.raises(ValueError, match=words):
        validation.check_sparse_conv2d_fused(*args, "none", 1.0, shuffle)


def test_other_devices_get_the_convolution_and_the_rest():
    p = ops.sparse_pack(torch.ones(12, 4, 3, 3)).to("meta")
    x, seen = torch.empty(2, 4, 8, 8, device="meta"), []

    class Calls(TorchDispatchMode):
        def __torch_dispatch__(self, call, types, args=(), kwargs=None):
            seen.append(str(call))
            return call(*args, **(kwargs or {}))

    with torch.no_grad(), Calls():
        y = sparse.conv2d(
            x, p, None, None, "relu", stride=1, padding=1, dilation=1, scale=0.5, shuffle=2
        )
    assert y.shape == (2, 3, 16, 16)
    assert "issp.sparse_conv2d.default" in seen and "aten.pixel_shuffle.default" in seen
    assert "issp.sparse_conv2d_fused.default" not in seen and "aten.relu.default" not in seen


@pytest.mark.parametrize("wants_gradient", [False, True])
def test_layers_compose_it_where_a_gradient_is_wanted(wants_gradient):
    torch.manual_seed(0)
    w, x = torch.randn(12, 4, 3, 3) * (torch.rand(12, 4, 3, 3) < 0.3), torch.randn(2, 4, 8, 8)
    p = ops.sparse_pack(w)
    x.requires_grad_(wants_gradient)
    geometry = {"stride": 1, "padding": 1, "dilation": 1}
    y = sparse.conv2d(x, p, None, None, "relu", **geometry, scale=0.5, shuffle=2)
    expected = F.pixel_shuffle(F.relu(F.conv2d(x, w, padding=1)) * 0.5, 2)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if wants_gradient:
        (gradient,) = torch.autograd.grad(y.sum(), x)
        (dense,) = torch.autograd.grad(expected.sum(), x)
        torch.testing.assert_close(gradient, dense, rtol=1e-5, atol=1e-5)
