"""Figure 2: flips in the pruning stage, and their means."""

import numpy as np
import pytest

from issp.sr import plots
from tests.sr.plots.conftest import EDSR, MASKS, make_run, masks, write_log

matplotlib = pytest.importorskip("matplotlib", reason="plots are matplotlib's")
pytest.importorskip("yaml", reason="runs keep their configuration as YAML")
LAYERS = ("conv_first", "body.0.conv1", "body.1.conv1", "conv_after_body", "conv_last")


@pytest.fixture
def run(tmp_path):
    """Makes a run with masks.csv; flips is a function of layer and iteration."""

    def make(name, flips=lambda layer, i: 4, layers=LAYERS, iterations=range(1, 41), **options):
        folder = make_run(tmp_path / name, options.pop("network", EDSR), **options)
        write_log(folder / "log" / "masks.csv", MASKS, masks(layers, iterations, flips))
        return folder

    return make


def test_flips_of_the_pruning_stage_without_the_first_selection(run, drawn):
    """The first iteration has no selection before it; after the freeze nothing is selected."""
    flips = {i: 500 if i == 1 else 2 * (i % 5) if i <= 20 else 77 for i in range(1, 41)}
    folders = {
        "ISS-P": run("a", lambda layer, i: flips[i]),
        "IHT": run("b", lambda layer, i: 1 if layer == "conv_first" else 3),
    }
    found = plots.draw_dynamics(folders, "x.png", ["conv_first", "2"])
    first, second, bars = drawn[0].axes
    for axis in (first, second):
        lines = {line.get_label(): line for line in axis.lines}
        assert list(lines["ISS-P"].get_xdata()) == list(range(2, 21))
        assert list(lines["ISS-P"].get_ydata()) == [flips[i] for i in range(2, 21)]
        assert axis.get_ylabel() == "flips per iteration"
        assert axis.get_xlabel() == "iteration of the pruning stage"
    assert set(lines["IHT"].get_ydata()) == {3.0}
    mean = np.mean([flips[i] for i in range(2, 21)])
    assert found[0].layers == {"conv_first": mean, "body.0.conv1": mean}
    assert found[1].layers == {"conv_first": 1.0, "body.0.conv1": 3.0}
    assert found[0].total == pytest.approx(5 * mean, rel=1e-12) and found[1].total == 13.0
    weights = 216 + 576 + 576 + 576 + 216
    assert found[1].share == 13.0 / weights
    assert [bar.get_width() for bar in bars.patches] == [found[0].total, 13.0]
    assert [text.get_text() for text in bars.get_yticklabels()] == ["ISS-P", "IHT"]
    assert f"13 ({1300 / weights:.3g} % of the weights)" in [t.get_text() for t in bars.texts]
    assert "up to 20" in bars.get_xlabel()
    assert len({bar.get_hatch() for bar in bars.patches}) == 2
    assert first.get_title(loc="left") == "conv_first: 1st layer, Conv2d 8x3x3x3"


def test_means_end_where_the_shortest_run_ends(run, drawn):
    early = run("a", lambda layer, i: 2 if i <= 10 else 50)
    late = run("b", lambda layer, i: 6, iterations=range(1, 11))
    found = plots.draw_dynamics({"early": early, "late": late}, "x.png", ["1"])
    assert [activity.layers["conv_first"] for activity in found] == [2.0, 6.0]
    sparse = run("c", iterations=(15, 20))
    with pytest.raises(ValueError, match="sparse recorded conv_first after iteration 10 only"):
        plots.draw_dynamics({"sparse": sparse, "late": late}, "x.png", ["1"])


@pytest.mark.full
def test_the_papers_layers_or_some_over_the_depth(run, drawn):
    found = plots.draw_dynamics({"a": run("a")}, "x.png")
    assert list(found[0].layers) == ["conv_first", "body.0.conv1", "conv_after_body", "conv_last"]
    few = plots.draw_dynamics({"a": run("b", layers=LAYERS[:2])}, "x.png")
    assert list(few[0].layers) == ["conv_first", "body.0.conv1"]
    deep = "{type: EDSR, num_feat: 4, num_block: 40}"
    order = ["conv_first", *(f"body.{i}.conv{j}" for i in range(40) for j in (1, 2)), "conv_last"]
    made = run("c", layers=order, network=deep)
    for base, layers in (
        (1, ["conv_first", "body.0.conv2", "body.17.conv1", "body.39.conv1"]),
        (0, ["body.0.conv1", "body.1.conv1", "body.17.conv2", "body.39.conv2"]),
    ):
        found = plots.draw_dynamics({"a": made}, "x.png", index_base=base)
        assert list(found[0].layers) == layers
    assert "36th layer" in drawn[-1].axes[2].get_title(loc="left")


def test_flips_at_checkpoints_where_masks_were_not_recorded(run, drawn, tmp_path):
    folder = make_run(tmp_path / "a")
    columns = ("iteration", "layer", "weights", "selected", "zeros", "flips", "threshold")
    # A frozen pruner keeps the flips of its last selection.
    rows = [(i, "conv_first", 216, 108, 0, 6, 0.1) for i in (10, 20, 30)]
    write_log(folder / "log" / "layers.csv", columns, rows)
    found = plots.draw_dynamics({"a": folder}, "x.png")
    assert found[0].layers == {"conv_first": 6.0}
    assert list(drawn[0].axes[0].lines[0].get_xdata()) == [10, 20]


@pytest.mark.parametrize(
    "options, said",
    [
        ({"freeze": 0}, "a is a dense run, which has no masks"),
        ({"sparsity": "method: dense, "}, "a is a dense run, which has no masks"),
        ({"iterations": [1]}, "a recorded no flips in its pruning stage: use --set logger.mask_"),
        ({"iterations": [25, 30]}, "a recorded no flips in its pruning stage"),
        ({"iterations": []}, "masks.csv has no rows yet"),
    ],
)
def test_runs_without_flips_are_refused(run, options, said):
    with pytest.raises(ValueError, match=said):
        plots.draw_dynamics({"a": run("a", **options)}, "x.png")


def test_a_run_without_masks_says_how_to_record_them(tmp_path):
    folder = make_run(tmp_path / "a")
    with pytest.raises(FileNotFoundError, match="train it with --set logger.mask_stats_freq=100"):
        plots.draw_dynamics({"a": folder}, "x.png")


def test_nothing_flips(run, drawn):
    found = plots.draw_dynamics({"a": run("a", lambda layer, i: 0)}, "x.png", ["1"])
    assert found[0].total == 0.0
    low, high = drawn[0].axes[0].get_ylim()
    assert low == 0 and high >= 10
