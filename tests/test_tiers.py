"""The sample of cases that `make test` runs."""

from __future__ import annotations

from tests.tiers import every_value_once

CASES = [{"case": case, "dtype": dtype} for case in range(6) for dtype in "abcd"]


def test_every_value_of_every_parameter_is_kept_and_dtypes_take_turns():
    kept = [CASES[i] for i in every_value_once(CASES, None)]
    assert sorted(case["case"] for case in kept) == list(range(6))
    assert sorted(case["dtype"] for case in kept) == list("aabbcd")


def test_a_limit_keeps_different_values():
    kept = [CASES[i] for i in every_value_once(CASES, 3)]
    assert len({case["case"] for case in kept}) == len({case["dtype"] for case in kept}) == 3


def test_values_that_cannot_be_hashed_are_compared_by_their_text():
    cases = [{"call": [1]}, {"call": [1]}, {"call": [2]}]
    assert len(every_value_once(cases, None)) == 2


def test_one_case_is_kept_where_nothing_varies():
    assert every_value_once([{}], 4) == {0}
