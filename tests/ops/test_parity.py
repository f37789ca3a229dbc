"""Every op x back end x case: bitwise equal to the reference. No tolerance anywhere."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch

import issp
from issp.ops import ShrinkState, reference
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST, BackEnd
from tests.cases import DTYPES, LARGE, NAMED, Case, random_shapes, training_start, training_updates
from tests.tiers import FULL, quick_or_full, some

pytestmark = pytest.mark.sampled(slow_only=True, most=4)
REFERENCE = issp.backends.implementations("reference")
STATE = ("thresholds", "packed", "flips")
RANDOM = random_shapes(100, 20_000)
RANDOM_SMALL = random_shapes(100, 400, per_call=20)


def step(table, weights, state, shrink, found_inf=None, bracket=True):
    table["soft_shrink_"](
        *(weights, state.k, shrink, state.thresholds, state.packed, state.flips, state.scratch),
        *(found_inf, bracket),
    )


def assert_same(back_end, weights, state, expected, expected_state, when):
    for i, (x, y) in enumerate(zip(weights, expected, strict=True)):
        assert_bitwise_equal(x.cpu(), y, f"{back_end}, weights[{i}] {when}")
    for name in STATE:
        actual = getattr(state, name).cpu()
        assert_bitwise_equal(actual, getattr(expected_state, name), f"{back_end}, {name} {when}")


def copies(tensors):
    return [x.clone() for x in tensors]


@cache
def reference_steps(case: Case, dtype, steps):
    """Per step of the reference: the weights before it, and weights and state after it."""
    weights, history = case.build(dtype), []
    state = ShrinkState(weights, case.k)
    source = torch.Generator().manual_seed(7)
    for _ in range(steps):
        before = copies(weights)
        step(REFERENCE, weights, state, case.shrink)
        results = {name: getattr(state, name).clone() for name in STATE}
        history.append((before, copies(weights), SimpleNamespace(**results)))
        for x in weights:
            x += (torch.randn(x.shape, generator=source) * 1e-3).to(dtype)
    return history


def check_steps(back_end: BackEnd, case: Case, dtype, bracket=True, steps=3):
    """Several steps with small updates between them, so that cold and warm searches both run."""
    weights = case.build(dtype, back_end.device)
    state = ShrinkState(weights, case.k)
    for number, (before, *expected) in enumerate(reference_steps(case, dtype, steps)):
        for x, y in zip(weights, before, strict=True):
            x.copy_(y)
        step(back_end, weights, state, case.shrink, bracket=bracket)
        when = f"after step {number} of {case.name} in {dtype}"
        assert_same(back_end, weights, state, *expected, when)


def names(values):
    return [getattr(v, "name", str(v)).replace("torch.", "") for v in values]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", NAMED, ids=names(NAMED))
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_soft_shrink(back_end, case, dtype):
    check_steps(back_end, case, dtype, steps=2 if back_end.slow else 3)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", RANDOM + LARGE, ids=names(RANDOM + LARGE))
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_soft_shrink_random_and_large(back_end, case, count, threads):
    threads(count)
    for dtype in (torch.float32, torch.bfloat16):
        check_steps(back_end, case, dtype, steps=2)


@pytest.mark.parametrize("case", RANDOM_SMALL, ids=names(RANDOM_SMALL))
@pytest.mark.parametrize("back_end", [b for b in BACK_ENDS if b.slow], ids=str)
def test_soft_shrink_random_shapes_where_slow(back_end, case):
    check_steps(back_end, case, torch.float32, steps=2)


@pytest.mark.parametrize("bracket", [True, False], ids=["bracket", "no-bracket"])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_a_thousand_drifting_steps(back_end, bracket):
    """Drifting weights, jumps in learning rate, changed k: the same bits at every step."""
    expected = training_start()
    weights = [w.to(back_end.device, copy=True) for w in expected]
    k = [0] * len(weights)
    expected_state, state = ShrinkState(expected, k), ShrinkState(weights, k)
    steps = quick_or_full(20, 1000) if back_end.slow else 1000
    for number, (updates, k, shrink) in enumerate(training_updates(steps)):
        expected_state.set_k(k)
        state.set_k(k)
        for x, y, update in zip(expected, weights, updates, strict=True):
            x += update
            y += update.to(y.device)
        step(REFERENCE, expected, expected_state, shrink)
        step(back_end, weights, state, shrink, bracket=bracket)
        assert_same(back_end, weights, state, expected, expected_state, f"after step {number}")
    assert all(torch.isfinite(w).all() for w in expected)


@pytest.mark.parametrize("flush", [False, True], ids=["gradual", "flush-to-zero"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_bits_do_not_depend_on_the_floating_point_mode(back_end, dtype, flush):
    case = Case("magnitudes", ((3000,),), (2990,), "magnitudes")
    expected, weights = case.build(dtype), case.build(dtype, back_end.device)
    expected_state, state = ShrinkState(expected, case.k), ShrinkState(weights, case.k)
    step(REFERENCE, expected, expected_state, case.shrink)
    assert torch.set_flush_denormal(flush)
    try:
        step(back_end, weights, state, case.shrink)
    finally:
        torch.set_flush_denormal(False)
    assert_same(back_end, weights, state, expected, expected_state, f"with flush {flush}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_reference_does_not_depend_on_the_floating_point_mode(dtype):
    case = Case("magnitudes", ((3000,),), (2990,), "magnitudes")
    (w,) = case.build(dtype)
    expected = reference.shrunk(w, 0.95)
    assert torch.set_flush_denormal(True)
    try:
        actual = reference.shrunk(w, 0.95)
    finally:
        torch.set_flush_denormal(False)
    assert_bitwise_equal(actual, expected, "shrunk under flush-to-zero")


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_weights_that_only_shrink_end_as_zeros(back_end):
    """5 000 steps without a gradient: exact zeros, never denormals."""
    (w,) = Case("only shrinking", ((100,),), (90,)).build(torch.float32, back_end.device)
    w[:5] = 0
    state = ShrinkState([w], [90])
    tiny = torch.finfo(torch.float32).tiny
    table = back_end.load()
    steps = 5000
    if back_end.interpreted or (back_end.slow and not FULL):
        # It starts near the end: the smallest normal numbers are what matters.
        steps = quick_or_full(60, 200)
        w[w.abs().argsort()[:90]] *= 1e-36
    for _ in range(steps):
        step(table, [w], state, 0.95)
        magnitudes = w.abs()
        assert ((magnitudes == 0) | (magnitudes >= tiny)).all()
    assert (w == 0).sum() == 90
    assert state.flips.item() == 0


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_found_inf_leaves_everything_unmodified(back_end):
    case = Case("found_inf", ((40, 40), (7,)), (1500, 3))
    weights = case.build(torch.float32, back_end.device)
    state = ShrinkState(weights, case.k)
    step(back_end, weights, state, 0.95)
    before = [x.clone() for x in (*weights, state.thresholds, state.packed, state.flips)]
    found_inf = torch.ones(1, device=back_end.device)
    step(back_end, weights, state, 0.95, found_inf)
    after = [*weights, state.thresholds, state.packed, state.flips]
    for x, y in zip(after, before, strict=True):
        assert_bitwise_equal(x, y, f"{back_end} under found_inf")
    step(back_end, weights, state, 0.95, torch.zeros(1, device=back_end.device))
    assert not torch.equal(weights[0], before[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_magnitude_threshold(back_end, dtype):
    for case in some(NAMED + (RANDOM_SMALL if back_end.slow else RANDOM)[:4], back_end):
        expected = reference.magnitude_threshold(case.build(dtype), list(case.k))
        weights = case.build(dtype, back_end.device)
        actual = back_end["magnitude_threshold"](weights, list(case.k))
        assert_bitwise_equal(actual.cpu(), expected, f"{back_end}, thresholds of {case.name}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_apply_masks(back_end, dtype):
    for case in some(NAMED, back_end) if back_end.slow else NAMED + LARGE[:1]:
        expected, tensors = case.build(dtype), case.build(dtype, back_end.device)
        state = ShrinkState(expected, case.k)
        state.set_masks([torch.rand(s) < 0.3 for s in case.shapes])
        reference.apply_masks_(expected, state.packed)
        back_end["apply_masks_"](tensors, state.packed.to(back_end.device))
        for x, y in zip(tensors, expected, strict=True):
            assert_bitwise_equal(x.cpu(), y, f"{back_end}, masked {case.name}")


NM = [
    *[((8, 2 * m, 3, 3), n, m, 1, "channels") for n, m in ((2, 4), (1, 10), (1, 16), (2, 32))],
    *[((8, 40), 1, 20, v, "channels") for v in (1, 2, 4, 8)],
    *[((6, 30), n, m, 1, "flat") for n, m in ((1, 20), (1, 90), (3, 3), (1, 1))],
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fill", ["normal", "few", "special"])
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_nm_prune(back_end, fill, dtype):
    for shape, n, m, v, layout in some(NM, back_end):
        (w,) = Case("nm", (shape,), (0,), fill).build(dtype)
        for shrink in (0.0, 0.95):
            what = f"{back_end}, keep {n} of {m}, v = {v}, {layout}"
            expected, mask = reference.nm_prune(w, n, m, v, layout, shrink)
            pruned, packed = back_end["nm_prune"](w.to(back_end.device), n, m, v, layout, shrink)
            assert_bitwise_equal(pruned.cpu(), expected, what)
            assert_bitwise_equal(packed.cpu(), mask, f"mask of {what}")


@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_two_runs_and_two_thread_counts_give_the_same_bits(back_end, threads):
    results = []
    for count in (1, 2, 2):
        threads(count)
        weights = LARGE[0].build(torch.float32, back_end.device)
        state = ShrinkState(weights, LARGE[0].k)
        for _ in range(3):
            step(back_end, weights, state, 0.95)
        results.append([*weights, state.thresholds, state.packed, state.flips])
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_bitwise_equal(x, y, f"{back_end}, another run")
