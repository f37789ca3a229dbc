"""The driver: two stages, exact sparsity, and a resume that leaves no trace in the bits."""

import copy
import os
import signal

import pytest
import torch

from issp import num_pruned
from issp.pruning import recorder
from issp.sr import checkpoint, config, logging, plots
from issp.sr.interrupt import Interrupted
from issp.utils.csv_log import CsvLog
from issp.utils.errors import ConfigError, NonFiniteLossError
from tests.sr.runs import FREEZE, TOTAL, assert_equal, log, run, stop_at

pytest.importorskip("PIL", reason="the training images are files")
pytest.importorskip("safetensors", reason="models are kept as safetensors")

# Timings are the one thing that may differ.
COLUMNS = [name for name in logging.COLUMNS if name not in ("seconds", "update_share")]


@pytest.fixture(scope="module")
def reference():
    return {}


# Stochastic depth draws from torch's generator: its state has to come back as well.
SWINIR = {
    "type": "SwinIR", "img_size": 8, "depths": [2], "embed_dim": 12, "num_heads": [2],
    "window_size": 4, "upsampler": "pixelshuffledirect", "drop_path_rate": 0.5,
}  # fmt: skip
CASES = {
    "iss-p": ({}, (1, FREEZE - 1, FREEZE, FREEZE + 1, TOTAL - 1)),
    "iht": ({"sparsity__method": "iht"}, (FREEZE,)),
    "swinir": ({"network_g": SWINIR}, (FREEZE - 2, FREEZE + 3)),
}


@pytest.mark.parametrize("case, stop", [(c, s) for c, (_, stops) in CASES.items() for s in stops])
def test_interrupted_equals_uninterrupted(tree, monkeypatch, stop, case, reference):
    changes = CASES[case][0]
    if case not in reference:
        whole, folder = run(tree, name="whole", **changes)
        saved = checkpoint.read_state(folder / "training_states" / f"{TOTAL}.state")
        reference[case] = whole.state_dict(), log(folder, *COLUMNS), saved
    weights, rows, saved = reference[case]

    with monkeypatch.context() as patch:
        stop_at(patch, stop)
        with pytest.raises(Interrupted) as stopped:
            run(tree, **changes)
    assert stopped.value.iteration == stop and stopped.value.status == 130
    resumed, folder = run(tree, resume=True, **changes)

    for name, value in weights.items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert log(folder, *COLUMNS) == rows
    again = checkpoint.read_state(folder / "training_states" / f"{TOTAL}.state")
    assert_equal(again, saved)


def test_a_signal_during_logging_still_saves(tree, monkeypatch):
    show_row = logging.Progress.show_row

    def show_row_and_signal(self, row):
        show_row(self, row)
        if row["iteration"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(logging.Progress, "show_row", show_row_and_signal)
    with pytest.raises(Interrupted) as stopped:
        run(tree)
    states = config.parse(tree).folder / "training_states"
    assert [f.name for f in states.iterdir()] == [f"{stopped.value.iteration}.state"]
    assert stopped.value.iteration == 5


def test_the_result_is_exactly_sparse_and_so_is_its_average(tree):
    average, folder = run(tree)
    state = checkpoint.read_state(folder / "training_states" / f"{TOTAL}.state")
    for name, value in average.state_dict().items():
        if name.endswith("weight"):
            zeros = value == 0
            assert int(zeros.sum()) == num_pruned(value.numel(), 0.8), name
            assert torch.equal(zeros, state["model"][name] == 0), name
    latest = checkpoint.load(folder / "models" / "net_g_latest.safetensors")
    assert all(
        torch.equal(a, b) for a, b in zip(latest.parameters(), average.parameters(), strict=True)
    )


def test_stages_rates_and_scores_in_the_log(tree):
    _, folder = run(tree)
    rows = logging.read_csv(folder / "log" / "train.csv")
    assert [r["iteration"] for r in rows] == [2, 3, 4, 6, 8, 9, 10, 12]
    for r in rows:
        pruning = r["iteration"] <= FREEZE
        assert r["stage"] == ("pruning" if pruning else "fine-tuning")
        done = r["iteration"] - FREEZE - 1
        assert r["lr"] == 1e-3 * 0.5 ** sum(done >= m for m in (2, 4))
        assert (r["psnr"] is not None) == (r["iteration"] % 3 == 0)
        assert r["selected"] == pytest.approx(0.8, abs=0.01)
        # The freeze, at the end of iteration 6, writes the zeros: soft before, hard after.
        assert (r["zeros"] == r["selected"]) == (r["iteration"] >= FREEZE)
        assert 0 < r["update_share"] < 1 and r["seconds"] > 0
        assert r["threshold"] > 0
    assert (
        len(logging.read_csv(folder / "log" / "layers.csv")) == 5 + 1
    )  # 5 convs and the upsampler


def test_the_best_model_is_never_a_soft_one(tree, monkeypatch):
    from issp.sr import evaluate

    # Before the first iteration, then iterations 3 (masked, soft), 6 (frozen), 9, 12.
    scores = iter([0.0, 99.0, 98.0, 20.0, 30.0, 25.0])

    def fake(*args, **kwargs):
        value = next(scores)
        return [evaluate.Score("x", value, None)]

    monkeypatch.setattr(evaluate, "evaluate", fake)
    _, folder = run(tree)
    _, metadata = checkpoint.read_tensors(folder / "models" / "net_g_best.safetensors")
    assert (metadata["psnr"], metadata["iteration"], metadata["stage"]) == (30.0, 9, "fine-tuning")
    assert metadata["training"] == {"seed": 3, "method": "iss-p", "ratio": 0.8}


def test_dense_training_learns(tree):
    del tree["sparsity"]
    model, folder = run(
        tree, train__total_iter=60, train__ema_decay=0, train__scheduler={}, val__val_freq=60,
        logger__print_freq=10,
    )  # fmt: skip
    losses = [loss for (loss,) in log(folder, "loss")]
    assert losses[-1] < 0.7 * losses[0]
    assert checkpoint.sparsity(model)["zeros"] == 0
    rows = logging.read_csv(folder / "log" / "train.csv")
    assert {r["stage"] for r in rows} == {"dense"} and rows[0]["flips"] is None


RECORDED = {
    "logger__grad_stats_freq": 5,
    "logger__mask_stats_freq": 1,
    "logger__mask_stats_layers": [1, "body.0"],
}


def test_the_driver_records_when_asked_and_resumes(tree, monkeypatch):
    _, plain = run(tree, name="plain")
    names = ("gradients.csv", "masks.csv")
    assert not any((plain / "log" / name).exists() for name in names)
    _, whole = run(tree, name="whole", **RECORDED)
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Interrupted):
            run(tree, **RECORDED)
    _, resumed = run(tree, resume=True, **RECORDED)
    for name in names:
        assert (resumed / "log" / name).read_bytes() == (whole / "log" / name).read_bytes()
    rows = logging.read_csv(whole / "log" / "gradients.csv")
    stages = {(row["iteration"], row["stage"]) for row in rows}
    assert stages == {(5, "pruning"), (10, "fine-tuning")}
    assert len(rows) == 2 * 6 and all(row["norm"] > 0 for row in rows)
    masks = logging.read_csv(whole / "log" / "masks.csv")
    layers = ["conv_first", "body.0.conv1", "body.0.conv2"]
    expected = [(i, name) for i in range(1, TOTAL + 1) for name in layers]
    assert [(row["iteration"], row["layer"]) for row in masks] == expected
    assert [row["zeros"] > 0 for row in masks] == [row["iteration"] >= FREEZE for row in masks]
    assert all(row["flips"] > 0 for row in masks[:3])  # the first selection, from all kept
    assert not any(row["flips"] for row in masks if row["iteration"] > FREEZE)


def test_a_record_that_cannot_be_written_costs_neither_rows_nor_the_validation(tree, monkeypatch):
    _, whole = run(tree, name="whole", **RECORDED)
    monkeypatch.setattr(recorder, "_BLOCK", 1)
    add_cells, calls = CsvLog.add_cells, []

    def fail_once(self, rows):
        calls.append(self.path.name)
        if calls.count("masks.csv") == 3 and calls[-1] == "masks.csv":  # of iteration 3, scored
            raise OSError("no space")
        add_cells(self, rows)

    monkeypatch.setattr(CsvLog, "add_cells", fail_once)
    with pytest.raises(OSError, match="no space"):
        run(tree, **RECORDED)
    states = config.parse(tree).folder / "training_states"
    assert [f.name for f in states.iterdir()] == ["3.state"]
    _, folder = run(tree, resume=True, **RECORDED)
    for name in ("gradients.csv", "masks.csv", "validation.csv"):
        assert (folder / "log" / name).read_bytes() == (whole / "log" / name).read_bytes()
    assert log(folder, *COLUMNS) == log(whole, *COLUMNS)


@pytest.mark.parametrize("method", ["iss-p", "l1", "srp"])
def test_records_and_log_agree_on_the_stage(tree, monkeypatch, method):
    every = {"logger__grad_stats_freq": 1, "logger__grad_stats_layers": 1, "logger__print_freq": 1}
    with monkeypatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Interrupted):
            run(tree, sparsity__method=method, **every)
    _, folder = run(tree, resume=True, sparsity__method=method, **every)
    rows = logging.read_csv(folder / "log" / "gradients.csv")
    stages = [[row["iteration"], row["stage"]] for row in rows]
    assert stages == log(folder, "iteration", "stage")
    assert [stage for _, stage in stages] == ["pruning"] * FREEZE + ["fine-tuning"] * FREEZE


def test_a_dense_run_records_its_gradients(tree):
    dense = {key: value for key, value in tree.items() if key != "sparsity"}
    _, folder = run(
        dense, logger__grad_stats_freq=6, logger__grad_stats_layers=0, logger__layer_index_base=0
    )
    rows = logging.read_csv(folder / "log" / "gradients.csv")
    cells = [(row["iteration"], row["stage"], row["layer"]) for row in rows]
    assert cells == [(6, "dense", "conv_first"), (12, "dense", "conv_first")]


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"logger__mask_stats_layers": [9]}, "logger.mask_stats_layers: there is no layer 9"),
        ({"logger__mask_stats_layers": "tail"}, 'mask_stats_layers: "tail" matches no module'),
        ({"logger__mask_stats_layers": [1.5]}, "it must be a name pattern or the number"),
        ({"logger__mask_stats_freq": 0}, "records nothing of them: set mask_stats_freq"),
        ({"logger__layer_index_base": 2}, "layer_index_base is 2"),
        ({"sparsity": None}, "mask_stats_freq records masks: add a sparsity section"),
    ],
)
def test_what_cannot_be_recorded_is_refused_before_anything_is_written(tree, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        run(tree, **{**RECORDED, **changes})
    assert not config.parse(tree).folder.exists()


def test_the_plot_shows_gradients_where_they_are(tree):
    pytest.importorskip("matplotlib", reason="plots are matplotlib's")
    _, folder = run(tree, logger__grad_stats_freq=2)
    pictures = plots.draw_logs(plots.read_logs(folder))
    assert [p.name for p in pictures] == ["curves.png", "layers.png", "gradients.png"]
    (folder / "log" / "gradients.csv").unlink()
    pictures[-1].unlink()
    assert "gradients.png" not in [p.name for p in plots.draw_logs(plots.read_logs(folder))]
    assert not pictures[-1].exists()


def test_an_earlier_run_is_moved_aside_and_states_are_few(tree):
    small = {"train__total_iter": 6, "logger__save_checkpoint_freq": 2, "val__val_freq": 50}
    _, folder = run(tree, **small)
    assert sorted(f.name for f in (folder / "training_states").iterdir()) == ["4.state", "6.state"]
    assert (folder / "models" / "net_g_2.safetensors").is_file()
    assert (folder / "config.yml").is_file() and (folder / "log" / "environment.json").is_file()
    run(tree, **small)
    archived = [f for f in folder.parent.iterdir() if f.name.startswith("run_archived_")]
    assert len(archived) == 1 and (archived[0] / "models" / "net_g_2.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_the_run(tree):
    with pytest.raises(NonFiniteLossError, match="learning rate"):
        run(tree, train__optim_g={"lr": 1e30}, val__val_freq=50)


def test_a_damaged_or_unfitting_state_is_named(tree):
    _, folder = run(tree, train__total_iter=7)
    state = folder / "training_states" / "7.state"
    with pytest.raises(ValueError, match=r"cannot resume from .*7\.state"):
        run(tree, resume=True, network_g={"type": "EDSR", "num_feat": 12, "num_block": 1})
    with pytest.raises(ValueError, match=r"7\.state: .*`sparsity`"):
        dense = {k: v for k, v in tree.items() if k != "sparsity"}
        run(dense, resume=True)
    saved = torch.load(state, weights_only=True)
    for entry, value, problem in [
        ("exp_avg", torch.zeros(3, 30, 3, 3), r"exp_avg in the optimizer's state .* has shape"),
        ("step", None, r"the optimizer's state of parameter 0 lacks step"),
    ]:
        parts = {**saved, "optimizer": copy.deepcopy(saved["optimizer"])}
        parts["optimizer"]["state"][0][entry] = value
        torch.save(parts, state)
        with pytest.raises(ValueError, match=rf"cannot resume from .*7\.state: {problem}"):
            run(tree, resume=True, train__total_iter=9)
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"7\.state is damaged or cut short"):
        run(tree, resume=True)
    state.unlink()
    with pytest.raises(FileNotFoundError, match="without --resume"):
        run(tree, resume=True)


def test_csv_rows_after_the_resumed_iteration_are_dropped(tmp_path):
    file = tmp_path / "a.csv"
    table = logging.CsvLog(file, ("iteration", "loss"))
    for i in (1, 2, 3):
        table.add({"iteration": i, "loss": 0.1 * i})
    file.write_text(file.read_text() + "4")  # a crash in the middle of a row
    logging.CsvLog(file, ("iteration", "loss"), upto=2).add({"iteration": 3})
    rows = logging.read_csv(file)
    assert rows == [
        {"iteration": 1, "loss": 0.1},
        {"iteration": 2, "loss": 0.2},
        {"iteration": 3, "loss": None},
    ]


FLUSHING = """
import threading
import torch
import issp
from issp.utils import denormals

torch.set_num_threads(2)
assert torch.tensor(1e-30) * 1e-10 != 0, "import issp must leave the float mode alone"
seen = []

def work():  # in a thread that ends with its own workers
    if LATE:
        seen.append(denormals.mode())
    seen.append(denormals.flush_denormals())
    seen.append(denormals.mode())

thread = threading.Thread(target=work)
thread.start()
thread.join()
assert torch.tensor(1e-30) * 1e-10 != 0
print(seen)
"""


@pytest.mark.parametrize("late", [False, True])
def test_denormals_are_flushed_in_all_threads_if_set_early(fresh_python, late):
    done = fresh_python.run(FLUSHING.replace("LATE", str(late)))
    assert done.returncode == 0, done.stderr
    expected = ["kept", False, "mixed"] if late else [True, "flushed to zero"]
    assert done.stdout == f"{expected}\n"
