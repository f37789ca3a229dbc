"""`issp plot` of logs that somebody has changed: one sentence, no picture."""

import pytest

from issp import cli

pytest.importorskip("matplotlib", reason="the pictures need matplotlib")
pytest.importorskip("yaml", reason="runs keep their configuration as YAML")

TRAIN = "iteration,stage,lr,loss,psnr,flips,selected,zeros\n2,pruning,1,0.5,30,1,0.5,0\n"
LAYERS = "iteration,layer,weights,selected,zeros\n"
GRADIENTS = "iteration,layer,norm,variance\n"
LOGS = {
    "no stage": ({"train": "iteration,psnr\n1,30\n"}, "train.csv has no column stage"),
    "text": (
        {"train": TRAIN + "4,pruning,1,x,30,1,0.5,0\n"},
        "train.csv is damaged: loss at iteration 4 is 'x', no number; remove that row",
    ),
    "layers, no column": ({"layers": "iteration,layer\n1,a\n"}, "layers.csv has no column weights"),
    "layers, text": ({"layers": LAYERS + "1,a,9,x,1\n"}, "selected of a at iteration 1 is 'x'"),
    "gradients, no layer": ({"gradients": "iteration,norm\n1,1\n"}, "has no column layer"),
    "gradients, empty": ({"gradients": GRADIENTS + "1,a,,1\n"}, "norm of a at iteration 1 is None"),
    "no rows": ({"train": TRAIN.splitlines()[0]}, "the log has no rows yet"),
    "another file": ({"train": "name,value\n1,2\n"}, "train.csv is not a log of `issp train`"),
}


def write_logs(folder, logs):
    (folder / "log").mkdir()
    for name, text in ({"train": TRAIN} | logs).items():
        (folder / "log" / f"{name}.csv").write_text(text)


@pytest.mark.parametrize("freeze", ["soon", "[1]", "2.5"])
def test_a_freeze_that_is_no_iteration_is_named(tmp_path, capsys, freeze):
    write_logs(tmp_path, {})
    (tmp_path / "config.yml").write_text(f"sparsity: {{freeze_iter: {freeze}}}\n")
    assert cli.main(["plot", str(tmp_path)]) == 2
    assert "config.yml: sparsity.freeze_iter is " in capsys.readouterr().err
    assert not (tmp_path / "visualization").exists()


@pytest.mark.parametrize("name", LOGS)
def test_a_damaged_log_is_named(tmp_path, capsys, name):
    logs, sentence = LOGS[name]
    write_logs(tmp_path, logs)
    assert cli.main(["plot", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("issp plot: error: ") and error.count("\n") == 1 and sentence in error
    assert not (tmp_path / "visualization").exists()


def test_logs_of_empty_layers_are_drawn(tmp_path):
    write_logs(tmp_path, {"layers": LAYERS + "1,a,0,0,0\n", "gradients": GRADIENTS + "1,a,1,1\n"})
    assert cli.main(["plot", str(tmp_path)]) == 0
