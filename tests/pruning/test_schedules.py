"""Schedules: what is asked for at which optimizer step."""

import pytest

from issp.pruning.schedules import Constant, Cubic, Linear


def test_cubic_follows_its_equation_and_hits_both_ends_exactly():
    cubic = Cubic(0.1, 0.95, begin=10, end=110)
    assert [cubic(t) for t in (0, 10)] == [0.1, 0.1]
    assert [cubic(t) for t in (110, 10**9)] == [0.95, 0.95]
    assert cubic(60) == pytest.approx(0.95 + (0.1 - 0.95) * (1 - 50 / 100) ** 3, abs=1e-15)
    steps = [cubic(t) for t in range(10, 111)]
    assert all(a < b for a, b in zip(steps, steps[1:], strict=False))
    assert steps[1] - steps[0] > 100 * (steps[-1] - steps[-2])


def test_linear_goes_at_constant_speed():
    linear = Linear(0.0, 0.8, begin=0, end=4)
    assert [linear(t) for t in range(6)] == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert linear(4) == linear.final == 0.8


def test_constant_starts_at_begin():
    constant = Constant(0.9, begin=3)
    assert [constant(t) for t in (1, 2, 3, 100)] == [0.0, 0.0, 0.9, 0.9]
    assert Constant(0.9)(1) == 0.9 and (constant.final, constant.end) == (0.9, 3)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Cubic(0.0, 1.2, 0, 10),
        lambda: Cubic(-0.1, 0.5, 0, 10),
        lambda: Cubic(0.0, 0.0, 0, 10),
        lambda: Linear(0.0, 0.5, 10, 10),
        lambda: Linear(0.0, 0.5, -1, 10),
        lambda: Constant(0.0),
        lambda: Constant(0.5, begin=-1),
    ],
)
def test_impossible_schedules_are_refused(make):
    with pytest.raises(ValueError, match="schedule"):
        make()
