"""The fused step with N:M patterns and units on every back end: bitwise equal to the reference."""

from __future__ import annotations

import functools
import math
from functools import cache

import numpy as np
import pytest
import torch
from torch.library import opcheck

import issp
from issp import Keep, Unit
from issp.ops import ShrinkState, reference
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS, FAST
from tests.cases import DTYPES, GROUPED, GROUPED_LARGE, UNITS, grouped, without_units
from tests.ops.test_parity import STATE, copies
from tests.ops.test_update_parity import KINDS, check
from tests.tiers import some

# Infinities and NaNs are provoked here; Triton's interpreter computes with numpy, which warns.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.sampled(slow_only=True, most=4),
]

REFERENCE = issp.backends.implementations("reference")
MIXED = grouped(
    "mixed",
    ((4, 8, 3, 3), Keep(2, of=8)),
    ((10, 21), 198),
    ((8, 16), Keep(1, of=16, v=4)),
    ((37,), 20),
    ((9, 20), Keep(1, of=90, layout="flat")),
    ((8, 16, 3, 3), Keep(4, of=16, v=4, c=2)),
    ((8, 12), (Unit(4, 2), 7)),
)


def suited(case, back_end):
    """The case as far as a back end has it: the ops of the CUDA library leave units to Triton."""
    return without_units(case) if str(back_end) == "cuda-emulated" else case


def state_of(case, weights):
    return ShrinkState(weights, case.k, case.patterns)


def step(table, weights, state, shrink, found_inf=None):
    table["soft_shrink_"](
        *(weights, state.k, shrink, state.thresholds, state.packed, state.flips, state.scratch),
        *(found_inf, True, state.patterns),
    )


@cache
def reference_steps(case, dtype, steps):
    """Per step of the reference: the weights before it, and weights and state after it."""
    weights, history = case.build(dtype), []
    state = state_of(case, weights)
    source = torch.Generator().manual_seed(7)
    for _ in range(steps):
        before = copies(weights)
        step(REFERENCE, weights, state, case.shrink)
        history.append((before, copies(weights), {x: getattr(state, x).clone() for x in STATE}))
        for x in weights:
            x += (torch.randn(x.shape, generator=source) * 1e-2).to(dtype)
    return history


def check_steps(back_end, case, dtype, steps=2):
    weights = case.build(dtype, back_end.device)
    state = state_of(case, weights)
    for number, (before, expected, results) in enumerate(reference_steps(case, dtype, steps)):
        for x, y in zip(weights, before, strict=True):
            x.copy_(y)
        step(back_end, weights, state, case.shrink)
        when = f"after step {number} of {case.name} in {dtype} on {back_end}"
        for i, (x, y) in enumerate(zip(weights, expected, strict=True)):
            assert_bitwise_equal(x.cpu(), y, f"weights[{i}], {case.patterns[i]} {when}")
        for name, result in results.items():
            assert_bitwise_equal(getattr(state, name).cpu(), result, f"{name} {when}")


# Interpreted, where a call takes a second, the other dtypes see the mixed cases only.
CALLS = [
    pytest.param(back_end, case, dtype, id=f"{back_end}-{case.name}-{dtype}")
    for back_end in BACK_ENDS
    for case in GROUPED + UNITS
    for dtype in DTYPES
    if case not in UNITS or str(back_end) != "cuda-emulated"
    if not back_end.interpreted or dtype == torch.float32 or case.name.startswith("grouped")
]


@pytest.mark.parametrize(("back_end", "case", "dtype"), CALLS)
def test_soft_shrink(back_end, case, dtype):
    check_steps(back_end, suited(case, back_end), dtype, steps=1 if back_end.interpreted else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("case", GROUPED_LARGE, ids=lambda case: case.name)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_soft_shrink_large(back_end, case, count, dtype, threads):
    threads(count)
    check_steps(back_end, case, dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_behind_an_update_and_then_frozen(back_end, kind):
    check(back_end, kind, "odd scale", suited(MIXED, back_end), steps=4)


@pytest.mark.full
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_behind_an_update_large(back_end, kind, threads):
    threads(2)
    check(back_end, kind, "plain", GROUPED_LARGE[0], steps=1, rest=((513,),))


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_nm_prune(back_end):
    for case in some(GROUPED[2::7] if back_end.interpreted else GROUPED, back_end):
        for w, keep in zip(case.build(torch.float32), case.patterns, strict=True):
            if not isinstance(keep, Keep):
                continue
            call = (keep.n, keep.of, keep.v, keep.layout, case.shrink, keep.c)
            expected, mask = REFERENCE["nm_prune"](w, *call)
            pruned, packed = back_end["nm_prune"](w.to(back_end.device), *call)
            assert_bitwise_equal(pruned.cpu(), expected, f"{back_end}, {keep} of {case.name}")
            assert_bitwise_equal(packed.cpu(), mask, f"{back_end}, mask of {keep}, {case.name}")


@pytest.mark.parametrize("flush", [False, True], ids=["gradual", "flush-to-zero"])
@pytest.mark.parametrize("back_end", FAST, ids=str)
def test_bits_do_not_depend_on_the_floating_point_mode(back_end, flush):
    layers = (
        ((8, 32, 3, 3), Keep(2, of=8)),
        ((8, 48), Keep(2, of=4, v=4)),
        ((8, 48), Keep(2, of=4, v=2, c=2)),
        ((8, 32, 3, 3), (Unit(4, 2), 200)),
        ((8, 30), (Unit(1, 2), 70)),
    )
    case = grouped("tiny and huge groups", *layers, fill="magnitudes")
    weights = case.build(torch.float32, back_end.device)
    expected = case.build(torch.float32)
    step(REFERENCE, expected, state_of(case, expected), 0.95)
    assert torch.set_flush_denormal(flush)
    try:
        step(back_end, weights, state_of(case, weights), 0.95)
    finally:
        torch.set_flush_denormal(False)
    for x, y in zip(weights, expected, strict=True):
        assert_bitwise_equal(x.cpu(), y, f"{back_end} with flush {flush}")


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_found_inf_leaves_everything_unmodified(back_end):
    case = suited(MIXED, back_end)
    weights = case.build(torch.float32, back_end.device)
    state = state_of(case, weights)
    step(back_end, weights, state, 0.95)
    before = [x.clone() for x in (*weights, state.thresholds, state.packed, state.flips)]
    step(back_end, weights, state, 0.95, torch.ones(1, device=back_end.device))
    after = [*weights, state.thresholds, state.packed, state.flips]
    for x, y in zip(after, before, strict=True):
        assert_bitwise_equal(x, y, f"{back_end} under found_inf")
    step(back_end, weights, state, 0.95, torch.zeros(1, device=back_end.device))
    assert not torch.equal(weights[0], before[0])


@pytest.mark.parametrize("back_end", BACK_ENDS, ids=str)
def test_an_empty_list_and_no_pattern_at_all_are_the_plain_step(back_end):
    case = grouped("no patterns", ((20, 30), 500), ((65,), 9))
    results = []
    for patterns in ([], [0, 0, 0, 0] * 2, [3, 0, 0, 7] * 2):
        weights = case.build(torch.float32, back_end.device)
        state = state_of(case, weights)
        assert state.patterns == []
        state.patterns = patterns
        step(back_end, weights, state, 0.95)
        results.append([*weights, state.thresholds, state.packed, state.flips])
    for others in results[1:]:
        for x, y in zip(others, results[0], strict=True):
            assert_bitwise_equal(x, y, f"{back_end}, unstructured by name")


# The reference


def unit_norms(weight, v, c):
    """{(top, first, kernel): L1 norm} of a float weight [O, I, kernel], in numpy float32."""
    wide = np.abs(weight.float().numpy())
    norms = {}
    for top in range(0, len(wide), v):
        for first in range(0, wide.shape[1], c):
            for at in range(wide.shape[2]):
                channels = []
                for channel in range(first, first + c):
                    column = wide[top : top + v, channel, at]
                    channels.append(np.float32(functools.reduce(np.add, column)))
                norms[top, first, at] = float(functools.reduce(np.add, channels))
    return norms


def by_norm(norms, units):
    """Units from the smallest; NaN is last, ties in the order of `units`."""
    return sorted(units, key=lambda unit: (math.isnan(norms[unit]), norms[unit]))


def pruned_by_sorting(weight, by, k=0):
    """Pruned positions of a weight [O, I, kernel], by sorting every group, or all units."""
    v, c = by.v, by.c
    norms, pruned = unit_norms(weight, v, c), torch.zeros(weight.shape, dtype=torch.bool)
    of = weight.shape[1] if isinstance(by, Unit) else by.of
    groups = {}
    for top, first, at in norms:
        group = () if isinstance(by, Unit) else (top, first // of, at)
        groups.setdefault(group, []).append((top, first, at))
    for units in groups.values():
        count = k // by.size if isinstance(by, Unit) else (of - by.n) // c
        for top, first, at in by_norm(norms, units)[:count]:
            pruned[top : top + v, first : first + c, at] = True
    return pruned


SORTED = (
    *(Keep(2, of=4), Keep(1, of=6, v=2), Keep(5, of=6, v=3)),
    *(Keep(2, of=6, v=2, c=2), Keep(3, of=12, v=3, c=3), Keep(4, of=12, c=4)),
    *(Unit(2, 2), Unit(3, 4), Unit(6), Unit(1, 3)),
)


@pytest.mark.parametrize("back_end", ["reference", *map(str, FAST)])
@pytest.mark.parametrize("by", SORTED, ids=str)
@pytest.mark.parametrize("fill", ["normal", "few", "equal", "special"])
def test_what_is_pruned_is_what_sorting_prunes(by, fill, back_end):
    k = 6 * by.size if isinstance(by, Unit) else None
    layer = ((6, 12, 3), by if k is None else (by, 6))
    case = grouped("groups", layer, fill=fill)
    (w,) = case.build(torch.float32)
    table = next((b for b in FAST if str(b) == back_end), REFERENCE)
    expected, before, state = pruned_by_sorting(w, by, k), w.clone(), state_of(case, [w])
    step(table, [w], state, 0.5)
    assert torch.equal(state.masks()[0], ~expected)
    after = torch.where(expected, reference.shrunk(before, 0.5), before)
    assert_bitwise_equal(w, after, f"{by} on {back_end}")
    largest = reference.key(before)[expected].max()
    assert reference.key(state.thresholds).item() == largest
    assert state.flips.item() == expected.sum() == case.k[0]


def test_a_sum_of_rows_is_added_before_those_of_other_channels():
    """(1 + tiny) + tiny loses both of two tiny numbers that are added first to 1 one by one."""
    tiny = 2.0**-24
    w = torch.zeros(2, 4)
    w[:, 0:2] = torch.tensor([[1.0, tiny], [0.0, tiny]])  # 1 + (tiny + tiny) > 1
    w[0, 2:4] = torch.tensor([1.0, 0.0])
    state = ShrinkState([w], [4], [Unit(2, 2)])
    for table in (REFERENCE, *FAST):
        x = w.clone()
        step(table, [x], state, 0.0)
        assert state.masks()[0].tolist() == [[True, True, False, False]] * 2


# What is refused


REFUSED = (
    ([2, 4], "patterns has 2 numbers for 1 pruned weights"),
    ([2, 4, 1], "patterns has 3 numbers for 1 pruned weights"),
    ([2, 4, 1, 1] * 2, "patterns has 8 numbers for 1 pruned weights"),
    ([2, 3, 1, 1], r"weights\[0\] \(4, 8, 3, 3\) does not divide into groups of m = 3"),
    ([2, 4, 3, 1], r"weights\[0\] \(4, 8, 3, 3\) does not divide .* v = 3"),
    ([2, 7, 0, 1], "m = 7 does not divide the 288 elements"),
    ([0, 4, 1, 1], r"Keep\(0, of=4\): n must lie in 1..of"),
    ([5, 4, 1, 1], r"Keep\(5, of=4\): n must lie in 1..of"),
    ([2, -4, 1, 1], r"Keep\(2, of=-4\): n must lie in 1..of"),
    ([2, 4, -1, 1], r"Keep\(v=-1\): v must be at least 1"),
    ([1, 4, 1, 1], r"k\[0\] is 144 but weights\[0\] keeps 1 of 4: use 0 or 216"),
    ([2, 4, 1, 0], r"Keep\(c=0\): c must be at least 1"),
    ([1, 4, 1, 2], r"Keep\(1, of=4, c=2\): c must divide n and of"),
    ([2, 8, 0, 2], "has no rows or channels to share a pattern"),
    ([0, 0, 3, 2], r"weights\[0\] \(4, 8, 3, 3\) does not divide into units of v = 3 .* c = 2"),
    ([0, 0, 2, 3], r"weights\[0\] \(4, 8, 3, 3\) does not divide into units of v = 2 .* c = 3"),
    ([0, 0, -1, 2], r"Unit\(-1, 2\): v and c must be at least 1"),
    ([0, 0, 1, 0], r"Unit\(1, 0\): v and c must be at least 1"),
    ([0, 0, 4, 8], r"k\[0\] is 144 but weights\[0\] is pruned in units of 4 x 8 weights: use a m"),
)


@pytest.mark.parametrize(("patterns", "sentence"), REFUSED, ids=str)
def test_impossible_patterns_are_refused_and_nothing_is_modified(patterns, sentence):
    w = torch.randn(4, 8, 3, 3)
    state = ShrinkState([w], [144])
    state.patterns = patterns
    before = [x.clone() for x in (w, state.packed, state.flips)]
    with pytest.raises(ValueError, match=sentence):
        issp.ops.soft_shrink_([w], state)
    with pytest.raises((ValueError, RuntimeError)):
        step({"soft_shrink_": torch.ops.issp.soft_shrink_}, [w], state, 0.95)
    moments = [[torch.zeros_like(w)] for _ in range(3)]
    arguments = (
        *([w], *moments, [torch.zeros(())], 1e-3, 0.9, 0.99, 1e-8, 0.0, False, False, None, None),
        *(state.k, 0.95, state.thresholds, state.packed, state.flips, state.scratch),
        *(None, False, True, patterns),
    )
    with pytest.raises(ValueError, match=sentence):
        issp.ops.adam_soft_shrink_(*arguments)
    with pytest.raises((ValueError, RuntimeError)):
        torch.ops.issp.adam_soft_shrink_(*arguments)
    for x, y in zip((w, state.packed, state.flips), before, strict=True):
        assert torch.equal(x, y)


def test_the_state_refuses_what_does_not_fit():
    w = torch.randn(4, 8)
    with pytest.raises(ValueError, match="does not divide"):
        ShrinkState([w], [0], [Keep(1, of=3)])
    with pytest.raises(ValueError, match="needs a weight"):
        ShrinkState([w.view(-1)], [0], [Keep(1, of=4)])
    with pytest.raises(ValueError, match=r"k\[0\] is 5 .* use 0 or 24"):
        ShrinkState([w], [5], [Keep(1, of=4)])
    with pytest.raises(
        ValueError, match=r"k\[0\] is 5 .* units of 2 x 2 weights: use a multiple of 4"
    ):
        ShrinkState([w], [5], [Unit(2, 2)])
    with pytest.raises(ValueError, match="does not divide into units of v = 3"):
        ShrinkState([w], [6], [Unit(3, 2)])
    with pytest.raises(ValueError, match="does not divide into units"):
        ShrinkState([w.view(-1)], [4], [Unit(2, 2)])
    state = ShrinkState([w], [24], [Keep(1, of=4)])
    with pytest.raises(ValueError, match="use 0 or 24"):
        state.set_k([23])
    with pytest.raises(ValueError, match="use 0 or 24"):
        state.load_state_dict(state.state_dict() | {"k": torch.tensor([23])})
    assert state.k.item() == 24


# As torch sees them


DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    weights = MIXED.build(torch.float32, device)
    state = state_of(MIXED, weights)
    tensors = (state.thresholds, state.packed, state.flips, state.scratch)
    call = (weights, state.k, 0.95, *tensors, None, True, state.patterns)
    opcheck(torch.ops.issp.soft_shrink_.default, call)
    grads, first, second = ([w.abs() * x for w in weights] for x in (0.3, 0.2, 0.1))
    tail = (state.k, 0.95, *tensors, None, False, True, state.patterns)
    steps = [torch.zeros((), device=device) for _ in weights]
    adam = (weights, grads, first, second, steps, 1e-3, 0.9, 0.99, 1e-8, 0.0, False, False)
    opcheck(torch.ops.issp.adam_soft_shrink_.default, (*adam, None, None, *tail))
    sgd = (weights, grads, first, [False] * len(weights), 1e-2, 0.9, 0.0, 0.0, False, False)
    opcheck(torch.ops.issp.sgd_soft_shrink_.default, (*sgd, None, None, *tail))


@pytest.mark.parametrize("device", DEVICES)
def test_compiles_whole(device):
    expected, weights = MIXED.build(torch.float32, device), MIXED.build(torch.float32, device)
    expected_state, state = state_of(MIXED, expected), state_of(MIXED, weights)
    compiled = torch.compile(
        lambda w: issp.ops.soft_shrink_(w, state, 0.9), fullgraph=True, backend="aot_eager"
    )
    for _ in range(2):
        issp.ops.soft_shrink_(expected, expected_state, 0.9)
        compiled(weights)
    for x, y in zip(weights, expected, strict=True):
        assert_bitwise_equal(x, y, "compiled")
    assert torch.equal(state.packed, expected_state.packed)
