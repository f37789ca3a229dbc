"""Tables and suggestions as they are printed."""

from issp.utils.text import suggest, table


def test_the_nearest_name_or_all_of_them():
    assert suggest("trian", ["train", "test"]) == "did you mean 'train'?"
    assert suggest("xyz", ["train", "test"]) == "known: train, test"


def test_names_are_compared_without_their_case():
    assert suggest("EDSR-L", ["edsr-tiny", "edsr-l"]) == "did you mean 'edsr-l'?"
    assert suggest("swinir", ["EDSR", "SwinIR"]) == "did you mean 'SwinIR'?"


def test_columns_are_aligned():
    assert table(["a", "bb"], [["long", "1"], ["x", "22"]]).splitlines() == [
        "| a    | bb |",
        "| ---- | -: |",
        "| long |  1 |",
        "| x    | 22 |",
    ]


def test_a_cell_stays_in_its_line():
    lines = table(["a"], [["new\nline\t"], ["lat\udce9"], ["ünï"]]).splitlines()
    assert lines[2:] == [r"| new\nline\t |", r"| lat\udce9   |", "| ünï         |"]


def test_a_bar_does_not_end_a_cell():
    lines = table(["set | PSNR", "b"], [["a|b", "1"], ["||", "|"]]).splitlines()
    assert lines == [
        r"| set \| PSNR |  b |",
        r"| ----------- | -: |",
        r"| a\|b        |  1 |",
        r"| \|\|        | \| |",
    ]
