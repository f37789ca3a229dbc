"""The notation of a pattern."""

import pytest

from issp import Keep, Unit


@pytest.mark.parametrize(
    ("text", "keep", "name"),
    [
        ("2:4", Keep(2, of=4), "2:4 v=1"),
        ("1:10:4", Keep(1, of=10, v=4), "1:10 v=4"),
        ("3:32:1", Keep(3, of=32), "3:32 v=1"),
        ("1:20:flat", Keep(1, of=20, layout="flat"), "1:20 flat"),
        ("2:32:16x2", Keep(2, of=32, v=16, c=2), "2:32 v=16 c=2"),
        ("4:8:1x4", Keep(4, of=8, c=4), "4:8 v=1 c=4"),
    ],
)
def test_a_pattern_is_read_and_named(text, keep, name):
    assert Keep.parse(text) == keep and keep.name == name
    assert Keep.parse(keep.written) == keep
    assert Keep.parse(text, tail="dense").tail == "dense"


@pytest.mark.parametrize(
    "text", ["", "2", "2/4", "2:4:", "2:4:v4", "2:4:4x", "2:4:x2", "2:4:4:flat", "-2:4", " 2:4"]
)
def test_another_notation_is_refused_with_examples(text):
    with pytest.raises(ValueError, match=f'^pattern "{text}": write n:of, such as 2:4'):
        Keep.parse(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("5:4", "n must lie in"),
        ("1:4:0", "v must be at"),
        ("2:4:4x0", "c must be at least 1"),
        ("1:4:4x2", r"Keep\(1, of=4, c=2\): c must divide n and of"),
        ("2:5:4x2", r"Keep\(2, of=5, c=2\): c must divide n and of"),
    ],
)
def test_numbers_that_make_no_pattern_are_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        Keep.parse(text)


def test_the_repr_of_a_pattern_without_c_is_that_of_older_states():
    assert repr(Keep(2, of=32, v=4)) == "Keep(n=2, of=32, v=4, layout='channels')"
    assert repr(Keep(2, of=32, v=4, c=2)) == "Keep(n=2, of=32, v=4, c=2, layout='channels')"
    assert Keep(2, of=32, c=2).numbers() == (2, 32, 1, 2)
    assert Keep(2, of=4, layout="flat").numbers() == (2, 4, 0, 1)
    with pytest.raises(ValueError, match="no rows or channels to share"):
        Keep(2, of=4, layout="flat", c=2)


@pytest.mark.parametrize("text", ["", "16", "16x", "16:2", "x2", "16x2x3", "-4x2", " 4x2"])
def test_another_notation_of_a_unit_is_refused_with_an_example(text):
    with pytest.raises(ValueError, match=f'^unit "{text}": write vxc, such as 16x2$'):
        Unit.parse(text)
    with pytest.raises(ValueError, match=r"Unit\(0, 2\): v and c must be at least 1"):
        Unit.parse("0x2")


def test_a_unit():
    unit = Unit(16, 2)
    assert (unit.size, unit.name, unit.numbers()) == (32, "16x2", (0, 0, 16, 2))
    assert Unit.parse("16x2") == unit and Unit.parse("16x2", tail="dense").tail == "dense"
    assert repr(Unit(16, 2, tail="dense")) == "Unit(v=16, c=2)" and Unit(4) == Unit(4, 1)
    unit.check_divides((32, 64, 3, 3))
    for shape in ((24, 64), (32, 63, 3, 3), (32,)):
        with pytest.raises(ValueError, match="does not divide into units of v = 16 .* c = 2"):
            unit.check_divides(shape)
    for numbers in ((0, 1), (1, 0)):
        with pytest.raises(ValueError, match="v and c must be at least 1"):
            Unit(*numbers)
    with pytest.raises(ValueError, match='tail="loose".* use "error" or "dense"'):
        Unit(2, tail="loose")
