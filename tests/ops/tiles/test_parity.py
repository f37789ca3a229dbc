"""The tiled ops, every kernel of this CPU x case: bits of the reference, and torch's results."""

from __future__ import annotations

import itertools
import random
from functools import cache

import pytest
import torch
import torch.nn.functional as F

import issp
from issp.ops import (
    TiledImage,
    TiledWeight,
    from_tiles,
    tiled_conv2d,
    tiled_conv2d_by_taps,
    to_tiles,
)
from tests.asserts import assert_bitwise_equal
from tests.ops.tiles.cases import CASES, NAMES, TileCase
from tests.tiers import quick_or_full

REFERENCE = issp.backends.implementations("reference")
KERNELS = ["scalar", "avx512", "amx"]
pytestmark = pytest.mark.skipif(
    issp.backends.active("cpu") != "cpp", reason="issp/_C was not built: the reference runs alone"
)


@pytest.fixture(params=KERNELS)
def kernels(request):
    """Each of the CPU's kernels in turn."""
    best = torch.ops.issp._tile_capability()
    if KERNELS.index(request.param) > KERNELS.index(best):
        pytest.skip(f"this CPU has no {request.param}")
    torch.ops.issp._tile_capability(request.param)
    yield request.param
    torch.ops.issp._tile_capability(best)


def conv(case: TileCase, p, out=None) -> TiledImage:
    return tiled_conv2d(
        *(p.t, p.w, p.bias, p.residual, case.activation, case.scale, case.shuffle), out=out
    )


def assert_same_numbers(actual, expected, what):
    """Bit for bit, where a NaN is any NaN."""
    nan = torch.isnan(expected)
    assert_bitwise_equal(torch.isnan(actual), nan, f"{what}: NaN")
    zeros = torch.zeros_like(actual)
    assert_bitwise_equal(torch.where(nan, zeros, actual), torch.where(nan, zeros, expected), what)


def assert_within_a_rounding(actual, expected, what):
    """Neighbours in bfloat16 at most, few of them different, but for the tail of gelu near 0."""
    difference = (actual.double() - expected.double()).abs()
    assert bool((difference <= expected.double().abs() * 2**-7 + 2e-6).all()), what
    assert (difference > 2e-6).float().mean() < 0.01, what


@cache
def reference(case: TileCase) -> torch.Tensor:
    """The result's data by the reference, once for all kernels."""
    return REFERENCE["tiled_conv2d"](*case.build().args(case))


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_bits_of_the_reference(kernels, case):
    expected, actual = reference(case), conv(case, case.build()).data
    if case.activation == "gelu":
        assert_within_a_rounding(actual, expected, case.name)
    else:
        assert_bitwise_equal(actual, expected, case.name)


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_result_of_torch(case):
    p = case.build()
    rounded = [x.bfloat16().double() for x in (p.image, p.weight)]
    bias = None if p.bias is None else p.bias.double()
    y = F.conv2d(*rounded, bias, padding=case.kernel // 2)
    y = {"none": y, "relu": F.relu(y), "gelu": F.gelu(y)}[case.activation] * case.scale
    if p.residual is not None:
        y = y + from_tiles(p.residual).double()
    y = F.pixel_shuffle(y, case.shuffle)
    actual = from_tiles(conv(case, p))
    assert actual.shape == y.shape and conv(case, p).shape == y.shape
    # Half a step of bfloat16, and float32 sums of a few hundred products.
    allowed = y.abs() * 2**-8 + 1e-4 * max(1.0, float(y.abs().max()))
    assert bool(((actual - y).abs() <= allowed).all())


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_the_same_bits_for_any_number_of_threads(kernels, case, threads):
    p = case.build()
    threads(1)
    expected = conv(case, p).data
    for count in (2, 3, 4):
        threads(count)
        assert_bitwise_equal(conv(case, p).data, expected, f"{case.name} by {count} threads")


def test_enough_work_for_several_threads(kernels, threads):
    """The small cases may run on one thread; this one does not."""
    case = TileCase("work", 64, 32, size=(20, 40), keep=0.3, residual=True, batch=2)
    p, results = case.build(), []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(conv(case, p).data)
        again = to_tiles(p.image).data
        assert_bitwise_equal(again, p.t.data, f"to_tiles by {count} threads")
        plain = from_tiles(p.t)
        assert_bitwise_equal(plain, p.image.bfloat16().float(), f"from_tiles by {count} threads")
    for count, result in enumerate(results, 1):
        assert_bitwise_equal(result, results[0], f"{count} threads")


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_into_an_image_that_exists(kernels, case):
    p = case.build()
    expected = conv(case, p)
    out = to_tiles(torch.full(expected.shape, torch.inf))
    assert conv(case, p, out=out) is out
    assert_bitwise_equal(out.data, expected.data, case.name)
    if p.residual is not None:
        in_place = p.residual
        assert conv(case, p, out=in_place) is in_place
        assert_bitwise_equal(in_place.data, expected.data, f"{case.name} into its residual")


def random_case(seed: int) -> TileCase:
    source = random.Random(seed)
    shuffle = source.choice((1, 1, 1, 2, 2, 3, 4))
    v = source.choice((16, 32))
    return TileCase(
        f"random {seed}",
        rows=source.randint(1, 5) * shuffle**2 if shuffle > 1 else source.randint(1, 40),
        channels=source.randint(1, 20),
        kernel=source.choice((1, 3)),
        size=(source.randint(1, 4), source.randint(1, 50)),
        batch=source.randint(1, 3),
        v=v,
        unit=(source.choice((v, 16, 4)), source.choice((1, 2))),
        keep=source.choice((0.05, 0.3, 1.0)),
        bias=source.random() < 0.7,
        residual=shuffle == 1 and source.random() < 0.5,
        activation=source.choice(("none", "relu")),
        scale=source.choice((1.0, 0.1, -2.0)),
        shuffle=shuffle,
    )


@pytest.mark.parametrize("seed", range(quick_or_full(12, 100)))
def test_random_cases(kernels, seed):
    case = random_case(seed)
    assert_bitwise_equal(conv(case, case.build()).data, reference(case), str(case))


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "columns first": lambda x: x.mT.contiguous().mT,
    "slice": lambda x: F.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2],
    "expanded": lambda x: x[:, :, :1, :1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(2, 5, 3, 37), (1, 32, 2, 16), (1, 70, 1, 40), (3, 1, 1, 1)])
def test_conversion(kernels, shape, dtype, layout):
    x = LAYOUTS[layout](torch.randn(shape).to(dtype))
    t = to_tiles(x)
    assert t.shape == shape
    assert_bitwise_equal(t.data, REFERENCE["to_tiles"](x), f"{layout} to tiles")
    assert_bitwise_equal(from_tiles(t, dtype), x.bfloat16().to(dtype).contiguous(), "from tiles")


def test_tokens(kernels):
    tokens = torch.randn(2, 50, 24)
    t = to_tiles(tokens.mT[:, :, None])
    assert t.shape == (2, 24, 1, 50)
    assert_bitwise_equal(from_tiles(t)[:, :, 0].mT, tokens.bfloat16().float(), "tokens")


def special_numbers() -> torch.Tensor:
    """Zeros, denormals, the smallest and largest numbers, infinities, NaN and some between."""
    bits = [0, 1, 0x7F, 0x80, 0x81, 0x100, 0x3F80, 0x3F81, 0x4000, 0x1F80, 0x2000, 0x7F7F, 0x7F80]
    numbers = torch.tensor([*bits, 0x7FC0, 0x7F81], dtype=torch.int32)
    return torch.cat([numbers, numbers - 0x8000]).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_conversion_of_special_numbers(kernels, dtype):
    x = special_numbers().to(dtype).repeat(5)[:112].view(1, 2, 2, 28)
    assert_same_numbers(to_tiles(x).data, REFERENCE["to_tiles"](x), "to tiles")
    expected = REFERENCE["from_tiles"](to_tiles(x).data, 2, 28, dtype)
    assert_same_numbers(from_tiles(to_tiles(x), dtype), expected, "from tiles")


def test_float32_is_rounded_to_even(kernels):
    bits = torch.tensor([0x3F800000, 0x3F808000, 0x3F808001, 0x3F818000, 0x7F7FFFFF, 0x007FFFFF])
    x = torch.cat([bits, bits - 2**31]).to(torch.int32).view(torch.float32).view(1, 1, 1, 12)
    expected = [0x3F80, 0x3F80, 0x3F81, 0x3F82, 0x7F80, 0]
    actual = from_tiles(to_tiles(x), torch.bfloat16).view(torch.int16).flatten().tolist()
    assert actual == [*expected, *(e - 2**15 for e in expected)]


@pytest.mark.parametrize("kernel", [1, 3])
def test_sums_of_special_numbers(kernels, kernel):
    """Products and sums that are denormal, overflow, cancel or are not finite."""
    x = special_numbers().repeat(4)[:104].view(1, 4, 1, 26)
    small = special_numbers()[[0, 3, 4, 5, 6, 8, 9, 10, 15, 18, 21, 24]]
    products = itertools.islice(itertools.cycle(small.tolist()), 16 * 4 * kernel**2)
    weight = torch.tensor(list(products)).view(16, 4, 1, 1, -1).view(16, 4, kernel, kernel)
    bias = small.float().repeat(2)[:16] * 2.0**-3
    t, w = to_tiles(x), TiledWeight.from_weight(weight)
    for scale in (1.0, 2.0**-20, 1e-40):
        args = (t.data, w.values, w.positions, w.tile_starts, bias, t_residual(16, 26).data)
        geometry = [4, 26, 16, kernel, 1]
        expected = REFERENCE["tiled_conv2d"](*args, geometry, "relu", scale)
        actual = tiled_conv2d(t, w, bias, t_residual(16, 26), "relu", scale).data
        assert_same_numbers(actual, expected, f"scale {scale}")
        assert torch.isfinite(expected).any()


def reference_by_taps(t: TiledImage, w: TiledWeight, bias, kernel: int = 3) -> torch.Tensor:
    geometry = [t.channels, t.width, w.shape[0] // kernel**2, kernel]
    plan = (w.values, w.positions, w.tile_starts)
    return REFERENCE["tiled_conv2d_by_taps"](t.data, *plan, bias, geometry)


# Rows, channels, kernel, size, batch, v, share of units that are kept.
BY_TAPS = [
    (3, 20, 3, (3, 33), 1, 32, 1.0),
    (3, 33, 3, (5, 16), 2, 32, 0.5),
    (1, 7, 3, (4, 50), 3, 16, 1.0),
    (2, 5, 3, (1, 1), 1, 32, 1.0),
    (3, 4, 3, (1, 65), 2, 16, 1.0),
    (3, 4, 3, (9, 1), 1, 32, 0.3),
    (5, 6, 3, (2, 17), 1, 32, 1.0),
    (3, 4, 3, (6, 7), 1, 16, 0.0),
    (20, 6, 1, (3, 18), 2, 16, 1.0),
]


def by_taps(case):
    """Image, weight, tiled weight and bias."""
    rows, channels, kernel, size, batch, v, keep = case
    source = torch.Generator().manual_seed(rows + channels)
    image = torch.randn(batch, channels, *size, generator=source)
    weight = torch.randn(rows, channels, kernel, kernel, generator=source)
    weight *= torch.rand(channels, generator=source)[:, None, None] < keep
    return image, weight, TiledWeight.from_taps(weight, v), torch.randn(rows, generator=source)


@pytest.mark.parametrize("case", BY_TAPS, ids=str)
def test_by_taps(kernels, case, threads):
    image, weight, w, bias = by_taps(case)
    t, kernel = to_tiles(image), case[2]
    expected = reference_by_taps(t, w, bias, kernel)
    exact = F.conv2d(
        image.bfloat16().double(), weight.bfloat16().double(), bias.double(), padding=kernel // 2
    )
    torch.testing.assert_close(expected.double(), exact, rtol=1e-5, atol=1e-5)
    for count in (1, 2, 3, 4):
        threads(count)
        actual = tiled_conv2d_by_taps(t, w, bias, kernel)
        assert actual.is_contiguous()
        assert_bitwise_equal(actual, expected, f"by {count} threads")
    without = reference_by_taps(t, w, None, kernel)
    assert_bitwise_equal(tiled_conv2d_by_taps(t, w, None, kernel), without, "without a bias")


def test_by_taps_in_several_threads(kernels, threads):
    """Each computes the sums of rows above and below its own; with work for each."""
    image, _, w, bias = by_taps((3, 40, 3, (30, 100), 2, 32, 1.0))
    results = []
    for count in (1, 2, 3, 4):
        threads(count)
        results.append(tiled_conv2d_by_taps(to_tiles(image), w, bias))
    for count, result in enumerate(results, 1):
        assert_bitwise_equal(result, results[0], f"{count} threads")


@pytest.mark.parametrize("v", [16, 32])
def test_special_numbers_by_taps(kernels, v):
    """Of any size, and such that shares and sums of taps are denormal."""
    numbers = special_numbers()
    small = numbers[numbers.abs() <= 4]
    for source, scale in ((numbers, 1.0), (small, 1.0), (small, 2.0**-120)):
        x = source.repeat(20)[:312].view(1, 4, 3, 26)
        weight = small.repeat(10)[:108].view(3, 4, 3, 3).float() * scale
        bias = torch.tensor([1e-40, -0.0, 2.0**-126]) * scale
        t, w = to_tiles(x), TiledWeight.from_taps(weight, v)
        expected = reference_by_taps(t, w, bias)
        assert_same_numbers(tiled_conv2d_by_taps(t, w, bias), expected, f"scale {scale}")
        assert bool(torch.isfinite(expected).all()) == (source is small)
    assert (expected == 0).any() and expected.any()


def test_what_is_not_finite_stays_within_its_taps(kernels):
    image, _, w, bias = by_taps((3, 20, 3, (4, 21), 1, 32, 1.0))
    clean = tiled_conv2d_by_taps(to_tiles(image), w, bias)
    image[0, 2, 1, 3] = torch.inf
    y = tiled_conv2d_by_taps(to_tiles(image), w, bias)
    spared = torch.ones(4, 21, dtype=torch.bool)
    spared[0:3, 2:5] = False
    assert_bitwise_equal(y[..., spared], clean[..., spared], "pixels beside Inf")
    assert not torch.isfinite(y[..., ~spared]).any()


def test_denormal_biases_are_zeros(kernels):
    """The smallest normal number and a denormal one would be another number."""
    weight = torch.full((1, 1, 1, 1), 2.0**-126)
    t, w = to_tiles(torch.ones(1, 1, 1, 1)), TiledWeight.from_weight(weight)
    y = tiled_conv2d(t, w, torch.tensor([0.75 * 2.0**-126]))
    assert from_tiles(y).item() == 2.0**-126
    assert tiled_conv2d_by_taps(t, w, torch.tensor([2.0**-127]), kernel=1).item() == 2.0**-126


def t_residual(channels: int, width: int) -> TiledImage:
    numbers = special_numbers()
    finite = numbers[torch.isfinite(numbers)]
    return to_tiles(
        finite.repeat(1 + channels * width // len(finite))[: channels * width].view(
            1, channels, 1, width
        )
    )


@pytest.mark.parametrize("v", [16, 32])
def test_values_that_are_not_finite_stay_where_they_are(kernels, v):
    """Padded entries, rows and channels multiply zeros with zeros, never with Inf or NaN."""
    case = TileCase("poison", 35, 5, size=(4, 21), v=v, unit=(v, 2), keep=0.4)
    p = case.build()
    clean = conv(case, p)
    for poison in (torch.inf, torch.nan):
        image = p.image.clone()
        image[0, 2, 1, 3] = poison
        t = to_tiles(image)
        y = tiled_conv2d(t, p.w, p.bias)
        spared = torch.ones(case.size, dtype=torch.bool)
        spared[0:3, 2:5] = False
        assert_bitwise_equal(
            from_tiles(y)[..., spared], from_tiles(clean)[..., spared], f"pixels beside {poison}"
        )
        assert not y.data[:, 1:-1, -1, :, 1].any(), "the channel behind the last is zero"
        assert_bitwise_equal(frame(y), torch.zeros_like(frame(y)), "zeros around the image")


def frame(t: TiledImage) -> torch.Tensor:
    """What lies around the pixels of a tiled image."""
    inner = t.data.clone()
    inner[:, 1:-1, 1:, : t.width] = 0
    return inner


def test_nothing_is_read_around_the_memory(kernels):
    """An image in the middle of NaN gives the same bits as one that lies alone."""
    case = TileCase("in a larger tensor", 16, 3, size=(2, 19), keep=1.0)
    p = case.build()
    expected = conv(case, p).data
    count = p.t.data.numel()
    around = torch.full((count + 256,), torch.nan, dtype=torch.bfloat16)
    around[128 : 128 + count] = p.t.data.flatten()
    inside = around[128 : 128 + count].view(p.t.data.shape)
    actual = tiled_conv2d(p.t._replace(data=inside), p.w, p.bias).data
    assert_bitwise_equal(actual, expected, "in the middle of NaN")
    last = TiledWeight.from_taps(torch.randn(3, 3, 3, 3))
    shared, alone = (tiled_conv2d_by_taps(t, last) for t in (p.t._replace(data=inside), p.t))
    assert_bitwise_equal(shared, alone, "by taps in the middle of NaN")


def test_an_empty_batch(kernels):
    t = to_tiles(torch.randn(0, 4, 3, 5))
    w = TiledWeight.from_weight(torch.randn(16, 4, 3, 3))
    assert from_tiles(tiled_conv2d(t, w)).shape == (0, 16, 3, 5)
    last = TiledWeight.from_taps(torch.randn(3, 4, 3, 3))
    assert tiled_conv2d_by_taps(t, last).shape == (0, 3, 3, 5)


def test_the_mode_of_the_caller_does_not_matter_and_stays(kernels, threads):
    threads(1)
    case = CASES[3]
    p = case.build()
    expected, tiny = conv(case, p).data, torch.tensor([1e-40])
    assert torch.set_flush_denormal(True)
    try:
        assert_bitwise_equal(conv(case, p).data, expected, "with flushed denormals")
        assert (tiny * 1).item() == 0
    finally:
        torch.set_flush_denormal(False)
    conv(case, p)
    assert (tiny * 1).item() != 0
