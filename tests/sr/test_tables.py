"""Tables of scores: what is in one table, marks, spread, notes, and their three forms."""

import csv
import io
import re
from dataclasses import replace

import pytest

from issp.sr import results, table_formats, tables
from issp.sr.results import Result


def score(method, psnr, set="Set5", seed=None, **more):
    facts = {"arch": "edsr-tiny", "scale": 2, "sparsity": 0.95, "channel": "y", "ssim": None}
    return Result(method=method, set=set, seed=seed, psnr=psnr, **(facts | more))


def bicubic(psnr, scale=2, **more):
    return score("bicubic", psnr, arch="", sparsity=None, scale=scale, **more)


def cells(text):
    """Rows of a markdown table, without the header's."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_methods_are_grouped_by_scale_in_the_order_of_the_paper():
    found = [score(m, 30, scale=s) for s in (4, 2, 3) for m in ("mine", "iss-p", "l1", "scratch")]
    found += [score("dense", 33, sparsity=0), bicubic(28), bicubic(25, scale=8)]
    found += [score("l1", 30, set=name) for name in ("zoo", "Manga109", "BSD100", "Urban100")]
    rest, table = tables.build(found)
    x2 = ["Bicubic", "Dense", "Scratch", "L1-norm", "ISS-P", "mine"]
    expected = [(2, name) for name in x2] + [(s, name) for s in (3, 4) for name in x2[2:]]
    assert [(row.scale, row.label) for row in table.rows] == expected
    assert table.sets == ["Set5", "B100", "Urban100", "Manga109", "zoo"]
    # A scale without networks is not lost.
    assert [(row.scale, row.label) for row in rest.rows] == [(2, "Bicubic"), (8, "Bicubic")]


def test_y_and_rgb_ratios_networks_and_borders_are_never_in_one_table():
    found = [score("l1", 1), score("l1", 2, channel="rgb"), score("l1", 3, sparsity=0.99)]
    found += [score("l1", 4, arch="edsr-l"), score("l1", 5, crop_border=0)]
    found += [score("dense", 6, sparsity=0), score("dense", 7, sparsity=0, arch="cat-r")]
    shown = {
        (t.key.arch, t.key.sparsity, t.key.channel, t.key.crop_border): [
            row.cells["Set5", "PSNR"].mean for row in t.rows
        ]
        for t in tables.build(found)
    }
    assert shown == {
        ("edsr-tiny", 0.95, "y", None): [6, 1],
        ("edsr-tiny", 0.95, "rgb", None): [2],
        ("edsr-tiny", 0.99, "y", None): [6, 3],
        ("edsr-l", 0.95, "y", None): [4],
        ("edsr-tiny", 0.95, "y", 0): [5],
        ("cat-r", 0, "y", None): [7],
    }


@pytest.mark.parametrize(
    ("facts", "title"),
    [
        ({"arch": "edsr-l", "channel": "rgb"}, "edsr-l, sparsity 0.95, RGB (the paper's table 1)"),
        ({"arch": "edsr-l"}, "edsr-l, sparsity 0.95, Y channel"),
        ({"arch": "edsr-l", "channel": "rgb", "crop_border": 0},
         "edsr-l, sparsity 0.95, RGB, crop border 0"),
        ({"arch": "swinir-light"}, "swinir-light, sparsity 0.95, Y channel (the paper's table 2)"),
        ({"arch": "swinir-light", "sparsity": 0.99},
         "swinir-light, sparsity 0.99, Y channel (the paper's table 3)"),
        ({"method": "dense", "sparsity": 0.0}, "edsr-tiny, dense, Y channel"),
        ({"method": "bicubic", "sparsity": None, "arch": ""}, "Y channel"),
    ],
)  # fmt: skip
def test_titles_say_what_rows_share(facts, title):
    assert [t.title for t in tables.build([replace(score("l1", 30), **facts)])] == [title]


def test_the_best_and_the_second_of_a_scale_are_marked_by_what_is_printed():
    found = [score("scratch", 30.004), score("l1", 30.001), score("srp", 29.996)]  # 30.00 thrice
    found += [score("iht", 29.98), score("iss-p", 29.97), score("dense", 40, sparsity=0)]
    found += [score("iss-p", 20, scale=4), bicubic(41)]
    found += [score("l1", 50, source="paper"), score("l1", 1, "Set14"), score("iht", 2, "Set14")]
    (table,) = tables.build(found)
    marks = {
        (row.scale, row.label): {name: mark for (name, _), mark in row.marks.items()}
        for row in table.rows
        if row.marks
    }
    assert marks == {
        (2, "Scratch"): {"Set5": "best"},
        (2, "L1-norm"): {"Set5": "best", "Set14": "second"},
        (2, "SRP"): {"Set5": "best"},
        (2, "IHT"): {"Set5": "second", "Set14": "best"},
    }


def test_several_seeds_become_mean_and_spread():
    found = [score("iss-p", p, seed=i, ssim=p / 100) for i, p in enumerate((30.0, 30.1, 30.5))]
    found += [score("iss-p", 25.0, "Set14", seed=1), score("l1", 29.0, seed=0), bicubic(28)]
    (table,) = tables.build(found)
    value = table.rows[2].cells["Set5", "PSNR"]
    assert value.mean == pytest.approx(30.2) and value.count == 3
    assert value.spread == pytest.approx((0.04 + 0.01 + 0.09) ** 0.5 / 2**0.5)
    markdown = table_formats.markdown([table])
    assert cells(markdown) == [
        ["Bicubic", "x2", "–", "28.00", "–", "–", "–"],
        ["L1-norm", "x2", "1", "<u>29.00</u>", "–", "–", "–"],
        ["ISS-P", "x2", "3", "**30.20** ± 0.26", "0.3020 ± 0.0026", "25.00", "–"],
    ]
    assert "* ISS-P x2, Set14: 1 of 3 seeds." in markdown
    assert "sample standard deviation over seeds" in markdown
    exact = [replace(found[0], psnr=float("inf")), found[1]]
    assert cells(table_formats.markdown(tables.build(exact)))[0][3] == "inf"


def test_two_scores_of_one_seed_are_refused_and_one_twice_counts_once():
    with pytest.raises(ValueError, match=r"iss-p x2 on Set5 \(y\) has two scores, 30.* of seed 1"):
        tables.build([score("iss-p", 30, seed=1), score("iss-p", 31, seed=1, model="b")])
    with pytest.raises(ValueError, match="of seed unknown: give the seeds"):
        tables.build([score("iss-p", 30), score("iss-p", 31, model="b")])
    (table,) = tables.build([bicubic(28), bicubic(28), score("l1", 30), score("l1", 30, model="b")])
    assert [row.seeds for row in table.rows] == [0, 0]
    assert [value.count for row in table.rows for value in row.cells.values()] == [1, 1]


def test_notes_say_what_makes_rows_differ():
    found = [score("sls", 30, zeros=0.9244, images=5, lr="made")]
    found += [score("l1", 30, zeros=0.9499, images=3, lr="read")]
    (table,) = tables.build(found)
    assert [row.label for row in table.rows] == ["L1-norm", "SLS, 0.924 zero"]
    assert table.notes == [
        "Set5: rows are of 3 to 5 images: not comparable.",
        "Set5: low-resolution images were read for some rows, made for others.",
    ]


def test_the_papers_numbers_come_with_their_flaws():
    """Every cell that is known, and none that is not (docs/method.md, section 1.4)."""
    rows = results.read(tables.PAPER)
    printed = {
        (r.source, r.method, r.arch, r.scale, r.sparsity, r.set, r.channel): (r.psnr, r.ssim)
        for r in rows
        if r.method != "bicubic"
    }
    swinir = "swinir-light"
    assert printed == {
        ("paper, table 1", "scratch", "edsr-l", 4, 0.95, "B100", "rgb"): (25.92, None),
        ("paper, table 2", "iss-p", swinir, 2, 0.95, "Urban100", "y"): (28.40, None),
        ("paper, table 3", "iss-p", swinir, 2, 0.99, "Urban100", "y"): (28.39, None),
        ("paper, table 3", "iss-r", swinir, 4, 0.99, "Set14", "y"): (26.32, 0.7260),
    }
    cubic = {(r.set, r.channel, r.scale): r.psnr for r in rows if r.method == "bicubic"}
    for channel, values in (("y", (28.43, 26.09, 25.96)), ("rgb", (26.70, 24.47, 24.64))):
        for name, value in zip(("Set5", "Set14", "B100"), values, strict=True):
            assert cubic.pop((name, channel, 4)) == value
    assert not cubic
    assert {r.source for r in rows if r.method == "bicubic"} == {"measured, MATLAB"}
    first, second, third = tables.build(rows)
    assert "on RGB, not Y" in first.notes[0] and "the same program" in first.notes[0]
    assert all("same numbers except for this digit" in t.notes[0] for t in (second, third))
    assert "misprints" in third.notes[1]
    assert not any(row.marks for t in (first, second, third) for row in t.rows)


def test_latex_needs_booktabs_alone_and_is_well_formed():
    found = [score("my_method&co", 30.126, ssim=0.91), score("l1", 30.1, ssim=0.92)]
    found += [score("l1", 25, "a_b", seed=s, scale=4, note="50 % {x} ~^\\ ± <5") for s in (1, 2)]
    text = table_formats.latex(tables.build(found))
    assert (
        r"my\_method\&co & $\times$2 & -- & \textbf{30.13} & \underline{0.9100} & -- & --" in text
    )
    assert r"\multicolumn{2}{c}{a\_b}" in text and r"\cmidrule(lr){6-7}" in text
    assert r"50 \% \{x\} \textasciitilde{}\textasciicircum{}\textbackslash{} $\pm$ $<$5" in text
    assert r"25.00 $\pm$ 0.00" in text
    plain = re.sub(r"\\[{}&%]", "", text)
    assert plain.count("{") == plain.count("}") and plain.count("$") % 2 == 0
    (columns,) = re.findall(r"tabular}{(\w+)}", text)
    lines = [line for line in plain.splitlines() if line.endswith("\\")]
    spans = [sum(int(n) - 1 for n in re.findall(r"multicolumn{(\d)}", line)) for line in lines]
    assert len(lines) == 5
    assert {line.count("&") + 1 + s for line, s in zip(lines, spans, strict=True)} == {len(columns)}
    assert text.count(r"\midrule") == 2  # below the header, between the scales
    known = {"usepackage", "begin", "centering", "caption", "toprule", "cmidrule", "midrule"}
    known |= {"multicolumn", "bottomrule", "end", "times", "pm", "textbf", "underline"}
    known |= {"textasciitilde", "textasciicircum", "textbackslash"}
    assert set(re.findall(r"\\([a-z]+)", text)) == known


def test_csv_keeps_all_digits_of_all_tables():
    found = [score("l1", 1 / 3 + 30, seed=s, ssim=0.1 + s / 7) for s in (0, 1)]
    found += [score("l1", 25.5, "Set14", channel="rgb")]
    rows = list(csv.DictReader(io.StringIO(table_formats.comma_separated(tables.build(found)))))
    rgb, y = rows
    assert (rgb["channel"], rgb["Set14 PSNR"], rgb["Set5 PSNR"]) == ("rgb", "25.5", "")
    assert float(y["Set5 PSNR"]) == 1 / 3 + 30 and y["Set5 PSNR seeds"] == "2"
    assert float(y["Set5 SSIM spread"]) == pytest.approx(1 / 7 / 2**0.5)
    assert list(y)[7:10] == ["Set5 PSNR", "Set5 PSNR spread", "Set5 PSNR seeds"]
