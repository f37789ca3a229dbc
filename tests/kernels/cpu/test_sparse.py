"""Every path of the CPU's sparse ops: tiles, runs of channels, straight from x, edges, threads."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from tests.asserts import assert_bitwise_equal, bits
from tests.backends import FAST
from tests.ops.sparse import test_parity as parity
from tests.ops.sparse.cases import ConvCase, MatmulCase, Weight

CPP = [back_end for back_end in FAST if back_end.name.startswith("cpp")]
pytestmark = pytest.mark.skipif(not CPP, reason="the CPU library is not built here")


@pytest.fixture(params=CPP, ids=str)
def back_end(request):
    before = torch.ops.issp._cpu_capability()
    yield request.param
    torch.set_flush_denormal(False)
    torch.ops.issp._cpu_capability(before)


def conv(name: str, weight: Weight, image=(9, 17), padding=(1, 1), **more) -> ConvCase:
    return ConvCase(name, weight, image=image, padding=padding, **more)


# Over 8 loads a channel (6 for 1x1) keep to tiles; 6 entries in each L1 cache of channels: runs.
DENSER = Weight(48, 320, (3, 3), 0.15)
TILES = [
    *(conv(f"runs, v={v}", replace(DENSER, v=v)) for v in (1, 2, 3)),
    conv("runs, uneven", Weight(24, 320, (3, 3), "uneven"), bias=False),
    conv("runs, stride 2", DENSER, (9, 37), stride=(2, 2)),
    conv("runs, finished", DENSER, (9, 11), residual=True, batch=2),
    conv("runs, 1x1", Weight(120, 512, (1, 1), 0.6), (9, 17), (0, 0)),
    conv("no runs, v=4", Weight(48, 320, (3, 3), 0.3, 4)),
    conv("no runs, few channels", Weight(64, 8, (3, 3), 0.5), (20, 50), batch=2),
    conv("no runs, 1x1", Weight(160, 12, (1, 1), 0.7), (20, 16), (0, 0)),
    conv("no runs, 1x1, few rows to a tile", Weight(48, 200, (1, 1), 0.5), (20, 21), (0, 0)),
    conv("no runs, last tile narrower", Weight(64, 60, (3, 3), 0.2), (37, 100)),
    conv("runs, upsampled", DENSER, (4, 9), upsample=(2, 2)),
]
MATMULS = [
    *(
        MatmulCase(f"tokens {v}", Weight(48, 512, pattern=0.3, v=v), lead=(2, 37))
        for v in (1, 2, 3, 4)
    ),
    MatmulCase("tokens, few rows to a tile", Weight(48, 200, pattern=0.5), lead=(2, 67)),
]


@pytest.mark.parametrize("case", [*TILES, *MATMULS], ids=lambda c: c.name)
def test_tiles(back_end, case):
    op, kind = ("sparse_conv2d", "conv") if case.tail() else ("sparse_matmul", "matmul")
    dense, gradient = (getattr(parity, f"dense_{kind}{of}") for of in ("", "_grad"))
    parity.check(back_end, case, parity.DTYPES, op, dense)
    if case != TILES[-1]:  # a gradient knows no upsampling
        parity.check_values_grad(back_end, case, parity.DTYPES, f"{op}_values_grad", gradient)


def few(i: int, image, kernel=(3, 3), padding=(1, 1), dilation=(1, 1), **more) -> ConvCase:
    """A few entries to a channel; the rows of a block and the epilogue change with i."""
    v = (1, 2, 3, 4, 5, 7)[i % 6]
    more |= {"activation": ("none", "none", "relu", "gelu")[i % 4]}
    more |= {"bias": i % 5 > 0, "residual": i % 3 == 0, "dilation": dilation}
    name = f"{kernel} padded {padding} dilated {dilation} on {image}, {i}"
    density = 0.04 if kernel[0] * kernel[1] > 9 else 0.09
    return conv(name, Weight(2 * v, 40, kernel, density, v), image, padding, **more)


WIDTHS = [few(w, (1 + 7 * w % 19, w), batch=1 + w % 2) for w in (*range(1, 71), 80, 112, 127, 128)]
# kernel, padding, dilation: beyond what the kernel reaches, below zero, dilated, of one axis.
_SEEN = (
    *(((3, 3), (5, 7)), ((3, 3), (9, 18)), ((3, 3), (2, 40)), ((5, 5), (3, 1)), ((1, 1), (2, 1))),
    *(((3, 3), (-1, -2)), ((3, 3), (-2, -17)), ((3, 3), (-3, 5)), ((2, 2), (1, 0))),
    *(((3, 3), (2, 3), (2, 3)), ((3, 3), (4, 20), (4, 20)), ((5, 3), (0, 0), (1, 2))),
    *(((1, 7), (0, 3)), ((7, 1), (3, 0)), ((7, 7), (3, 3))),
)
# Results as large as they come, then smaller and larger ones.
_SIZES = {(20, 48): None, (11, 64): None, (34, 37): None, (19, 60): (12, 41), (9, 40): (14, 64)}
SEEN = [
    few(i + j, image, *geometry, size=_SIZES[image])
    for i, geometry in enumerate(_SEEN)
    for j, image in enumerate(_SIZES)
]
_PIXELS = ((4, 4), (4, 12), (5, 7), (3, 11), (1, 1), (13, 16), (37, 3), (40, 40))
PIXELS = [few(i, image, (1, 1), (0, 0), batch=n) for i, image in enumerate(_PIXELS) for n in (1, 3)]
# Planes 16 KB apart fall into eight sets of the cache: 80 channels go back to tiles.
POWERS = [
    conv(f"{channels} planes of {image}", Weight(4, channels, (3, 3), 0.2), image)
    for channels, image in ((80, (64, 64)), (80, (63, 65)), (20, (64, 64)), (12, (128, 128)))
]


@pytest.mark.parametrize("cases", [WIDTHS, SEEN, PIXELS, POWERS], ids=lambda c: c[0].name)
def test_straight_from_x(back_end, cases):
    for case in cases:
        parity.check(back_end, case, (torch.float32,), "sparse_conv2d", parity.dense_conv)


STRAIGHT = [
    conv("straight, shared rows", Weight(12, 60, (3, 3), 0.07), (40, 52)),
    conv("straight, shared units", Weight(2, 60, (3, 3), 0.4), (40, 52), batch=2),
    conv("straight, one block", Weight(4, 60, (3, 3), 0.8, 4), (33, 29)),
    conv("straight, 1x1", Weight(16, 60, (1, 1), 0.3, 2), (40, 52), (0, 0)),
]
THREADED = [
    *(*TILES[:-1], *MATMULS[:2], *STRAIGHT),
    # One or two units where one thread works, more where several do: runs must not follow.
    conv("runs of few pixels", Weight(96, 256, (3, 3), 0.1), (8, 16)),
    # What a unit of one thread sees does not fit the cache, half of it does.
    conv("many channels", Weight(40, 1024, (3, 3), 0.02), (16, 16)),
]


@pytest.mark.parametrize("case", THREADED, ids=lambda c: c.name)
def test_the_same_bits_for_any_number_of_threads_in_either_mode(back_end, case, threads):
    for call in parity.calls_of(back_end, case, torch.float32):
        threads(1)
        expected = call()
        for flush, count in ((False, 2), (False, 3), (False, 5), (True, 1), (True, 2)):
            torch.set_flush_denormal(flush)
            threads(count)
            assert_bitwise_equal(call(), expected, f"{count} threads, flushing {flush}")


@pytest.mark.parametrize("case", [TILES[1], *STRAIGHT], ids=lambda c: c.name)
def test_denormals_are_flushed_as_the_caller_asks(back_end, case, threads):
    """Every product is some 1e-42: none of the factors is."""
    p = case.build()
    x, values, grad = p.x * 1e-22, p.values * 1e-20, p.grad * 1e-20
    op = "sparse_conv2d"
    forward, backward = (parity.op_of(back_end, op + of) for of in ("", "_values_grad"))
    for call in (
        lambda: forward(x, values, p.columns, p.starts, p.transposed, None, None, *p.tail),
        lambda: backward(x, grad, p.columns, p.starts, case.weight.v, *case.grad_tail()),
    ):
        kept = call()
        assert int(bits(kept.abs()).count_nonzero()) > 0.9 * kept.numel()
        for count in (1, 2, 3):
            threads(count)
            assert_bitwise_equal(call(), kept, f"{case.name} by {count} threads")
            torch.set_flush_denormal(True)
            flushed = call()
            torch.set_flush_denormal(False)
            assert not bits(flushed.abs()).any(), f"{case.name} by {count} threads"


STRANGE = [
    conv("tiles, stride 2", Weight(6, 8, (3, 3), 1.0), (20, 40), stride=(2, 2)),
    conv("straight", Weight(2, 8, (3, 3), 1.0), (20, 52)),
    conv("straight, v=4", Weight(8, 8, (3, 3), 1.0, 4), (20, 30)),
    conv("pixels", Weight(4, 8, (1, 1), 1.0), (4, 12), (0, 0)),
    conv("runs", Weight(48, 320, (3, 3), 1.0)),
]
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("in_x", [True, False], ids=["x", "values"])
@pytest.mark.parametrize("case", STRANGE, ids=lambda c: c.name)
def test_nan_and_infinity_spread_as_in_the_dense_product(back_end, case, in_x):
    """All positions are kept: infinity times the padding's zero is NaN in both."""
    p = case.build()
    for i, number in enumerate((NAN, INF, -INF)):
        if in_x:
            p.x[0, i, i, -1 - 2 * i] = number
        else:  # of the first rows alone
            at = case.weight.length - 1 - i
            p.values[at, 0] = p.weight.view(case.weight.rows, -1)[0, at] = number
    dense = parity.dense_conv(p, case, torch.float64)
    y = parity.op_of(back_end, "sparse_conv2d")(*p.args()).double()
    kinds = [t.isnan() + 2 * (t == INF) + 4 * (t == -INF) for t in (y, dense)]
    assert_bitwise_equal(*kinds, f"NaN and infinity in {case.name}")
    assert y.isfinite().any() and not y.isfinite().all()


_GEOMETRIES = (
    *({"padding": (1, 1)}, {"padding": (0, 0)}, {"stride": (2, 3)}, {"padding": (-2, -3)}),
    *({"dilation": (2, 5), "padding": (2, 5)}, {"dilation": (1, 2), "padding": (4, 6)}),
)
HIDDEN = [
    conv(f"{label}, {geometry}", Weight(rows, 6, (3, 3), 0.5, v), (19, 37), **geometry)
    for label, rows, v in (("straight", 3, 1), ("straight, v=4", 8, 4), ("tiles", 64, 1))
    for geometry in _GEOMETRIES
]


@pytest.mark.parametrize("case", HIDDEN, ids=lambda c: c.name)
def test_an_output_depends_on_what_its_taps_see_alone(back_end, case):
    """One image for each of some outputs, NaN but for the pixels that this output sees."""
    p, call, (oh, ow) = case.build(), parity.op_of(back_end, "sparse_conv2d"), case.outputs()
    rows = torch.tensor([0, 1, oh // 2, oh - 1])
    columns = torch.tensor([0, 1, min(15, ow - 1), min(16, ow - 1), ow - 2, ow - 1])
    at = (torch.arange(24), slice(None), *torch.cartesian_prod(rows, columns).T)
    blank = torch.zeros(24, 1, *case.image, requires_grad=True)
    unpadded = parity.padded_input(replace(p, x=blank), case, torch.float32)
    sums = parity.dense_linear_conv(unpadded, torch.ones(1, 1, *case.weight.kernel), case)
    seen = torch.autograd.grad(sums[at].sum(), blank)[0] > 0
    y = call(torch.where(seen, p.x, NAN), *p.args()[1:])
    assert_bitwise_equal(y[at], call(*p.args()).expand_as(y)[at], case.name)


@pytest.mark.parametrize("case", HIDDEN, ids=lambda c: c.name)
def test_a_gradient_depends_on_what_its_tap_sees_alone(back_end, case):
    """NaN in one pixel reaches the taps that meet it, as in the dense gradient, and no other."""
    p, call = case.build(), parity.op_of(back_end, "sparse_conv2d_values_grad")
    arguments = (p.grad, p.columns, p.starts, case.weight.v, *case.grad_tail())
    clean = call(p.x, *arguments)
    for at in ((0, 0), (3, 17), (18, 36), (18, 5), (4, 36)):
        x = p.x.clone()
        x[(0, slice(None), *at)] = NAN
        meets = parity.dense_conv_grad(replace(p, x=x), case, torch.float64).isnan()
        assert_bitwise_equal(call(x, *arguments), torch.where(meets, NAN, clean), f"NaN at {at}")


MEMORY = """
import os, sys, torch, issp
from tests.ops.sparse.cases import ConvCase, Weight
torch.set_num_threads(1)  # a process with threads must not fork
def resident(what):
    return 1024 * int(open("/proc/self/status").read().split(what)[1].split()[0])
def arguments_of(n, side):
    case = ConvCase("large", Weight(n, n, (3, 3), 0.1), image=(side, side), padding=(1, 1))
    p = case.build()
    return p.args(), (p.x, p.grad, p.columns, p.starts, 1, *case.grad_tail())
ops = torch.ops.issp.sparse_conv2d, torch.ops.issp.sparse_conv2d_values_grad
for op, small, large in zip(ops, arguments_of(16, 96), arguments_of(256, 192)):
    for capability in sys.argv[1:]:
        if os.fork() and os.wait():
            continue
        torch.ops.issp._cpu_capability(capability)
        torch.set_num_threads(2)
        op(*small)  # starts the threads, loads the code
        before = resident("VmRSS:")
        result_bytes = op(*large).nbytes
        print(capability, op, resident("VmHWM:") - before - result_bytes, sep=",", flush=True)
        os._exit(0)
"""


@pytest.mark.full
def test_memory():
    """Beside the result, which is seen, at most the dense weights and 2 MB of tile a thread."""
    sets = [back_end.name.removeprefix("cpp-") for back_end in CPP]
    fresh = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}  # what was freed before is not reused
    command = [sys.executable, "-c", MEMORY, *sets]
    done = subprocess.run(command, capture_output=True, text=True, env=fresh)
    assert done.returncode == 0 and done.stdout.count("\n") == 2 * len(sets), done.stderr
    for *name, more in (line.split(",") for line in done.stdout.splitlines()):
        assert -(1 << 18) < int(more) < 4 * 256 * 256 * 9 + 2 * (2 << 20), f"{name}: {more} bytes"
