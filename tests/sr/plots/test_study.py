"""The figure of a study: every seed, means, sparsities told apart by marks, bicubic as a line."""

import pytest

from issp.sr.plots import study
from issp.sr.results import Result

pytest.importorskip("matplotlib", reason="it draws the figure")


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """The figure of two methods, two sparsities, two seeds and two sets."""
    drawn = []
    monkeypatch.setattr(study, "write", lambda figure, path: drawn.append(figure))
    rows = [
        Result("bicubic", "", 2, None, None, name, "y", 28.5, 0.8) for name in ("Set5", "Set14")
    ]
    for name in ("Set5", "Set14"):
        for seed in (0, 1):
            rows += [
                Result("iss-p", "edsr-tiny", 2, 0.9, seed, name, "y", 31.0 + seed, 0.9),
                Result("iss-p", "edsr-tiny", 2, 0.99, seed, name, "y", 29.0 + seed, 0.9),
                Result("dense", "edsr-tiny", 2, 0.0, seed, name, "y", 33.0 + seed, 0.9),
                Result("iss-p", "edsr-tiny", 2, 0.9, seed, name, "rgb", 10.0, 0.9),
            ]
    study.scores(rows, tmp_path / "psnr.png")
    return drawn[0]


def test_every_set_has_an_axis_with_its_seeds_and_their_mean(figure):
    axes = figure.axes
    assert [axis.get_title() for axis in axes] == ["edsr-tiny x2, Set5", "edsr-tiny x2, Set14"]
    assert all(axis.get_xlabel() == "PSNR (Y), dB" for axis in axes)
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["iss-p", "dense"]
    marked = [line for line in axes[0].lines if line.get_linestyle() == "None"]
    points = {(line.get_marker(), tuple(line.get_xdata())) for line in marked}
    assert points == {
        ("o", (31.0, 32.0)),
        ("o", (31.5,)),
        ("s", (29.0, 30.0)),
        ("s", (29.5,)),
        ("|", (33.0, 34.0)),
        ("|", (33.5,)),
    }


def test_bicubic_is_a_line_and_the_legend_names_every_mark(figure):
    (line,) = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert list(line.get_xdata()) == [28.5, 28.5]
    texts = {text.get_text() for text in figure.legends[0].get_texts()}
    assert texts == {
        "mean at 90 % sparsity",
        "mean at 99 % sparsity",
        "mean, dense",
        "bicubic",
    }


def test_without_scores_there_is_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no run has scores yet"):
        study.scores([], tmp_path / "psnr.png")
    assert not list(tmp_path.iterdir())
