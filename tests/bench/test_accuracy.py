"""`python -m bench accuracy`: which rows there are, what each of them trains, and its table."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import bench
from bench import accuracy
from issp import Keep, Unit, data
from issp.sr import builders, demo

pytest.importorskip("yaml", reason="runs keep their configuration as YAML")
pytest.importorskip("safetensors", reason="models are kept as safetensors")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Two small pictures, small crops, and the floating-point mode stays."""
    y, x = np.mgrid[:60, :50]
    image = np.stack([np.sin(x * y / 300 + c) * 90 + 128 for c in range(3)], axis=2)
    photographs = {"a": image.astype(np.uint8), "b": image.astype(np.uint8)[::-1]}
    monkeypatch.setattr(data, "sample_photographs", lambda split: photographs)
    monkeypatch.setattr(demo, "PATCH", 16)
    monkeypatch.setattr(demo, "BATCH", 2)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(*words: str) -> int:
    return bench.main(["accuracy", *words])


def cells(markdown: str) -> list[list[str]]:
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_sparsity_has_its_unstructured_row():
    keeps = [Keep.parse(text) for text in ("3:32", "2:4", "3:32:4")]
    assert [(v.name, v.sparsity, v.keep) for v in accuracy.variants(keeps)] == [
        ("dense", 0.0, None),
        ("unstructured 90.62 %", 0.90625, None),
        ("N:M 3:32 v=1", 0.90625, keeps[0]),
        ("N:M 3:32 v=4", 0.90625, keeps[2]),
        ("unstructured 50 %", 0.5, None),
        ("N:M 2:4 v=1", 0.5, keeps[1]),
    ]


def test_units_stand_behind_the_unstructured_row_of_each_sparsity():
    rows = accuracy.variants([Keep.parse("2:32:16x2")], [Unit(16, 2), Unit(32, 2), Unit(16, 2)])
    assert [(v.name, v.sparsity, v.pattern) for v in rows[1:]] == [
        ("unstructured 93.75 %", 0.9375, None),
        ("units 16x2 93.75 %", 0.9375, Unit(16, 2)),
        ("units 32x2 93.75 %", 0.9375, Unit(32, 2)),
        ("N:M 2:32 v=16 c=2", 0.9375, Keep(2, of=32, v=16, c=2)),
    ]
    study = accuracy.Study(accuracy.variants([Keep.parse("2:4")], [Unit(2, 2)]), 10)
    unit = next(x.variant for x in study.scores if x.variant.unit)
    assert study.settings(unit, 0, Path()).sparsity.unit.v == 2
    assert "--pattern 2:4 --units 2x2 --iters 10" in study._notes()[0]


def test_layers_that_one_pattern_does_not_divide_are_dense_in_all_rows():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 6))
    assert accuracy.stay_dense(model, [Keep(2, of=4)]) == ["0"]
    assert accuracy.stay_dense(model, [Keep(2, of=4), Keep(1, of=4, v=4)]) == ["0", "2"]
    with pytest.raises(ValueError, match=r"no layer is divided by every pattern \(1:5 v=1\)"):
        accuracy.stay_dense(model, [Keep(1, of=5)])


@pytest.mark.full
def test_rows_differ_in_their_pattern_alone(tmp_path):
    rows = accuracy.variants([Keep(3, of=32), Keep(3, of=32, v=4)])
    study = accuracy.Study(rows, 10)
    targets, starts = [], []
    for row in rows[1:]:
        settings = study.settings(row, 7, tmp_path)
        builders.seed_everything(settings.manual_seed)
        model = builders.network(settings)
        pruner = builders.pruner(settings, model, builders.optimizer(settings, model), None)
        starts.append(model.state_dict())
        targets.append({r.name: r.target for r in pruner.summary().rows})
        settings.sparsity.keep = None
        assert settings == study.settings(rows[1], 7, tmp_path)
    assert all(t.keys() == targets[0].keys() and "conv_first" not in t for t in targets)
    assert [set(t.values()) for t in targets] == [{0.90625}, {rows[2].keep}, {rows[3].keep}]
    for start in starts[1:]:
        assert all(torch.equal(start[name], starts[0][name]) for name in start)


@pytest.mark.full
def test_the_table_says_what_was_trained_and_how_to_repeat_it(tmp_path, capsys):
    out = tmp_path / "psnr.md"
    words = ["--pattern", "3:32:4", "3:32:flat", "--iters", "2", "--seeds", "3", "5"]
    words += ["--threads", "1"]
    assert command(*words, "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert shown.out.strip() == out.read_text().strip()
    head, _, *rows = cells(shown.out)
    assert head[:4] == ["what", "kept weights", "PSNR, seed 3", "PSNR, seed 5"]
    names = ["dense", "unstructured 90.62 %", "N:M 3:32 v=4", "N:M 3:32 flat"]
    assert [row[0] for row in rows] == ["bicubic", *names]
    assert [row[1] for row in rows[1:]] == ["195,264", *["19,872"] * 3]
    for row in rows[1:]:
        first, second, mean = map(float, row[2:5])
        assert mean == pytest.approx((first + second) / 2, abs=0.011)
    unstructured, grouped = ([float(x) for x in rows[i][2:4]] for i in (2, 3))
    apart = [b - a for a, b in zip(unstructured, grouped, strict=True)]
    printed = [float(x) for x in re.findall(r"[+-]\d+\.\d+", rows[3][-1])]
    assert printed == pytest.approx([sum(apart) / 2, min(apart), max(apart)], abs=0.021)
    assert f"`python -m bench accuracy {' '.join(words)}` repeats it" in shown.out
    assert "conv_first, conv_last stay dense in all rows" in shown.out
    assert "the mask is frozen at step 1" in shown.out and "channels_last" in shown.out
    assert shown.err.count("\n") == 8 and "seed 5, dense: " in shown.err


@pytest.mark.full
def test_each_seed_that_is_through_is_written(tmp_path, monkeypatch):
    out = tmp_path / "psnr.md"
    right = accuracy.Study.train

    def train(self, seed):
        if seed == 1:
            raise accuracy.Interrupted(1, "issp train nowhere --resume", 130)
        right(self, seed)

    monkeypatch.setattr(accuracy.Study, "train", train)
    with pytest.raises(KeyboardInterrupt):
        command("--pattern", "2:4", "--iters", "1", "--seeds", "0", "1", "--out", str(out))
    assert "PSNR, seed 0" in out.read_text() and "seed 1" not in out.read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--pattern", "2-4"), 'pattern "2-4": write n:of'),
        (("--pattern", "5:4"), "n must lie in 1..of"),
        (("--pattern", "1:7"), "no layer is divided by every pattern"),
        (("--units", "16:2"), 'unit "16:2": write vxc, such as 16x2'),
        (("--iters", "0"), "--iters is 0"),
        (("--threads", "0"), "--threads is 0"),
        (("--out", "/nowhere/psnr.md"), "create /nowhere"),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(words, sentence, capsys):
    assert command(*words) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_default_patterns_suit_the_demos_network():
    study = accuracy.Study(accuracy.variants(list(map(Keep.parse, accuracy.PATTERNS))), 10)
    assert study.dense == ["conv_first", "conv_last"]
