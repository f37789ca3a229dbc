"""N:M tensors in the fused step, as the Triton kernel sees them: programs, tiles, tables, indices.

What every back end must do stands in tests/ops/test_nm_step.py.
"""

from __future__ import annotations

import random

import pytest
import torch

from issp.ops import ShrinkState, reference
from tests.asserts import assert_bitwise_equal

pytest.importorskip("triton")
import triton_kernels  # noqa: E402
from triton_kernels import nm_shrink, tables  # noqa: E402

pytestmark = pytest.mark.sampled(most=2)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# shape, (n, m, v, c): several programs each, groups of less and of more than a tile, units, and two
# unstructured
LAYERS = (
    ((12, 20, 3), (2, 5, 3, 1)),
    ((600,), (0, 0, 0, 0)),
    ((3, 200), (7, 200, 1, 1)),
    ((10, 40), (1, 40, 0, 1)),
    ((77,), (0, 0, 0, 0)),
    ((6, 160, 2), (8, 160, 3, 2)),
    ((8, 260), (0, 0, 4, 1)),
    ((6, 80, 3), (0, 0, 3, 2)),
)
PATTERNS = [x for _, pattern in LAYERS for x in pattern]


class Pair:
    """The same weights and state for the reference and for Triton."""

    def __init__(self, seed=0, dtype=torch.float32):
        source = torch.Generator().manual_seed(seed)
        made = [torch.randn(shape, generator=source).to(dtype) for shape, _ in LAYERS]
        pruned = [
            w.numel() // m * (m - n) if m else w.numel() // 2 for w, (n, m, *_) in self.zip(made)
        ]
        self.sides = [[w.clone() for w in made], [w.to(DEVICE, copy=True) for w in made]]
        self.states = [ShrinkState(weights, pruned) for weights in self.sides]
        for state in self.states:  # bits behind the last element as well
            before = torch.randint(
                -(2**31), 2**31, state.packed.shape, generator=torch.Generator().manual_seed(seed)
            )
            state.packed.copy_(before)

    @staticmethod
    def zip(weights):
        return zip(weights, (pattern for _, pattern in LAYERS), strict=True)

    def step(self, found_inf=None, **options):
        ops = (reference.soft_shrink_, triton_kernels.soft_shrink_)
        for op, weights, s in zip(ops, self.sides, self.states, strict=True):
            stop = None if found_inf is None else found_inf.to(s.k.device)
            more = options if op is triton_kernels.soft_shrink_ else {}
            state = (s.thresholds, s.packed, s.flips, s.scratch, stop, True, PATTERNS)
            op(weights, s.k, 0.95, *state, **more)
        for i, (expected, actual) in enumerate(zip(*self.sides, strict=True)):
            assert_bitwise_equal(actual.cpu(), expected, f"weights[{i}]")
        for name in ("thresholds", "packed", "flips"):
            expected, actual = (getattr(s, name) for s in self.states)
            assert_bitwise_equal(actual.cpu(), expected, name)
        assert not self.states[1].scratch[1:64].any()

    def move(self, seed):
        source = torch.Generator().manual_seed(seed)
        for expected, actual in zip(*self.sides, strict=True):
            expected += (torch.randn(expected.shape, generator=source) * 0.1).to(expected.dtype)
            actual.copy_(expected)


@pytest.mark.full
@pytest.mark.skipif(
    DEVICE == "cuda", reason="the order of programs can be set in the interpreter only"
)
@pytest.mark.parametrize("seed", [1, 2])
def test_the_order_of_the_programs_does_not_matter(monkeypatch, seed):
    """Whichever program of a tensor arrives last hands over flips and threshold."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    plain, draw, orders = builder.set_grid_idx, random.Random(seed), {}

    def shuffled(x, y, z):
        size = builder.grid_dim[0]
        if x == 0:
            orders[size] = draw.sample(range(size), size)
        plain(orders[size][x], y, z)

    monkeypatch.setattr(builder, "set_grid_idx", shuffled)
    pair = Pair(seed)
    pair.step(tile=512)
    pair.move(seed)
    pair.step(tile=512)
    assert any(order != sorted(order) for order in orders.values())


@pytest.mark.full
def test_counts_that_select_nothing_or_are_out_of_range():
    pair = Pair()
    pair.step()
    pair.move(1)
    for state in pair.states:
        state.k[0] = 0
    pair.step()
    assert pair.states[1].thresholds[0] == 0
    # The reference refuses a count that no pattern has; a GPU cannot look, and leaves it alone.
    actual, weights = pair.states[1], pair.sides[1]
    before = [x.clone() for x in (weights[2], actual.thresholds, actual.flips)]
    before.append(weights[7].clone())
    actual.k[2], actual.k[7] = 3, 15
    state = (actual.thresholds, actual.packed, actual.flips, actual.scratch)
    triton_kernels.soft_shrink_(weights, actual.k, 0.95, *state, None, True, PATTERNS)
    assert_bitwise_equal(weights[2], before[0], "the weights of a bad count")
    assert_bitwise_equal(weights[7], before[3], "the weights of a number that units do not divide")
    for x, y in zip((actual.thresholds, actual.flips), before[1:3], strict=True):
        for t in (2, 7):
            assert_bitwise_equal(x[t], y[t], "the state of a bad count")


def test_found_inf_leaves_everything_unmodified():
    pair = Pair()
    pair.step()
    pair.step(found_inf=torch.ones(1))


def test_indices_of_64_bits(monkeypatch):
    """As for a tensor of 2**31 elements, which does not fit here."""
    plain, seen = nm_shrink.shrink_groups, []

    class Wide:
        def __getitem__(self, grid):
            def call(*args, INDEX, **options):
                seen.append(INDEX)
                return plain[grid](*args, INDEX=nm_shrink.tl.int64, **options)

            return call

    monkeypatch.setattr(nm_shrink, "shrink_groups", Wide())
    Pair(dtype=torch.bfloat16).step()
    assert seen == [nm_shrink.tl.int32]


def test_a_repeated_call_uploads_nothing(monkeypatch):
    pair = Pair()
    pair.step()
    monkeypatch.setattr(tables, "_build", None)
    pair.step()


def test_one_launch_for_all_patterns(monkeypatch):
    plain, launches = nm_shrink.shrink_groups, []

    class Counted:
        def __getitem__(self, grid):
            launches.append(grid)
            return plain[grid]

    monkeypatch.setattr(nm_shrink, "shrink_groups", Counted())
    Pair().step()
    assert len(launches) == 1
