"""The two tiers of tests: which cases `make test` leaves out, and how long its loops are.

`make test` deselects what is marked `full`. `make test-all` runs everything and sets
ISSP_TEST_FULL=1, which also makes the loops long.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.backends import BackEnd

# Folders whose tests are all `full`.
FULL_FOLDERS = ("tests/bench/",)
FULL = os.environ.get("ISSP_TEST_FULL") == "1"


def quick_or_full(quick: int, full: int) -> int:
    """The length of a loop: `quick` by default, `full` in `make test-all`."""
    return full if FULL else quick


def some(cases: Sequence, back_end: BackEnd, every: int = 4) -> Sequence:
    """The cases of a loop: all, but in `make test` one in `every` on a slow back end."""
    return cases if FULL or not back_end.slow else cases[::every]


def mark_full(items: Iterable[pytest.Item]) -> None:
    """Marks as `full` what is in a folder of `FULL_FOLDERS` or left out by the marker `sampled`."""
    for item in items:
        if item.nodeid.startswith(FULL_FOLDERS):
            item.add_marker(pytest.mark.full)
    _mark_unsampled(items)


def _mark_unsampled(items: Iterable[pytest.Item]) -> None:
    tests = defaultdict(list)
    for item in items:
        marker = item.get_closest_marker("sampled")
        if marker is None or not hasattr(item, "callspec"):
            continue
        values = dict(item.callspec.params)
        back_end = values.pop("back_end", None)
        slow = getattr(back_end, "slow", False)
        if slow or not marker.kwargs.get("slow_only"):
            name = item.nodeid.partition("[")[0]
            tests[name, str(back_end)].append((item, values, marker.kwargs.get("most")))
    for cases in tests.values():
        kept = every_value_once([values for _, values, _ in cases], cases[0][2])
        for number, (item, _, _) in enumerate(cases):
            if number not in kept:
                item.add_marker(pytest.mark.full)


def every_value_once(cases: list[dict], most: int | None) -> set[int]:
    """Numbers of cases that have every value of every parameter, `most` at most, one at least.

    Greedy: the next case has the most values that no chosen one has, then the least used ones.
    """
    named = [[(name, _key(value)) for name, value in case.items()] for case in cases]
    missing = {pair for case in named for pair in case}
    used: Counter = Counter()
    chosen: set[int] = set()
    while (missing and (most is None or len(chosen) < most)) or not chosen:
        number = max(
            (i for i in range(len(named)) if i not in chosen),
            key=lambda i: (len(missing.intersection(named[i])), -sum(used[p] for p in named[i])),
        )
        chosen.add(number)
        used.update(named[number])
        missing.difference_update(named[number])
    return chosen


def _key(value: object) -> object:
    try:
        hash(value)
    except TypeError:
        return repr(value)
    return value
