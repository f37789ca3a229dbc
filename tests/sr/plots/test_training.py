"""The plots of a run: the freeze where it happened, and no point cut without a mark."""

import math
import tracemalloc

import numpy as np
import pytest

from issp.sr import plots
from issp.sr.plots import drawing

matplotlib = pytest.importorskip("matplotlib", reason="plots are matplotlib's")


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Calls a function of plots and returns its figure, laid out but not written."""
    figures = []
    monkeypatch.setattr(drawing, "write", lambda figure, path: figures.append(figure))

    def draw(function, *args, **options):
        function(*args, tmp_path / "plot.png", **options)
        figures[-1].canvas.draw()
        return figures[-1]

    return draw


def row(iteration, stage="fine-tuning", psnr=None, **values):
    zeros = 0.0 if stage == "pruning" else 0.9
    defaults = {"loss": 0.1, "lr": 1e-3, "flips": 5, "threshold": 0.1, "selected": 0.9}
    return (
        {"iteration": iteration, "stage": stage, "psnr": psnr, "zeros": zeros} | defaults | values
    )


def freeze_lines(figure):
    """Where each panel has its vertical line."""
    found = []
    for axis in figure.axes:
        lines = [line.get_xdata() for line in axis.lines if line.get_linestyle() == "--"]
        found.append([x[0] for x in lines if x[0] == x[-1]])
    return found


def shown(axis, x, y):
    """Whether a point lies within the limits of a panel."""
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    return left <= x <= right and low <= y <= high


def marks(axis):
    """Iterations of the triangles at the edges of a panel."""
    return sorted(
        x for line in axis.lines if line.get_marker() in ("v", "^") for x in line.get_xdata()
    )


def series(iterations, values):
    x, y = np.array(iterations), np.array(values)
    return {"iteration": x, "norm": y, "variance": y}


def test_the_freeze_is_marked_where_it_happened(drawn):
    rows = [row(100, "pruning"), row(200), row(300)]
    assert freeze_lines(drawn(plots.curves, rows, freeze=150)) == [[150]] * 5
    assert freeze_lines(drawn(plots.curves, rows)) == [[100]] * 5  # as far as the rows tell
    # Not before it has happened.
    assert freeze_lines(drawn(plots.curves, rows[:1], freeze=150)) == [[]] * 5
    assert freeze_lines(drawn(plots.curves, rows[:1])) == [[]] * 5
    figure = drawn(plots.gradients, {"a": series([140, 160], [1.0, 1.0])}, rows, freeze=150)
    assert freeze_lines(figure) == [[150]] * 2


def test_loss_and_learning_rate_are_shown(drawn):
    rows = [row(i, lr=1e-3 / i, loss=1 / i) for i in (1, 2, 3)]
    dense = [{k: v for k, v in r.items() if k not in ("flips", "threshold")} for r in rows]
    for given in (rows, dense):
        labels = [axis.get_ylabel() for axis in drawn(plots.curves, given).axes]
        assert labels[:3] == ["PSNR (dB)", "loss", "learning rate"]
    rate = drawn(plots.curves, rows).axes[2].lines[0]
    assert list(rate.get_xdata()) == [1, 2, 3] and list(rate.get_ydata()) == [1e-3, 5e-4, 1e-3 / 3]


def test_every_score_is_shown_or_marked(drawn):
    scores = {1: 8.0, 50: 29.0, 100: 30.0, 150: math.inf, 200: 31.0}
    axis = drawn(plots.curves, [row(i, psnr=y) for i, y in scores.items()]).axes[0]
    hidden = [i for i, y in scores.items() if not shown(axis, i, y)]
    assert hidden == [1, 150] and marks(axis) == [1, 150]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert "1 below: down to 8" in labels and "1 above: up to inf" in labels
    plain = drawn(plots.curves, [row(i, psnr=30 + i / 100) for i in (1, 2)]).axes[0]
    assert marks(plain) == []


def points(axis, label):
    """Iteration -> value of the line with that beginning of its label."""
    (line,) = [x for x in axis.lines if str(x.get_label()).startswith(label)]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True)), line


def test_the_curve_is_the_masked_models_and_the_soft_one_stands_beside(drawn):
    rows = [
        row(100, "pruning", psnr=29.0, psnr_masked=31.0),
        row(200, "pruning", psnr_masked=31.5),  # val.soft: false
        row(300, "pruning", psnr=31.75, psnr_masked=31.75, zeros=0.9),  # the freeze
        row(350),
        row(400, psnr=32.0),
    ]
    axis = drawn(plots.curves, rows).axes[0]
    sparse, line = points(axis, "sparse model: mask applied")
    assert sparse == {100: 31.0, 200: 31.5, 300: 31.75, 400: 32.0}
    assert line.get_linestyle() == "-" and all(shown(axis, *xy) for xy in sparse.items())
    soft, line = points(axis, "soft model")
    assert soft == {100: 29.0} and line.get_linestyle() == "None" and line.get_marker() == "s"


def test_a_log_of_an_earlier_version_has_soft_scores_alone_before_the_freeze(drawn):
    rows = [row(100, "pruning", psnr=29.0), row(200, "pruning", psnr=30.0, zeros=0.9), row(300)]
    axis = drawn(plots.curves, rows).axes[0]
    assert points(axis, "soft model")[0] == {100: 29.0}
    assert points(axis, "sparse model")[0] == {200: 30.0}


def test_a_layer_without_gradient_is_marked(drawn):
    iterations = [5, 10, 400]
    recorded = {"a": series(iterations, [1.0] * 3), "b": series(iterations, [0.5, 0.0, 0.5])}
    # The rows of gradients go further than the last row of the training log.
    figure = drawn(plots.gradients, recorded, [row(100)])
    for axis in figure.axes:
        assert marks(axis) == [10] and shown(axis, 400, 1.0) and shown(axis, 5, 0.5)


def test_a_single_row_is_visible(drawn):
    for axis in drawn(plots.curves, [row(7, psnr=30.0)]).axes:
        line = axis.lines[0]
        assert line.get_marker() not in ("None", None, "") and shown(axis, 7, line.get_ydata()[0])


def test_logs_are_read_row_by_row_and_only_what_is_drawn_is_kept(tmp_path):
    """A long run has millions of rows: 1e5 iterations of 100 layers, recorded every 10th."""
    log = tmp_path / "log"
    log.mkdir()
    (log / "train.csv").write_text("iteration,stage,psnr\n9000,pruning,30\n")
    count = 300
    with open(log / "gradients.csv", "w") as file:
        file.write("iteration,stage,layer,norm,variance,mean,deviation\n")
        for i in range(1, count + 1):
            file.writelines(f"{i},pruning,body.{j},{i + j},0.5,0.25,0.125\n" for j in range(20))
    with open(log / "layers.csv", "w") as file:
        file.write("iteration,layer,weights,selected,zeros,flips,threshold\n")
        for i in range(1, count + 1):
            file.writelines(f"{i},body.{j},9,{j % 9},0,3,0.1\n" for j in range(20))
    tracemalloc.start()
    logs = plots.read_logs(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Three numbers of 8 bytes for each row, twice while lists become arrays.
    assert peak < 2.5 * 24 * 20 * count + 65536, "a row as a dict takes 400 bytes"
    assert list(logs.gradients) == [f"body.{j}" for j in range(20)]
    assert logs.gradients["body.3"]["norm"][-1] == count + 3
    assert logs.gradients["body.3"].keys() == {"iteration", "norm", "variance"}
    assert [row["selected"] for row in logs.sparsity] == [j % 9 for j in range(20)]
    assert {row["iteration"] for row in logs.sparsity} == {count}


@pytest.mark.parametrize(
    "draw, missing",
    [
        (plots.curves, "the log has no rows yet"),
        (lambda _, path: plots.gradients({}, [], path), "no gradients have been recorded"),
        (plots.layers, "no checkpoint yet"),
    ],
    ids=["curves", "gradients", "layers"],
)
def test_what_has_no_rows_yet_is_named(tmp_path, draw, missing):
    with pytest.raises(ValueError, match=missing):
        draw([], tmp_path / "empty.png")
    assert not (tmp_path / "empty.png").exists()
