"""The passes beside the step: masks of several sets, ISS-R's regularisation, statistics, zeros."""

from __future__ import annotations

import math

import pytest
import torch

import issp
from issp import reference, report
from issp.ops import ShrinkState
from tests import cuda_emulator
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES, LARGE, ODD, Case, random_masks, sibling
from tests.under_test import BACK_ENDS, FAST, back_ends

BEST = torch.ops.issp._cpu_capability() if issp.backends.active("cpu") == "cpp" else ""
CASES = (
    ODD,
    Case("special", ((600,), (70,), (9, 9)), (0, 0, 0), "special"),
    Case("magnitudes", ((900,), (70,), (9, 9)), (0, 0, 0), "magnitudes"),
)
# The interpreter computes with numpy, which warns of what the tests provoke.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")
needs_emulator = pytest.mark.skipif(
    cuda_emulator.compiler() is None, reason="no C++ compiler (g++) to build the emulator"
)


@pytest.fixture(autouse=True)
def _restore_capability():
    yield
    if BEST:
        torch.ops.issp._cpu_capability(BEST)


def names(cases):
    return [case.name for case in cases]


def packed(case: Case, device: str = "cpu") -> torch.Tensor:
    weights = case.build(torch.float32)
    state = ShrinkState(weights, [0] * len(weights))
    state.set_masks(random_masks(case))
    return state.packed.to(device)


def assert_all_equal(actual, expected, what):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(x.cpu(), y, f"{what}, tensors[{i}]")


# apply_masks_


def sets_of(case: Case, dtypes, device="cpu"):
    """Weights, moments, averages, ...: one list behind the other, each in its dtype."""
    return [x for dtype in dtypes for x in sibling(case).build(dtype, device)]


SETS = {
    "one": (torch.float32,),
    "weights and moments": (torch.float32,) * 3,
    "an average in 16 bits": (torch.float32, torch.bfloat16, torch.float32),
    "every dtype": DTYPES,
    "eleven": (torch.float32,) * 11,  # more than one launch of the CUDA kernel takes
}


@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_masks_of_several_sets(back_end, kind):
    dtypes = SETS[kind]
    for case in CASES if len(dtypes) < 5 else CASES[1:2]:
        tensors = sets_of(case, dtypes, back_end.device)
        expected = sets_of(case, dtypes)
        for x, mask in zip(expected, random_masks(case) * len(dtypes), strict=True):
            x.copy_(torch.where(mask, x, torch.zeros((), dtype=x.dtype)))
        back_end["apply_masks_"](tensors, packed(case, back_end.device), len(dtypes))
        assert_all_equal(tensors, expected, f"{back_end}, {kind}, {case.name}")


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_masks_of_sets_whose_dtypes_differ_from_weight_to_weight(back_end):
    case, sets = ODD, 3
    kinds = [DTYPES[(3 * i + 1) % 4] for i in range(len(case.shapes) * sets)]
    values = [x.to(kind) for x, kind in zip(sets_of(case, DTYPES[:1] * sets), kinds, strict=True)]
    expected, tensors = [x.clone() for x in values], [x.to(back_end.device) for x in values]
    reference.apply_masks_(expected, packed(case), sets)
    back_end["apply_masks_"](tensors, packed(case, back_end.device), sets)
    assert_all_equal(tensors, expected, str(back_end))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_masks_of_large_tensors(back_end, count, threads):
    threads(count)
    dtypes = (torch.float32, torch.float16)
    expected, tensors = sets_of(LARGE[0], dtypes), sets_of(LARGE[0], dtypes, back_end.device)
    reference.apply_masks_(expected, packed(LARGE[0]), 2)
    back_end["apply_masks_"](tensors, packed(LARGE[0], back_end.device), 2)
    assert_all_equal(tensors, expected, str(back_end))


def test_one_public_call_masks_weights_moments_and_average():
    weights = ODD.build(torch.float32)
    state = ShrinkState(weights, [w.numel() // 2 for w in weights])
    issp.ops.soft_shrink_(weights, state)
    moments, average = [torch.ones_like(w) for w in weights], [w.half() for w in weights]
    issp.ops.apply_masks_([*weights, *moments, *average], state)
    for tensors in (weights, moments, average):
        for x, mask in zip(tensors, state.masks(), strict=True):
            assert torch.equal(x != 0, mask)
    alone = [torch.ones_like(w) for w in weights]
    issp.ops.apply_masks_(alone, state)
    assert_all_equal(alone, moments, "one set alone")


# regularize_


def regularization(case, dtype, device="cpu"):
    factors = torch.linspace(-1.5, 3, len(case.shapes), dtype=torch.float64)
    factors = factors if dtype == torch.float64 else factors.float()
    grads = sibling(case).build(dtype, device)
    return grads, case.build(dtype, device), factors.to(device), packed(case, device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=names(CASES))
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_regularize(back_end, case, dtype):
    expected, weights, *rest = regularization(case, dtype)
    reference.regularize_(expected, weights, *rest)
    grads, weights, *rest = regularization(case, dtype, back_end.device)
    back_end["regularize_"](grads, weights, *rest)
    assert_all_equal(grads, expected, f"{back_end}, {case.name}")
    assert_all_equal(weights, case.build(dtype), f"{back_end}, weights of {case.name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_adds_where_the_mask_drops_and_nowhere_else(dtype):
    """Against arithmetic of torch's own, which rounds product and sum once each."""
    grads, weights, factors, masks = regularization(ODD, dtype)
    before = [g.clone() for g in grads]
    reference.regularize_(grads, weights, factors, masks)
    kept = random_masks(ODD)
    for g, w, factor, old, mask in zip(grads, weights, factors, before, kept, strict=True):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        total = (old.to(wide) + factor * w.to(wide)).to(dtype)
        assert_bitwise_equal(g, torch.where(mask, old, total), f"{dtype}, {tuple(w.shape)}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_regularize_rounds_at_the_ends_of_the_range(back_end, dtype):
    """Sums that overflow, that just do not, that fall into the denormals, infinity less itself."""
    limits = torch.finfo(dtype)
    ends = [limits.max, limits.max / 2, limits.tiny, limits.tiny / 4, limits.max * 2**-12, 1.0]
    ends += [math.inf, math.nan, 0.0, limits.max * (1 - limits.eps)]
    values = torch.tensor([s * x for x in ends for s in (1, -1)], dtype=torch.float64).to(dtype)
    g, w = (x.flatten().contiguous() for x in torch.meshgrid(values, values, indexing="ij"))
    masks = torch.zeros(16, dtype=torch.int32)
    for factor in (1.0, 0.5, 2.0**-12, 1 + 2.0**-20):
        factors = torch.tensor([factor], dtype=torch.float64 if dtype == g.double().dtype else None)
        expected, actual = g.clone(), g.to(back_end.device, copy=True)
        reference.regularize_([expected], [w], factors, masks)
        on_device = [x.to(back_end.device) for x in (w, factors, masks)]
        back_end["regularize_"]([actual], [on_device[0]], *on_device[1:])
        assert_bitwise_equal(actual.cpu(), expected, f"{back_end}, factor {factor}")


@pytest.mark.parametrize("flush", [False, True], ids=["gradual", "flush-to-zero"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_bits_do_not_depend_on_the_floating_point_mode(back_end, dtype, flush):
    case = Case("tiny", ((3000,), (40, 40)), (0, 0), "magnitudes")
    expected, weights, *rest = regularization(case, dtype)
    reference.regularize_(expected, weights, *rest)
    zeros = reference.count_zeros(expected)
    grads, weights, *rest = regularization(case, dtype, back_end.device)
    again, *arguments = regularization(case, dtype)
    assert torch.set_flush_denormal(flush)
    try:
        back_end["regularize_"](grads, weights, *rest)
        found = back_end["count_zeros"](grads)
        statistics = back_end["magnitude_statistics"](grads)
        reference.regularize_(again, *arguments)
        own = [reference.count_zeros(expected), reference.magnitude_statistics(expected)]
    finally:
        torch.set_flush_denormal(False)
    assert_all_equal(grads, expected, f"{back_end}, flush {flush}")
    assert_all_equal(again, expected, f"the reference, flush {flush}")
    assert_bitwise_equal(found.cpu(), zeros, f"{back_end}, zeros, flush {flush}")
    assert_bitwise_equal(own[0], zeros, f"zeros of the reference, flush {flush}")
    assert_close(statistics, reference.magnitude_statistics(expected), f"{back_end}, {flush}")
    assert_close(own[1], reference.magnitude_statistics(expected), f"the reference, {flush}")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_regularize_large_tensors(back_end, count, threads):
    threads(count)
    for dtype in (torch.float32, torch.bfloat16):
        expected, weights, *rest = regularization(LARGE[0], dtype)
        reference.regularize_(expected, weights, *rest)
        grads, weights, *rest = regularization(LARGE[0], dtype, back_end.device)
        back_end["regularize_"](grads, weights, *rest)
        assert_all_equal(grads, expected, f"{back_end}, {dtype}")


# magnitude_statistics


def assert_close(actual, expected, what):
    """1e-12 of each value; NaN and infinity exactly."""
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=1e-12, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


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
        tensors, found = case.build(dtype), reference.magnitude_statistics(case.build(dtype))
    else:
        tensors = case.build(dtype, back_end.device)
        found = back_end["magnitude_statistics"](tensors)
    assert_close(found, of_torch(tensors), f"{back_end}, {case.name}")
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
        found = back_end["magnitude_statistics"]([x.to(back_end.device)])
        expected = [math.sqrt(math.fsum(v * v for v in magnitudes)), variance, mean]
        expected = torch.tensor([[*expected, math.sqrt(variance)]], dtype=torch.float64)
        assert_close(found, expected, f"{back_end}, {dtype}")
        for value in (0.1, -1e30, 1 / 3):
            constant = torch.full((count - 7,), value, dtype=dtype, device=back_end.device)
            norm, variance, mean, deviation = back_end["magnitude_statistics"]([constant])[0]
            assert 0 <= variance <= 1e-28 * mean**2, f"{back_end}, constant {value}"
            assert math.isclose(mean, abs(constant[0].item()), rel_tol=1e-14)
            assert deviation == variance.sqrt()
        outlier = torch.full((count,), 1e-3, dtype=dtype)
        outlier[0] = 1e6  # where the kernels look for a first guess of the mean
        found = back_end["magnitude_statistics"]([outlier.to(back_end.device)])
        assert_close(found, of_torch([outlier]), f"{back_end}, an outlier")


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
            found = back_end["magnitude_statistics"]([x, torch.zeros_like(x), x[:1]]).cpu()
            expected = torch.tensor([expected], dtype=torch.float64)
            assert_close(found[:1], expected, f"{back_end}, {value} at {place}")
            assert found[1].tolist() == [0] * 4
            assert found[2, 1:].isnan().tolist() == [True, x[0].isnan().item(), True]


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_statistics_have_the_same_bits_in_every_run(back_end, threads):
    case = ODD if back_end.slow else LARGE[0]
    found = []
    for count in (1, 2, 2):
        threads(count)
        found.append(back_end["magnitude_statistics"](case.build(torch.float32, back_end.device)))
    for other in found[1:]:
        assert_bitwise_equal(other.cpu(), found[0].cpu(), f"{back_end}, another run")


def test_statistics_have_the_same_bits_on_every_instruction_set():
    tables = [b for b in back_ends() if b.name.startswith("cpp")]
    if not tables:
        pytest.skip("the C++ back end is not built")
    for dtype in DTYPES:
        tensors = ODD.build(dtype)
        rows = [table["magnitude_statistics"](tensors) for table in tables]
        for table, row in zip(tables, rows, strict=True):
            assert_bitwise_equal(row, rows[0], f"{table} in {dtype}")


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
            found = reference.count_zeros(case.build(dtype))
        else:
            found = back_end["count_zeros"](case.build(dtype, back_end.device))
        assert found.dtype == torch.int64
        assert found.tolist() == expected, f"{back_end}, {case.name}, {case.fill}"


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
        found = back_end["count_zeros"](case.build(torch.bfloat16, back_end.device))
        assert found.tolist() == expected


# Bad input


def good(device="cpu"):
    weights = [torch.arange(1.0, 101.0, device=device), torch.ones(6, 10, device=device)]
    grads = [torch.full_like(w, 2.0) for w in weights]
    masks = torch.zeros(32, dtype=torch.int32, device=device)
    return {"grads": grads, "weights": weights, "factors": torch.ones(2), "masks": masks}


def lists_of(change):
    """Bad lists that every op refuses."""
    return {
        f"{change}: an empty list": (lambda t: t.clear(), ValueError, "empty list|entries for"),
        f"{change}: integers": (
            lambda t: t.__setitem__(0, torch.arange(100)), TypeError, "dtype|float32",
        ),
        f"{change}: no tensor": (lambda t: t.__setitem__(0, "x"), TypeError, "must be a tensor"),
        f"{change}: not contiguous": (
            lambda t: t.__setitem__(1, torch.ones(10, 6).T), ValueError, "contiguous",
        ),
        f"{change}: empty tensor": (
            lambda t: t.__setitem__(0, torch.empty(0)), ValueError, "empty|elements",
        ),
        f"{change}: another device": (
            lambda t: t.__setitem__(0, torch.empty(100, device="meta")), ValueError, "is on",
        ),
    }  # fmt: skip


BAD_REGULARIZE = {
    **lists_of("grads"),
    **lists_of("weights"),
    "grads: one too few": (lambda t: t.pop(), ValueError, "1 entries for 2"),
    "grads: another size": (
        lambda t: t.__setitem__(0, torch.ones(99)), ValueError, "has 99 elements",
    ),
    "grads: another dtype": (
        lambda t: t.__setitem__(0, torch.ones(100).half()), TypeError, "float16",
    ),
    "factors: another dtype": (torch.ones(2).double(), TypeError, "factors has dtype"),
    "factors: a list": ([1.0, 1.0], TypeError, "factors must be a tensor"),
    "factors: one too few": (torch.ones(1), ValueError, "2 elements, one per weight"),
    "masks: too short": (torch.zeros(16, dtype=torch.int32), ValueError, "32 elements"),
    "masks: another dtype": (torch.zeros(32), TypeError, "int32"),
}  # fmt: skip


def watched(arguments):
    both = [x for x in (*arguments["grads"], *arguments["weights"]) if isinstance(x, torch.Tensor)]
    found = [x for x in both if x.device.type == "cpu"]
    return found, [x.clone() for x in found]


@pytest.mark.parametrize("name", BAD_REGULARIZE)
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_regularize_refuses(back_end, name):
    change, kind, words = BAD_REGULARIZE[name]
    arguments, which = good(), name.partition(":")[0]
    if callable(change):
        change(arguments[which])
    else:
        arguments[which] = change
    tensors, before = watched(arguments)
    state = ShrinkState([torch.ones(100), torch.ones(60)], [0, 0])
    state.packed = arguments.pop("masks")
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        back_end["regularize_"](*arguments.values(), state.packed)
    with pytest.raises(kind, match=f"{words}|those of the state") as caught:
        issp.ops.regularize_(*arguments.values(), state)
    assert "\n" not in str(caught.value).strip()
    assert_all_equal(tensors, before, name)


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_what_is_written_may_overlap_nothing(back_end):
    memory = torch.arange(1.0, 201.0)
    masks, factors = torch.zeros(32, dtype=torch.int32), torch.ones(2)
    parts = [memory[:100], memory[100:160]]
    for grads, weights in (
        (parts, [memory[90:190], torch.ones(60)]),
        ([memory[:100], memory[50:110]], [torch.ones(100), torch.ones(60)]),
    ):
        with pytest.raises((RuntimeError, ValueError), match="overlap in memory"):
            back_end["regularize_"](grads, weights, factors, masks)
    with pytest.raises((RuntimeError, ValueError), match="overlap in memory"):
        back_end["apply_masks_"]([*parts, memory[95:195], torch.ones(60)], masks, 2)
    assert memory.tolist() == list(range(1, 201))


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_what_is_only_read_may_be_listed_twice(back_end):
    x = torch.tensor([0.0, 1.0, 2.0, 0.0, 2.0])
    assert back_end["count_zeros"]([x, x, x[:2]]).tolist() == [2, 2, 1]
    assert back_end["magnitude_statistics"]([x, x])[:, 2].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("op", ["magnitude_statistics", "count_zeros"])
@pytest.mark.parametrize("name", lists_of("tensors"))
def test_readers_refuse(op, name):
    change, kind, words = lists_of("tensors")[name]
    tensors = good()["weights"]
    change(tensors)
    for back_end in BACK_ENDS:
        if back_end.device == "cpu":
            with pytest.raises((RuntimeError, TypeError, ValueError)):
                back_end[op](tensors)
    with pytest.raises(kind, match=words) as caught:
        getattr(issp.ops, op)(tensors)
    assert "\n" not in str(caught.value).strip()


def test_statistics_refuse_mixed_dtypes():
    with pytest.raises(TypeError, match="group by dtype"):
        issp.ops.magnitude_statistics([torch.ones(3), torch.ones(3).half()])


@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.device == "cpu"], ids=str)
def test_masks_refuse_sets_that_do_not_fit(back_end):
    weights = good()["weights"]
    masks = torch.zeros(32, dtype=torch.int32)
    three = [*weights, torch.ones(100)]
    swapped = [*weights, torch.ones(60), torch.ones(100)]
    for tensors, sets in ((three, 2), (weights, 0), (weights, -1), (swapped, 2), (weights, 2)):
        with pytest.raises((RuntimeError, ValueError), match="set|mask"):
            back_end["apply_masks_"](tensors, masks, sets)
    state = ShrinkState(weights, [50, 30])
    for tensors in (three, swapped, [], weights[:1]):
        with pytest.raises(ValueError, match="sizes of the state's weights"):
            issp.ops.apply_masks_(tensors, state)
    assert_all_equal(weights, good()["weights"], "weights")


# The CUDA kernels under many schedules


def emulated_masks(seed):
    dtypes = (torch.float32, torch.bfloat16)
    expected, tensors = sets_of(SMALL, dtypes), sets_of(SMALL, dtypes)
    reference.apply_masks_(expected, packed(SMALL), 2)
    cuda_emulator.apply_masks_(tensors, packed(SMALL), 2)
    assert_all_equal(tensors, expected, f"masks, seed {seed}")


def emulated_regularize(seed):
    expected, *rest = regularization(SMALL, torch.float32)
    reference.regularize_(expected, *rest)
    grads, *rest = regularization(SMALL, torch.float32)
    cuda_emulator.regularize_(grads, *rest)
    assert_all_equal(grads, expected, f"gradients, seed {seed}")


def emulated_statistics(seed):
    tensors = SMALL.build(torch.float32)
    found = cuda_emulator.magnitude_statistics(tensors)
    if seed == 0:
        emulated_statistics.first = found
        assert_close(found, reference.magnitude_statistics(tensors), "statistics")
    assert_bitwise_equal(found, emulated_statistics.first, f"statistics, seed {seed}")


def emulated_zeros(seed):
    tensors = sibling(SMALL, fill="few").build(torch.float32)
    found = cuda_emulator.count_zeros(tensors)
    assert_bitwise_equal(found, reference.count_zeros(tensors), f"zeros, seed {seed}")


# Tensors of several tiles in the small shapes, and more of them than a table holds.
SMALL = Case(
    "small", ((1500,), (7,), (513,), (64,), (3,), (200,), (5,), (31,), (33,), (2,), (1,)), (0,) * 11
)
EMULATED = (emulated_masks, emulated_regularize, emulated_statistics, emulated_zeros)


@needs_emulator
@pytest.mark.parametrize("case", EMULATED, ids=lambda f: f.__name__)
def test_a_hundred_schedules(case):
    for seed in range(100):
        cuda_emulator.seed(seed, small=True)
        case(seed)


@needs_emulator
def test_the_large_shapes_and_tensors_at_any_element():
    cuda_emulator.seed(3)
    for case in EMULATED:
        case(0)
    memory = torch.randn(3001)
    for offset in (1, 3):
        x = memory[offset:]
        found = cuda_emulator.magnitude_statistics([x])
        assert_close(found, reference.magnitude_statistics([x]), f"offset {offset}")
        grads, weights = [torch.ones(3001 - offset)], [x]
        expected = [grads[0].clone()]
        masks = torch.full((-(-x.numel() // 512) * 16,), 0x12345678, dtype=torch.int32)
        reference.regularize_(expected, weights, torch.ones(1), masks)
        cuda_emulator.regularize_(grads, weights, torch.ones(1), masks)
        assert_all_equal(grads, expected, f"offset {offset}")


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
    assert report.zeros(tensors) == expected
    assert torch.set_flush_denormal(True)
    try:
        assert report.zeros(tensors) == expected
    finally:
        torch.set_flush_denormal(False)
    assert report.zeros([]) == []


# Barriers


@needs_emulator
def test_every_barrier_of_the_merge_is_needed():
    """Leaves out one after the other; some schedule must notice each."""
    library = cuda_emulator.library(small=True)
    cuda_emulator.seed(0, small=True)
    emulated_statistics(0)
    names = [library.emulator_site_name(i).decode() for i in range(library.emulator_sites())]
    own = [i for i, name in enumerate(names) if "magnitude_statistics" in name]
    assert own, names
    for barrier in own:
        noticed = False
        for seed in range(12):
            cuda_emulator.seed(seed, removed=barrier, small=True)
            try:
                emulated_statistics(seed or 1)
            except (RuntimeError, AssertionError):
                noticed = True
                break
        assert noticed, names[barrier]
