"""`python -m bench finetune` and `whole-run`: their tables, checks and refusals."""

import pytest
import torch

from bench import finetune, main, whole_run
from issp.nn.sparse_training import KeptPositions
from tests.bench.test_accuracy import cells
from tests.deploy.networks import timed_fixture  # noqa: F401
from tests.sr.runs import draw_photos

SMALL = ["--model", "edsr-tiny", "--batch", "1", "--patch", "8", "--seconds", "0.01"]


@pytest.mark.full
def test_the_table_has_the_dense_ways_and_every_sparsity(capsys, tmp_path, timed):
    out = tmp_path / "finetune.md"
    assert (
        main(["finetune", *SMALL, "--sparsity", "0.9", "0.97", "--layers", "--out", str(out)]) == 0
    )
    shown = capsys.readouterr().out
    assert out.read_text() in shown
    header, _, *rows = cells(out.read_text())
    assert header[:3] == ["what", "iteration ms", "speed over dense fp32"]
    assert [row[0] for row in rows] == [
        *("dense", "dense channels_last", "dense bf16 autocast"),
        *("accelerated 90 %", "accelerated 97 %"),
    ]
    speeds = [float(row[2]) for row in rows]
    assert 1.0 in speeds[:2] and min(speeds) > 0
    assert [row[-1] for row in rows] == ["-", "-", "-", "20 of 20", "20 of 20"]
    assert shown.count("20 of 20 layers are sparse") == 2


@pytest.mark.full
def test_wrong_gradients_are_not_timed(capsys, timed, monkeypatch):
    gather = KeptPositions.gather
    monkeypatch.setattr(KeptPositions, "gather", lambda self, x: gather(self, x).flip(0))
    assert main(["finetune", *SMALL, "--sparsity", "0.9"]) == 1
    assert "accelerated at 90%: gradients are off by" in capsys.readouterr().err


def test_targets_stand_beside_their_sparsities():
    variants = []
    for name, sparsity, bf16, seconds in (
        ("dense", None, False, 4.0),
        ("dense channels_last", None, False, 3.0),
        ("dense bf16 autocast", None, True, 1.0),
        ("accelerated 95 %", 0.95, False, 1.5),
    ):
        model = torch.nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        variant = finetune.Variant(name, model, optimizer, torch.contiguous_format, bf16, sparsity)
        variant.seconds = [seconds] * 4
        variants.append(variant)
    table = finetune.table("t", "m", variants, finetune.TARGETS["edsr-l"], 4)
    assert [row["speed"] for row in table.rows] == [0.75, 1.0, 3.0, 2.0]
    assert [row["bf16"] for row in table.rows] == [0.25, 1 / 3, 1.0, 1 / 1.5]
    assert [row["must"] for row in table.rows] == [None, None, None, ">= 3.5"]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["finetune", "--batch", "0"], "--batch is 0: use at least 1"),
        (["finetune", "--sparsity", "1.5"], "--sparsity is 1.5: it must lie between 0 and 1"),
        (["whole-run", "--train", "a", "--val", "b", "--iters", "4"], "use at least 5"),
        (["whole-run", "--train", "a", "--val", "b", "--sparsity", "0"], "--sparsity is 0.0"),
    ],
)
def test_wrong_arguments_are_refused_in_one_line(arguments, sentence, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


@pytest.mark.full
def test_whole_runs_stand_beside_the_dense_one(capsys, tmp_path):
    photos, out = draw_photos(tmp_path / "photos"), tmp_path / "whole.md"
    arguments = ["--model", "edsr-tiny", "--batch", "1", "--patch", "8", "--iters", "10"]
    arguments += ["--train", str(photos), "--val", str(photos), "--seeds", "0", "1"]
    assert main(["whole-run", *arguments, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert out.read_text() in shown and shown.count(", seed 1: ") == 3
    header, _, *rows = cells(out.read_text())
    assert header[:3] == ["what", "seconds", "over dense"]
    assert [row[0] for row in rows] == list(whole_run.WAYS)
    assert float(rows[0][2]) == 1.0
    for row in rows:
        scores = [float(x) for x in row[5].split(", ")]
        assert len(scores) == 2 and float(row[4]) == pytest.approx(sum(scores) / 2, abs=2e-3)
    # Fine-tuning sparse ends where masked dense does, but for rounding.
    assert float(rows[2][4]) == pytest.approx(float(rows[1][4]), abs=0.02)
