"""Exact under every bracket: whatever the previous threshold says, the bits are the reference's."""

from __future__ import annotations

import os

import pytest
import torch

import issp
from issp.ops import ShrinkState, reference
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST
from tests.cases import DTYPES, Case

pytestmark = pytest.mark.sampled(slow_only=True, most=4)
NATIVE = [b for b in FAST if b.name.startswith("cpp")]


def check_step(back_end, weights, k, thresholds, shrink=0.95, threads=None):
    """One step with the given previous thresholds, against the reference, which ignores them."""
    expected = [w.clone() for w in weights]
    expected_state = ShrinkState(expected, k)
    actual = [w.to(back_end.device, copy=True) for w in weights]
    state = ShrinkState(actual, k)
    state.thresholds.copy_(torch.as_tensor(thresholds))
    for who, values, of in ((None, expected, expected_state), (back_end, actual, state)):
        table = issp.backends.implementations("reference") if who is None else who.load()
        table["soft_shrink_"](
            *(values, of.k, shrink, of.thresholds, of.packed, of.flips, of.scratch, None, True)
        )
    what = f"{back_end}, previous thresholds {thresholds}"
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert_bitwise_equal(x.cpu(), y, f"{what}, weights[{i}]")
    for name in ("thresholds", "packed", "flips"):
        assert_bitwise_equal(getattr(state, name).cpu(), getattr(expected_state, name), what)
    return int(state.scratch[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_previous_thresholds_that_are_far_off(back_end, dtype):
    weights = Case("far off", ((20, 9, 3, 3), (33,)), ()).build(dtype)
    k = [1500, 20]
    right = reference.magnitude_threshold(weights, k)
    largest = 1e3 if dtype == torch.float16 else 1e6
    near = () if back_end.slow else (0.5, 0.9, 1.05, 2.0)
    for factor in (1e-6, 1.0, largest, *near):
        check_step(back_end, weights, k, right * factor)
    for value in (0.0, float("inf"), float("nan"), torch.finfo(dtype).tiny):
        check_step(back_end, weights, k, torch.full((2,), value, dtype=dtype))


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_weights_that_jump_by_a_million(back_end):
    """Up and down in turn: every step's bracket misses, and the count of misses says so."""
    (w,) = Case("jumps", ((40, 300),), ()).build(torch.float32)
    (tau,) = reference.magnitude_threshold([w], [11_000])
    for jump in (1e6, 1e-6):
        assert check_step(back_end, [w * jump], [11_000], tau.view(1)) == 1


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_all_equal_weights(back_end):
    for count in (0, 1, 6000, 8999, 9000):
        for previous in (0.25, 0.25 / 0.95, 0.24, 3.0):
            w = torch.full((9000,), -0.25)
            check_step(back_end, [w], [count], torch.tensor([previous]))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("shrink", [0.61, 0.75, 0.9, 0.95, 0.99, 1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("back_end", NATIVE, ids=str)
def test_what_was_shrunk_in_vain_is_restored(back_end, dtype, shrink, count, threads):
    """Every number of the 16-bit types is shrunk, and restored since the bracket was too high."""
    threads(count)
    patterns = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    finite = patterns[patterns.isfinite()]
    previous = torch.full((1,), torch.finfo(dtype).max / 2, dtype=dtype)
    assert check_step(back_end, [finite], [9], previous, shrink) == 1
    assert check_step(back_end, [finite], [finite.numel() // 2], previous, shrink) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("back_end", NATIVE, ids=str)
def test_what_was_shrunk_in_vain_is_restored_around_powers_of_two(back_end, dtype):
    source = torch.Generator().manual_seed(3)
    exponent = torch.arange(-1000 if dtype == torch.float64 else -126, 120, dtype=torch.float64)
    around = 1 + torch.randint(-40, 40, (64, 1), generator=source) * torch.finfo(dtype).eps
    weights = (torch.exp2(exponent) * around).to(dtype).flatten()
    weights[::2] *= -1
    for shrink in (0.61, 0.8, 0.95, 0.999):
        previous = weights.abs().max().view(1) * 2
        assert check_step(back_end, [weights], [100], previous, shrink) == 1


@pytest.mark.parametrize("back_end", NATIVE, ids=str)
def test_groups_with_weights_that_vanish_wait_for_the_threshold(back_end):
    """Products that are flushed cannot be undone; beside them lie candidates, ties and NaN."""
    tiny = torch.finfo(torch.float32).tiny
    w = torch.cat([torch.full((500,), 0.5), torch.full((1500,), 0.4), torch.rand(2100) * 0.3])
    w[::67] = tiny * torch.linspace(0.9, 1.1, len(w[::67]))
    w[5::71] = tiny / 4
    w[9::101] = 0.0
    for k in (1, 60, 1000, 2100, 2900, 3700, 4100):
        for factor in (0.2, 0.9, 1.0, 1.04, 1e20):
            tau = reference.magnitude_threshold([w], [k]) * factor
            check_step(back_end, [w], [k], tau)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("back_end", NATIVE, ids=str)
def test_candidates_around_the_capacity(back_end, count, threads):
    """A single tensor's room for candidates, give or take one; more of them force a search."""
    threads(count)
    numel, previous = 65_536, 1.0
    state = ShrinkState([torch.ones(numel)], [0])
    ledger = numel // 64 * (8 + 8 + 4)
    capacity = (4 * state.scratch.numel() - 4 * 64 - 8 - ledger) // 4
    misses = []
    around = [capacity - d for d in (130 * count, 65, 64, 63, 1, 0, -1)]
    for inside in [*around, 2 * capacity]:
        w = torch.full((numel,), 1e-3)
        w[numel // 2 :] = 7.0
        # the candidates: distinct, and evenly spread over the threads' shares
        w[:: numel // inside][:inside] = torch.linspace(0.93, 0.97, inside)
        below = int((w < 0.9).sum())
        misses.append(check_step(back_end, [w], [below + inside // 2], torch.tensor([previous])))
    assert misses[0] == 0
    assert misses[-1] == 1


def _memory_free() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))


@pytest.mark.skipif(
    os.environ.get("ISSP_TEST_HUGE") != "1", reason="ISSP_TEST_HUGE=1 is not set (needs 8 GB)"
)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_more_than_two_to_the_31_elements(back_end):
    numel = 2**31 + 10
    if back_end.device == "cpu" and _memory_free() < 8 * 2**30:
        pytest.skip("less than 8 GB of memory is free")
    w = torch.empty(numel, dtype=torch.bfloat16, device=back_end.device)
    piece = torch.randn(2**20 + 3, dtype=torch.bfloat16).to(back_end.device)
    for start in range(0, numel, piece.numel()):
        w[start : start + piece.numel()] = piece[: numel - start]
    w[-10:] = 1e-3
    before = w[-(2**20) :].clone()
    k = numel // 10 * 9
    state = ShrinkState([w], [k])
    back_end["soft_shrink_"](
        *([w], state.k, 0.95, state.thresholds, state.packed, state.flips, state.scratch)
    )
    assert state.flips.item() == k
    tau = state.thresholds.item()
    chosen = ~reference.unpack(state.packed[-(2**15 + 64) :], 2**21)[: 2**20 + 64 * 32]
    assert chosen.any()
    expected = torch.where(before.abs() < tau, reference.shrunk(before, 0.95), before)
    ties = before.abs() == tau
    assert_bitwise_equal(w[-(2**20) :][~ties], expected[~ties], "the last 2^20 elements")


def nans(bits, dtype):
    """A tensor of one NaN."""
    return torch.tensor(bits, dtype=torch.int64).to(reference.INTEGER[dtype]).view(dtype)


# The first NaN, the quiet one, the last ones: 0x7fffffff is what NVIDIA GPUs write. Then signs set.
NANS = {
    torch.float32: (0x7F800001, 0x7FC00000, 0x7FF00000, 0x7FFFFFFE, 0x7FFFFFFF, -1),
    torch.float16: (0x7C01, 0x7E00, 0x7FFF, -1),
    torch.bfloat16: (0x7F81, 0x7FC0, 0x7FFF, -1),
    torch.float64: ((0x7FF << 52) + 1, 0x7FF8 << 48, (1 << 63) - 1, -1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_a_threshold_that_is_any_nan(back_end, dtype):
    """The threshold lies among NaNs, up to the one with the largest key there is."""
    normal = torch.linspace(-1, 1, 300).to(dtype)
    counts = (310, 350) if back_end.slow else (301, 310, 350, 399, 400)
    for bits in NANS[dtype]:
        weights = normal.repeat(2)[:400].clone()
        weights[::4] = nans(bits, dtype)
        for k in counts:
            check_step(back_end, [weights], [k], torch.full((1,), 0.5, dtype=dtype))
            check_step(back_end, [weights], [k], nans(bits, dtype).view(1), shrink=0.0)
            found = back_end["magnitude_threshold"]([weights.to(back_end.device)], [k])
            expected = reference.magnitude_threshold([weights], [k])
            assert_bitwise_equal(found.cpu(), expected, f"{back_end}, k = {k}")


@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_a_threshold_among_nans_of_all_kinds(back_end):
    """More candidates than the buffers of small tensors hold, shared by two threads."""
    weights = torch.randn(700_001)
    every = torch.tensor(NANS[torch.float32][:-1], dtype=torch.int64).to(torch.int32)
    weights[::2] = every.view(torch.float32).repeat(70_001)[:350_001]
    for k in (350_000, 350_001, 600_000, 700_000):
        check_step(back_end, [weights], [k], torch.full((1,), 0.5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_a_shrink_that_is_zero_in_the_dtype(back_end, dtype):
    """-0.0 turns no sign; what float32 rounds to zero makes infinity a zero, not a NaN."""
    weights = torch.linspace(-1, 1, 100).to(dtype)
    weights[::9] = float("inf")
    for shrink in (-0.0, 5e-324):
        check_step(back_end, [weights], [95], torch.full((1,), float("nan"), dtype=dtype), shrink)
