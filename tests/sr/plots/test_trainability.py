"""Figure 1: what its lines, labels and marks are."""

import math

import numpy as np
import pytest

from issp.sr import plots
from issp.sr.plots import drawing
from tests.sr.plots.conftest import EDSR, GRADIENTS, SWINIR, gradients, make_run, write_log

matplotlib = pytest.importorskip("matplotlib", reason="plots are matplotlib's")
pytest.importorskip("yaml", reason="runs keep their configuration as YAML")
LAYERS = ("conv_first", "body.0.conv1", "body.1.conv1")


@pytest.fixture
def run(tmp_path):
    """Makes a run with gradients of some layers; value is a function of layer and iteration."""

    def make(name, network=EDSR, layers=LAYERS, iterations=range(2, 41, 2), **options):
        value = options.pop("value", lambda layer, i: 1.0)
        folder = make_run(tmp_path / name, network, **options)
        rows = gradients(layers, iterations, value)
        write_log(folder / "log" / "gradients.csv", GRADIENTS, rows)
        return folder

    return make


def series(axis):
    """Label -> values of the lines over iterations; without marks and vertical lines."""
    return {
        line.get_label(): line
        for line in axis.lines
        if not line.get_label().startswith("_") and len(line.get_xdata()) > 2
    }


def legend(figure):
    (found,) = figure.legends
    return [text.get_text() for text in found.get_texts()]


def test_lines_are_norm_and_variance_of_every_run(run, drawn):
    folders = {
        "ISS-P": run("a", value=lambda layer, i: 2.0 * i),
        "IHT": run("b", value=lambda layer, i: 3.0 * i),
    }
    chosen = plots.draw_trainability(folders, "x.png", ["conv_first", "body.1.conv1"])
    (figure,) = drawn
    assert chosen == ["conv_first", "body.1.conv1"] and len(figure.axes) == 4
    iterations = np.arange(2, 41, 2)
    for axis, power in zip(figure.axes, (1, 2, 1, 2), strict=True):
        lines = series(axis)
        assert list(lines) == ["ISS-P", "IHT"] and axis.get_yscale() == "log"
        for label, factor in (("ISS-P", 2.0), ("IHT", 3.0)):
            assert np.array_equal(lines[label].get_xdata(), iterations)
            assert np.array_equal(lines[label].get_ydata(), (factor * iterations) ** power)
    labels = ["L2 norm of the gradient", "variance of |gradient|"] * 2
    assert [axis.get_ylabel() for axis in figure.axes] == labels
    assert [axis.get_xlabel() for axis in figure.axes] == ["", "", "iteration", "iteration"]
    titles = [axis.get_title(loc="left") for axis in figure.axes]
    assert titles[0] == "conv_first: 1st layer, Conv2d 8x3x3x3"
    assert titles[2] == "body.1.conv1: 4th layer, Conv2d 8x8x3x3"
    assert legend(figure) == ["ISS-P", "IHT", "mask frozen"]


def test_lines_differ_without_colour(run, drawn):
    folders = {f"run {i}": run(f"r{i}") for i in range(12)}
    plots.draw_trainability(folders, "x.png", ["1"])
    lines = series(drawn[0].axes[0]).values()
    looks = {(str(line.get_linestyle()), line.get_marker()) for line in lines}
    assert len(looks) == 12 and legend(drawn[0])[:12] == list(folders)


def test_the_default_is_a_convolution_and_a_linear_layer(run, drawn):
    layers = (
        "conv_first", "layers.0.residual_group.blocks.0.attn.qkv",
        "layers.0.residual_group.blocks.0.attn.proj", "layers.0.conv", "upsample.0",
    )  # fmt: skip
    a, b = run("a", SWINIR, layers), run("b", SWINIR, layers[:4])
    assert plots.draw_trainability({"a": a, "b": b}, "x.png") == [layers[3], layers[2]]
    assert plots.draw_trainability({"a": a}, "x.png", index_base=0) == [layers[3], layers[2]]
    assert drawn[1].axes[0].get_title(loc="left").startswith("layers.0.conv: 5th layer, Conv2d")
    assert plots.draw_trainability({"c": run("c")}, "x.png") == ["body.0.conv1"]  # none is linear


def freezes(axis):
    return [x[0] for line in axis.lines if len(x := line.get_xdata()) == 2 and x[0] == x[1]]


def test_the_freeze_is_marked_where_it_happened(run, drawn):
    plots.draw_trainability({"a": run("a"), "b": run("b")}, "x.png", ["1"])
    assert [freezes(axis) for axis in drawn[0].axes] == [[20], [20]]
    others = {"a": run("c"), "b": run("d", freeze=30), "c": run("e", freeze=0)}
    plots.draw_trainability(others, "x.png", ["1"])
    assert freezes(drawn[1].axes[0]) == [20, 30]
    names = ["a (frozen at 20)", "b (frozen at 30)", "c", "mask frozen"]
    assert legend(drawn[1]) == names
    plots.draw_trainability({"a": run("f", iterations=range(1, 19))}, "x.png", ["1"])
    assert freezes(drawn[2].axes[0]) == []  # the log has not come that far


def test_zero_and_what_is_not_finite_is_marked(run, drawn):
    odd = {10: 0.0, 20: math.nan, 30: math.inf}
    folder = run("a", value=lambda layer, i: odd.get(i, 1.0 + i))
    plots.draw_trainability({"a": folder}, "x.png", ["1"])
    for axis in drawn[0].axes:
        marks = {
            line.get_marker(): list(line.get_xdata())
            for line in axis.lines
            if line.get_marker() in ("v", "^")
        }
        assert marks == {"v": [10], "^": [20, 30]}
    assert legend(drawn[0])[-1] == "mask frozen"
    assert "zero (at the bottom) or not finite (at the top)" in legend(drawn[0])


def test_many_values_are_averaged_over_a_window_and_stay_behind(run, drawn):
    value = {i: 1.0 + (i % 7) for i in range(1, 91)}
    folder = run("a", iterations=range(1, 91), value=lambda layer, i: value[i])
    plots.draw_trainability({"a": folder}, "x.png", ["1"])
    raw, thick = drawn[0].axes[0].lines[:2]
    assert list(raw.get_ydata()) == list(value.values())
    assert thick.get_ydata()[10] == np.median([value[i] for i in (10, 11, 12)])
    assert thick.get_ydata()[0] == np.median([value[1], value[2]])
    assert drawn[0].legends[0].get_title().get_text().startswith("thick: running median over 1/30")


def test_the_values_of_few_runs_stay_behind(run, drawn):
    folder = run("a", iterations=range(1, 91))
    plots.draw_trainability({f"run {i}": folder for i in range(6)}, "x.png", ["1"])
    axis = drawn[0].axes[0]
    behind = [line for line in axis.lines if line.get_label().startswith("_child")]
    assert len(series(axis)) == 6 and len(behind) == 4 == drawing.MOST_BEHIND


def test_running_averages_leave_nan_out():
    values = np.array([1.0, math.nan, 5.0, math.nan, math.nan, math.nan])
    mean = drawing.running("mean", values, 3)
    assert list(mean[:4]) == [1.0, 3.0, 5.0, 5.0] and np.isnan(mean[4:]).all()
    assert drawing.running("mean", values, 1) is values


def test_names_are_shown_as_they_are(run, drawn):
    names = ["_hidden", "a$b", "a$x$b^{", "n" * 40, "caf\udce9"]
    folders = {name: run(f"r{i}") for i, name in enumerate(names)}
    plots.draw_trainability(folders, "x.png", ["1"])
    shown = [text.replace("\\$", "$").strip() for text in legend(drawn[0])[:5]]
    assert shown == [*names[:4], "caf\\udce9"]
    box = drawn[0].legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= drawn[0].bbox.x1


def test_a_log_without_stage_of_a_folder_without_configuration(run, drawn, tmp_path):
    rows = gradients(["a"], (10, 30))
    write_log(tmp_path / "alone" / "gradients.csv", GRADIENTS, rows)
    with pytest.raises(ValueError, match="a has no config.yml: choose layers with --layers"):
        plots.draw_trainability({"a": tmp_path / "alone"}, "x.png")
    assert plots.draw_trainability({"a": tmp_path / "alone"}, "x.png", ["1"]) == ["a"]
    assert freezes(drawn[0].axes[0]) == [10]


def test_files(run, tmp_path):
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        plots.draw_trainability({"a": run(name)}, tmp_path / "out" / name, ["1"])
        assert (tmp_path / "out" / name).read_bytes().startswith(start)
