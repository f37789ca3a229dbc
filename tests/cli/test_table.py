"""`issp table`: what is read and written, and what is refused."""

import pytest

from issp import cli
from issp.sr import results
from issp.sr.results import Result

ISS_P = Result("iss-p", "swinir-light", 2, 0.95, 1, "Urban100", "y", 28.5, 0.85)
L1 = Result("l1", "swinir-light", 2, 0.95, 1, "Urban100", "y", 28.1, 0.84)
BICUBIC = Result("bicubic", "", 2, None, None, "Urban100", "y", 26.9, 0.84)
OTHER = Result("iss-p", "edsr-tiny", 2, 0.95, 1, "Set5", "rgb", 33.0, 0.9)


@pytest.fixture
def scores(tmp_path):
    results.write(tmp_path / "study" / "results.csv", [ISS_P, OTHER])
    results.write(tmp_path / "scores.csv", [L1, BICUBIC])
    return tmp_path / "scores.csv"


def run(capsys, *arguments):
    assert cli.main(["table", *map(str, arguments)]) == 0
    return capsys.readouterr()


def refused(capsys, *arguments):
    assert cli.main(["table", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("issp table: error: ") and message.count("\n") == 1
    return message


def test_files_and_folders_of_studies_make_one_set_of_tables(scores, capsys):
    text = run(capsys, scores, scores.parent / "study").out
    assert text.count("### ") == 2
    _, table = text.split("### swinir-light")
    assert "| L1-norm |    x2 |  <u>28.10</u> | <u>0.8400</u> |" in table
    assert "| ISS-P   |    x2 |     **28.50** |    **0.8500** |" in table


def test_a_bar_in_a_name_does_not_end_its_cell(tmp_path, capsys):
    odd = Result(**(vars(L1) | {"method": "a|b", "set": "Set|5"}))
    results.write(tmp_path / "odd.csv", [odd])
    header, _, row = (x for x in run(capsys, tmp_path / "odd.csv").out.splitlines() if "|" in x)
    assert r" Set\|5 PSNR " in header and row.startswith(r"| a\|b ")


def test_the_papers_numbers_beside(scores, capsys):
    text = run(capsys, scores, "--paper").out
    assert text.count("### ") == 1  # not the paper's other tables
    assert "| ISS-P (paper, table 2) |" in text and "28.40" in text
    assert "same numbers except for this digit" in text
    assert run(capsys, "--paper").out.count("### ") == 3  # alone: everything that is known
    results.write(scores, [OTHER])
    assert "no number for these networks" in run(capsys, scores, "--paper").err


def test_a_fuller_file_of_the_papers_numbers(scores, capsys, tmp_path):
    text = (
        "method,arch,scale,sparsity,seed,set,channel,psnr,ssim,source\n"
        'srp,swinir-light,2,0.95,,Urban100,y,12.34,0.5,"paper, table 2"\n'
    )
    (tmp_path / "typed.csv").write_text(text)
    printed = run(capsys, scores, "--paper", tmp_path / "typed.csv").out
    assert "| SRP (paper, table 2) |" in printed and "12.34" in printed
    assert "28.40" not in printed


@pytest.mark.parametrize(
    ("name", "arguments", "beginning"),
    [
        ("t.md", [], "### swinir-light"),
        ("t", [], "### swinir-light"),
        ("t.tex", [], "% \\usepackage{booktabs}"),
        ("t.csv", [], "arch,sparsity"),
        ("t.csv", ["--format", "latex"], "% \\usepackage{booktabs}"),
        ("t.txt", ["--format", "markdown"], "### swinir-light"),
    ],
)
def test_the_ending_chooses_the_form(scores, capsys, tmp_path, name, arguments, beginning):
    out = tmp_path / "made" / name
    assert run(capsys, scores, "-o", out, *arguments).out == f"{out}\n"
    assert out.read_text(encoding="utf-8").startswith(beginning)


def test_wrong_input_is_one_sentence(scores, capsys, tmp_path):
    assert "give results files of `issp test --csv`" in refused(capsys)
    assert "there is no results file" in refused(capsys, tmp_path / "absent.csv")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "empty/results.csv: `issp test --csv` writes one" in refused(capsys, empty)
    (tmp_path / "log.csv").write_text("iteration,loss\n1,2\n")
    assert "is not a results file" in refused(capsys, tmp_path / "log.csv")
    results.write(tmp_path / "none.csv", [])
    assert "no result in it" in refused(capsys, tmp_path / "none.csv")
    assert "has no source" in refused(capsys, scores, "--paper", tmp_path / "study")
    results.write(tmp_path / "twice.csv", [L1, Result(**(vars(L1) | {"psnr": 9.0, "model": "b"}))])
    assert "has two scores" in refused(capsys, tmp_path / "twice.csv")
    before = scores.read_bytes()
    assert "would overwrite the results" in refused(capsys, scores, "-o", scores)
    study = tmp_path / "study"
    assert "would overwrite" in refused(capsys, study, "-o", study / "results.csv")
    assert scores.read_bytes() == before
    assert "cannot write" in refused(capsys, scores, "-o", "/proc/x/t.md")
    assert "scores.csv is a file; choose a folder" in refused(capsys, scores, "-o", scores / "t.md")
    assert "it is a folder; name a file" in refused(capsys, scores, "-o", study)
    ending = "t.pdf: give --format, or an ending of .md, .tex, .csv"
    assert ending in refused(capsys, scores, "-o", tmp_path / "t.pdf")
    assert cli.main(["table", str(scores), "--format", "html"]) == 2
    assert "unknown --format 'html'" in capsys.readouterr().err
