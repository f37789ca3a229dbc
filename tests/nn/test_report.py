"""The report of packed layers as text."""

from issp.nn.report import LayerReport, Line


def test_a_bar_in_a_name_does_not_end_its_cell():
    line = Line(name="a|b", shape="8x8", sparsity=0.5, reason="x | y")
    row = LayerReport([line], "a machine")().splitlines()[2]
    assert row.startswith(r"| a\|b | 8x8 | 50 % |") and row.endswith(r"| x \| y |")
