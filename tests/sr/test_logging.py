"""What a run reports: times, and CSV files across versions."""

import math
import os
import time

import pytest
import torch
from torch import nn

import issp
from issp.sr import logging
from issp.utils import csv_log


@pytest.fixture
def clock(monkeypatch):
    """The driver's clock, moved by hand: the machine's own would count other people's work."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def advance(seconds):
        now[0] += seconds

    return advance


def test_the_timer_counts_the_update_and_a_pruner_that_hooks(clock):
    weight = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([weight], lr=0.1)
    optimizer.register_step_pre_hook(lambda *_: clock(7.0))  # before the timer watches
    optimizer.register_step_post_hook(lambda *_: clock(0.03))  # as the pruner's
    timer = logging.StepTimer(torch.device("cpu"))
    timer.watch(optimizer)
    optimizer.register_step_post_hook(lambda *_: clock(0.5))  # somebody else's
    optimizer.register_step_pre_hook(lambda *_: clock(0.02))  # stands for the update
    for _ in range(2):
        weight.grad = torch.ones(3)
        optimizer.step()
    assert timer.take() == pytest.approx(2 * (0.02 + 0.03))
    assert timer.take() == 0


def test_the_timer_counts_a_pruner_within_the_step(clock, monkeypatch):
    model = nn.Conv2d(4, 4, 3)
    optimizer = issp.optim.SGD(model.parameters(), lr=0.1)
    issp.attach(model, optimizer, sparsity=0.5)
    timer = logging.StepTimer(torch.device("cpu"))
    timer.watch(optimizer)
    launch = optimizer._launch

    def slow(*args):
        clock(0.05)
        launch(*args)

    monkeypatch.setattr(optimizer, "_launch", slow)
    model(torch.ones(1, 4, 3, 3)).sum().backward()
    optimizer.step()
    assert timer.take() == pytest.approx(0.05)


def test_a_log_with_other_columns_goes_on(tmp_path):
    file = tmp_path / "train.csv"
    old = [name if name != "update_share" else "step_share" for name in logging.COLUMNS]
    before = logging.CsvLog(file, tuple(old))
    before.add({"iteration": 2, "stage": "pruning", "loss": 0.5, "step_share": 0.01})
    after = logging.CsvLog(file, logging.COLUMNS, upto=2)
    after.add({"iteration": 4, "stage": "pruning", "loss": 0.4, "update_share": 0.1})
    rows = logging.read_csv(file)
    assert [list(row) for row in rows] == [list(logging.COLUMNS)] * 2
    # Another share than the new one: it does not become it.
    assert [row["update_share"] for row in rows] == [None, 0.1]
    assert [row["loss"] for row in rows] == [0.5, 0.4]


def test_tensorboard_needs_a_folder_of_utf8(tmp_path):
    pytest.importorskip("tensorboard", reason="what is not there cannot refuse a folder")
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    board = logging.TensorBoardLog(folder, 1)
    assert "need a folder whose name is UTF-8" in board.unavailable_reason
    board.add({"iteration": 1, "psnr": 30.0})
    board.close()
    assert not folder.exists()


@pytest.mark.parametrize("content", [b"", b"\n", b"epoch,loss\n1,2\n", b"\xff\xfe\n", None])
def test_what_is_not_a_log_is_named(tmp_path, content):
    path = tmp_path / "train.csv"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"train\.csv( is not a log of `issp train`|: )"):
        logging.read_csv(path)


def test_rows_of_some_columns(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("iteration,layer,norm,std\n1,a,-2,nan\nx,a,3,4\n2,b,5\n3,c,1e-5,\n")
    rows = list(csv_log.iterate_csv(path, ("std", "layer")))
    assert [row["layer"] for row in rows] == ["a", "c"] and rows[1]["std"] is None
    assert rows[0].keys() == {"iteration", "layer", "std"} and math.isnan(rows[0]["std"])
    whole = logging.read_csv(path)
    assert [row["norm"] for row in whole] == [-2, 1e-5] and isinstance(whole[0]["norm"], int)
