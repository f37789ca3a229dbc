"""The notation of a pattern."""

import pytest

from issp import Keep


@pytest.mark.parametrize(
    ("text", "keep", "name"),
    [
        ("2:4", Keep(2, of=4), "2:4 v=1"),
        ("1:10:4", Keep(1, of=10, v=4), "1:10 v=4"),
        ("3:32:1", Keep(3, of=32), "3:32 v=1"),
        ("1:20:flat", Keep(1, of=20, layout="flat"), "1:20 flat"),
    ],
)
def test_a_pattern_is_read_and_named(text, keep, name):
    assert Keep.parse(text) == keep and keep.name == name
    assert Keep.parse(text, tail="dense").tail == "dense"


@pytest.mark.parametrize("text", ["", "2", "2/4", "2:4:", "2:4:v4", "2:4:4:flat", "-2:4", " 2:4"])
def test_another_notation_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=f'^pattern "{text}": write n:of, such as 2:4'):
        Keep.parse(text)


@pytest.mark.parametrize(("text", "reason"), [("5:4", "n must lie in"), ("1:4:0", "v must be at")])
def test_numbers_that_make_no_pattern_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        Keep.parse(text)
