"""The display of a run: narrow terminals, and terminals that are gone."""

import io
import os
import re
import subprocess
import sys
import time

import pytest

from issp.sr import logging
from issp.sr.logging import progress

ROW = {
    "iteration": 12345, "stage": "pruning", "loss": 0.012345, "psnr": 29.876, "seconds": 0.1234,
    "selected": 0.95, "zeros": 0.0, "flips": 1234, "lr": 1e-3, "psnr_masked": 31.234,
}  # fmt: skip


def displayed(width, rows):
    """What a bar in a terminal of that width shows after each row, as lines without colours."""
    console = pytest.importorskip("rich.console", reason="the bar is rich's")
    stream = io.StringIO()
    terminal = console.Console(
        file=stream, width=width, height=20, force_terminal=True, legacy_windows=False
    )
    shown = logging.Progress()
    shown.total, shown._bar = 500_000, progress.rich_bar(500_000, 12_000, terminal)
    frames = []
    for row in rows:
        shown.show_row(row)
        shown._bar.refresh()
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
        frames.append([line for line in re.split(r"[\r\n]+", text) if line.strip()][-1].rstrip())
        assert "\x1b[1A" not in stream.getvalue(), "the cursor goes up: the bar has several lines"
    shown.close()
    return frames


@pytest.mark.parametrize("width", [30, 40, 60, 80, 120, 200])
def test_the_bar_is_one_line_in_any_terminal(width):
    (line,) = displayed(width, [ROW])
    assert len(line) <= width and "12000/500000" in line
    if width >= 40:
        assert "0.12 s/it" in line
    if width >= 60:
        assert "31.23 dB masked" in line
    if width >= 80:
        assert "31.23 dB masked zeros 0 % loss 0.0123" in line and "━" in line
    if width >= 120:
        assert line.endswith("loss 0.0123 1234 flips 29.88 dB soft")


def test_the_bar_keeps_the_latest_score_and_whose_it_is():
    unscored = {"psnr": None, "psnr_masked": None}
    frozen = {**ROW, "stage": "fine-tuning", "zeros": 0.95, "flips": 0, **unscored}
    rows = [ROW, {**ROW, **unscored}, frozen, {**frozen, "psnr": 30.5}]
    lines = displayed(120, rows)
    assert ["31.23 dB masked" in line for line in lines] == [True, True, True, False]
    assert lines[3].endswith("30.50 dB zeros 95 % loss 0.0123 frozen")


def test_a_line_of_the_log_in_either_stage():
    def line(scores, **changes):
        return progress.format_row({**ROW, "psnr": None, "psnr_masked": None, **scores, **changes})

    both = {"psnr": 29.876, "psnr_masked": 31.234}
    for scores, text in (
        (both, "PSNR 31.23 dB masked, 29.88 dB soft  "),
        ({"psnr_masked": 31.234}, "PSNR 31.23 dB masked  "),
        ({"psnr": 29.876}, "PSNR 29.88 dB soft  "),  # in a log of an earlier version
        ({}, ""),
    ):
        assert line(scores) == (
            f"pruning  loss 0.01235  {text}selected 95.0 %  zeros 0.0 %  1234 flips/it  0.123 s/it"
        )
    freeze = line({"psnr": 31.234, "psnr_masked": 31.234}, zeros=0.95)
    assert "PSNR 31.23 dB  selected" in freeze
    hard = line({"psnr": 31.234}, stage="fine-tuning", zeros=0.95)
    assert hard == "fine-tuning  loss 0.01235  PSNR 31.23 dB  zeros 95.0 %  0.123 s/it"
    pruning = ("selected", "zeros", "flips", "psnr_masked")
    dense = {k: v for k, v in {**ROW, "psnr": 31.234}.items() if k not in pruning}
    assert progress.format_row({**dense, "stage": "dense"}) == (
        "dense  loss 0.01235  PSNR 31.23 dB  0.123 s/it"
    )


def test_a_text_log_holds_what_was_said_before_it_was_opened(tmp_path, capsys):
    shown = logging.Progress(quiet=True)
    shown.write_line("checked")
    shown.begin(100, 0, tmp_path / "train.log")
    shown.write_line("begun")
    shown.close()
    shown = logging.Progress(quiet=True)
    shown.begin(100, 50, tmp_path / "train.log")
    shown.write_line("resumed")
    lines = (tmp_path / "train.log").read_text().splitlines()
    assert [line[20:] for line in lines] == ["checked", "begun", "resumed"]
    assert all(abs(time.time() - time.mktime(_parsed(line))) < 3600 for line in lines)
    assert capsys.readouterr().out == ""


def _parsed(line):
    return time.strptime(line[:19], "%Y-%m-%d %H:%M:%S")


def test_a_reader_that_ends_does_not_end_the_run(tmp_path):
    """`issp train | head -1`, or a terminal that was closed."""
    code = (
        "from pathlib import Path\nfrom issp.sr.logging import Progress\n"
        "p = Progress()\np.begin(10, 0, Path('train.log'))\n"
        "[p.write_line(f'line {i} ' + 'x' * 9000) for i in range(100)]\nprint('more')\np.close()\n"
        "Path('done').write_text('yes')\n"
    )
    reader, writer = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, cwd=tmp_path,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    os.close(writer)
    assert os.read(reader, 6) == b"line 0"
    os.close(reader)
    _, errors = child.communicate(timeout=120)
    assert (child.returncode, errors) == (0, "")
    assert (tmp_path / "done").exists()
    assert len((tmp_path / "train.log").read_text().splitlines()) == 100
