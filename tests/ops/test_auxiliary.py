"""The auxiliary ops: masks of several sets, the regularisation of ISS-R, CUDA schedules."""

from __future__ import annotations

import math

import pytest
import torch

import issp
from issp.ops import ShrinkState, reference
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST
from tests.cases import DTYPES, LARGE, ODD, Case, random_masks, sibling
from tests.kernels import cuda_emulator

CASES = (
    ODD,
    Case("special", ((600,), (70,), (9, 9)), (0, 0, 0), "special"),
    Case("magnitudes", ((900,), (70,), (9, 9)), (0, 0, 0), "magnitudes"),
)
# The interpreter computes with numpy, which warns of what the tests provoke.
QUIET = pytest.mark.filterwarnings("ignore:(invalid|overflow|divide):RuntimeWarning")
pytestmark = [QUIET, pytest.mark.sampled(slow_only=True, most=4)]


def assert_close(actual, expected, what):
    """1e-12 of each value; NaN and infinity exactly."""
    torch.testing.assert_close(
        actual.cpu(), expected, rtol=1e-12, atol=0, equal_nan=True, msg=lambda m: f"{what}: {m}"
    )


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
        actual = back_end["count_zeros"](grads)
        statistics = back_end["magnitude_statistics"](grads)
        reference.regularize_(again, *arguments)
        own = [reference.count_zeros(expected), reference.magnitude_statistics(expected)]
    finally:
        torch.set_flush_denormal(False)
    assert_all_equal(grads, expected, f"{back_end}, flush {flush}")
    assert_all_equal(again, expected, f"the reference, flush {flush}")
    assert_bitwise_equal(actual.cpu(), zeros, f"{back_end}, zeros, flush {flush}")
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
    actual = cuda_emulator.magnitude_statistics(tensors)
    if seed == 0:
        emulated_statistics.first = actual
        assert_close(actual, reference.magnitude_statistics(tensors), "statistics")
    assert_bitwise_equal(actual, emulated_statistics.first, f"statistics, seed {seed}")


def emulated_zeros(seed):
    tensors = sibling(SMALL, fill="few").build(torch.float32)
    actual = cuda_emulator.count_zeros(tensors)
    assert_bitwise_equal(actual, reference.count_zeros(tensors), f"zeros, seed {seed}")


# Tensors of several tiles in the small shapes, and more of them than a table holds.
SMALL = Case(
    "small", ((1500,), (7,), (513,), (64,), (3,), (200,), (5,), (31,), (33,), (2,), (1,)), (0,) * 11
)
EMULATED = (emulated_masks, emulated_regularize, emulated_statistics, emulated_zeros)


@cuda_emulator.needs_compiler
@pytest.mark.parametrize("case", EMULATED, ids=lambda f: f.__name__)
def test_a_hundred_schedules(case):
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, small=True)
        case(seed)


@cuda_emulator.needs_compiler
def test_the_large_shapes_and_tensors_at_any_element():
    cuda_emulator.seed(3)
    for case in EMULATED:
        case(0)
    memory = torch.randn(3001)
    for offset in (1, 3):
        x = memory[offset:]
        actual = cuda_emulator.magnitude_statistics([x])
        assert_close(actual, reference.magnitude_statistics([x]), f"offset {offset}")
        grads, weights = [torch.ones(3001 - offset)], [x]
        expected = [grads[0].clone()]
        masks = torch.full((-(-x.numel() // 512) * 16,), 0x12345678, dtype=torch.int32)
        reference.regularize_(expected, weights, torch.ones(1), masks)
        cuda_emulator.regularize_(grads, weights, torch.ones(1), masks)
        assert_all_equal(grads, expected, f"offset {offset}")


# Barriers


@cuda_emulator.needs_compiler
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
