"""Statistics of magnitudes and counts of zeros, and where the package counts."""

from __future__ import annotations

import math
from decimal import Decimal, localcontext

import pytest
import torch

from issp.ops import reference
from issp.pruning import summary
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST, back_ends
from tests.cases import DTYPES, LARGE, ODD, sibling
from tests.ops.test_auxiliary import (
    CASES,
    QUIET,
    assert_all_equal,
    assert_close,
    names,
)

pytestmark = [QUIET, pytest.mark.sampled(slow_only=True, most=4)]


# magnitude_statistics


def of_torch(tensors):
    rows = []
    for x in tensors:
        a = x.cpu().double().abs().flatten()
        rows.append(torch.stack([torch.linalg.vector_norm(a), a.var(), a.mean(), a.std()]))
    return torch.stack(rows)


@pytest.mark.filterwarnings("ignore:(var|std)")  # of a single element
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
@pytest.mark.parametrize("back_end", [*BACK_ENDS, "reference"], ids=str)
def test_statistics(back_end, case, dtype):
    if back_end == "reference":
        tensors, actual = case.build(dtype), reference.magnitude_statistics(case.build(dtype))
    else:
        tensors = case.build(dtype, back_end.device)
        actual = back_end["magnitude_statistics"](tensors)
    assert_close(actual, of_torch(tensors), f"{back_end}, {case.name}")
    assert_all_equal(tensors, case.build(dtype), "what is only read")


@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_statistics_of_a_million(back_end):
    for dtype in DTYPES:
        tensors = LARGE[0].build(dtype, back_end.device)
        assert_close(back_end["magnitude_statistics"](tensors), of_torch(tensors), str(dtype))


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_statistics_far_from_zero(back_end):
    """Deviations a millionth of the mean, and none at all: nothing may cancel."""
    count = 20_000 if back_end.slow else 1_000_000
    for dtype in (torch.float32, torch.float64):
        source = torch.Generator().manual_seed(5)
        x = torch.randn(count, generator=source, dtype=torch.float64)
        x = (x * 1e-3 - 1e3).to(dtype)
        magnitudes = [abs(value) for value in x.tolist()]
        mean = math.fsum(magnitudes) / count
        variance = math.fsum((value - mean) ** 2 for value in magnitudes) / (count - 1)
        actual = back_end["magnitude_statistics"]([x.to(back_end.device)])
        expected = [math.sqrt(math.fsum(v * v for v in magnitudes)), variance, mean]
        expected = torch.tensor([[*expected, math.sqrt(variance)]], dtype=torch.float64)
        assert_close(actual, expected, f"{back_end}, {dtype}")
        for value in (0.1, -1e30, 1 / 3):
            constant = torch.full((count - 7,), value, dtype=dtype, device=back_end.device)
            norm, variance, mean, deviation = back_end["magnitude_statistics"]([constant])[0]
            assert 0 <= variance <= 1e-28 * mean**2, f"{back_end}, constant {value}"
            assert math.isclose(mean, abs(constant[0].item()), rel_tol=1e-14)
            assert deviation == variance.sqrt()
        outlier = torch.full((count,), 1e-3, dtype=dtype)
        outlier[0] = 1e6  # where the kernels look for a first guess of the mean
        actual = back_end["magnitude_statistics"]([outlier.to(back_end.device)])
        assert_close(actual, of_torch([outlier]), f"{back_end}, an outlier")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_statistics_of_nan_and_infinity(back_end, dtype):
    inf, nan = math.inf, math.nan
    for place in (0, 1300, -1):
        for value, expected in (
            (inf, [inf, nan, inf, nan]),
            (-inf, [inf, nan, inf, nan]),
            (nan, [nan] * 4),
        ):
            x = torch.ones(1700, dtype=dtype, device=back_end.device)
            x[place] = value
            actual = back_end["magnitude_statistics"]([x, torch.zeros_like(x), x[:1]]).cpu()
            expected = torch.tensor([expected], dtype=torch.float64)
            assert_close(actual[:1], expected, f"{back_end}, {value} at {place}")
            assert actual[1].tolist() == [0] * 4
            assert actual[2, 1:].isnan().tolist() == [True, x[0].isnan().item(), True]


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_statistics_have_the_same_bits_in_every_run(back_end, threads):
    case = ODD if back_end.slow else LARGE[0]
    actual = []
    for count in (1, 2, 2):
        threads(count)
        actual.append(back_end["magnitude_statistics"](case.build(torch.float32, back_end.device)))
    for other in actual[1:]:
        assert_bitwise_equal(other.cpu(), actual[0].cpu(), f"{back_end}, another run")


def test_statistics_have_the_same_bits_on_every_instruction_set():
    tables = [b for b in back_ends() if b.name.startswith("cpp")]
    if not tables:
        pytest.skip("the C++ back end is not built")
    for dtype in DTYPES:
        tensors = ODD.build(dtype)
        rows = [table["magnitude_statistics"](tensors) for table in tables]
        for table, row in zip(tables, rows, strict=True):
            assert_bitwise_equal(row, rows[0], f"{table} in {dtype}")


def exact(x):
    """The row of a tensor, with 60 digits between."""
    with localcontext() as context:
        context.prec = 60
        values = [Decimal(abs(value)) for value in x.double().flatten().tolist()]
        mean = sum(values) / len(values)
        squares = sum((value - mean) ** 2 for value in values)
        variance = squares / (len(values) - 1)
        norm = sum(value * value for value in values).sqrt()
        return [float(norm), float(variance), float(mean), float(variance.sqrt())]


def spread(*exponents):
    """Magnitudes from one power of two to another, evenly over the exponents."""
    source = torch.Generator().manual_seed(11)
    low, high = exponents
    x = torch.rand(5000, generator=source, dtype=torch.float64) * (high - low) + low
    return torch.exp2(x) * torch.where(x > (low + high) / 2, 1.0, -1.0)


SUMS_OF = {
    "denormals": lambda: spread(-1074, -1060),
    "denormals and the smallest normal numbers": lambda: spread(-1074, -1000),
    "squares that underflow": lambda: spread(-700, -600),
    "squares that overflow": lambda: spread(600, 700),
    "the largest": lambda: spread(1000, 1023.5),
    "tiles of other scales": lambda: torch.cat(
        [spread(-1074, -900), spread(-3, 3), spread(1, 900)]
    ),
    "a huge first element": lambda: torch.cat([torch.tensor([1e30]), spread(-30, -20)]),
    "zeros in one tile": lambda: torch.cat([torch.zeros(4096), spread(-1060, -1050)]),
    "a step apart": lambda: 1 + (torch.arange(4100.0, dtype=torch.float64) % 2) * 2.0**-50,
    "few": lambda: 1 + torch.arange(3, dtype=torch.float64) * 2.0**-40,
}


@pytest.mark.parametrize("name", SUMS_OF)
@pytest.mark.parametrize("back_end", [*BACK_ENDS, "reference"], ids=str)
def test_statistics_are_exact(back_end, name):
    """To 1e-12 of each value; a result that is denormal itself may be a rounding off."""
    x = SUMS_OF[name]()
    tensors = [x, x.flip(0).contiguous(), x.float(), x.clamp(-6e4, 6e4).half()]
    for x in tensors:
        if not x.isfinite().all() or not x.any():
            continue
        if back_end == "reference":
            actual = reference.magnitude_statistics([x])
        else:
            actual = back_end["magnitude_statistics"]([x.to(back_end.device)]).cpu()
        expected = torch.tensor([exact(x)], dtype=torch.float64)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=5e-324)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", [*BACK_ENDS, "reference"], ids=str)
def test_equal_values_have_no_variance(back_end, dtype):
    slow = back_end == "reference" or back_end.slow
    sizes = (2, 3, 63, 65, 4099, 8193) if slow else (*range(2, 70), 4097, 4099, 20_000)
    for value in (1 / 3, -0.1, 3e-5, 5e-324, 1e-310, 1.7e308, 1e200, 65504 / 3):
        constant = torch.tensor(value, dtype=torch.float64).to(dtype)
        if not constant.isfinite():
            continue
        tensors = [constant.repeat(size) for size in sizes]
        if back_end == "reference":
            actual = reference.magnitude_statistics(tensors)
        else:
            actual = back_end["magnitude_statistics"](
                [x.to(back_end.device) for x in tensors]
            ).cpu()
        assert actual[:, 1].tolist() == [0] * len(sizes), f"{back_end}, {dtype}, {value}"
        assert actual[:, 3].tolist() == [0] * len(sizes), f"{back_end}, {dtype}, {value}"
        mean = torch.full((len(sizes),), abs(constant.item()), dtype=torch.float64)
        torch.testing.assert_close(actual[:, 2], mean, rtol=1e-14, atol=5e-324)


# count_zeros


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", [*BACK_ENDS, "reference"], ids=str)
def test_zeros(back_end, dtype):
    """Of either sign; denormals, infinities and NaNs are none."""
    fills = ("special", "few", "zero", "normal")
    cases = [*(sibling(ODD, fill=fill) for fill in fills), *CASES[1:]]
    for case in cases:
        expected = [x.numel() - int(x.count_nonzero()) for x in case.build(dtype)]
        if back_end == "reference":
            actual = reference.count_zeros(case.build(dtype))
        else:
            actual = back_end["count_zeros"](case.build(dtype, back_end.device))
        assert actual.dtype == torch.int64
        assert actual.tolist() == expected, f"{back_end}, {case.name}, {case.fill}"


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_zeros_of_mixed_dtypes(back_end):
    case = sibling(ODD, fill="few")
    tensors = [x.to(DTYPES[i % 4]) for i, x in enumerate(case.build(torch.float32))]
    expected = [int((x == 0).sum()) for x in tensors]
    moved = [x.to(back_end.device) for x in tensors]
    assert back_end["count_zeros"](moved).tolist() == expected


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_zeros_of_large_tensors(back_end, count, threads):
    threads(count)
    for case in (LARGE[1], sibling(LARGE[0], fill="zero")):
        expected = [int((x == 0).sum()) for x in case.build(torch.bfloat16)]
        actual = back_end["count_zeros"](case.build(torch.bfloat16, back_end.device))
        assert actual.tolist() == expected


# Where the package counts


def test_the_summary_counts_zeros_of_any_memory_order():
    """channels_last, transposed, empty, strided and integer weights; +0 and -0, no denormals."""
    source = torch.Generator().manual_seed(3)
    weight = torch.randint(-1, 2, (8, 6, 3, 3), generator=source) * 1.0
    weight[0, 0] = torch.tensor([[-0.0, 1e-45, -1e-45], [0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    tensors = [
        weight,
        weight.to(memory_format=torch.channels_last),
        weight.permute(3, 0, 2, 1),
        weight[:, ::2],
        weight.half(),
        weight.to(torch.int32),
        torch.empty(0),
        torch.nn.Parameter(weight),
    ]
    expected = [int((x.detach() == 0).sum()) for x in tensors]
    assert summary.zeros(tensors) == expected
    assert torch.set_flush_denormal(True)
    try:
        assert summary.zeros(tensors) == expected
    finally:
        torch.set_flush_denormal(False)
    assert summary.zeros([]) == []
