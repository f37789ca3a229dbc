"""`python -m bench record`: its table, and its refusal of wrong values."""

import pytest
import torch

import bench
import issp
from bench import record
from tests.bench.test_accuracy import cells

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    def build(name, scale):
        torch.manual_seed(0)
        return issp.models.EDSR(3, 3, num_feat=4, num_block=1, upscale=2)

    monkeypatch.setattr(record.models, "build", build)
    monkeypatch.setattr(record, "_SETTLE", 2)


WORDS = ["--scale", "2", "--batch", "1", "--patch", "8", "--seconds", "0.2"]


def test_the_table_has_each_recorder_beside_an_iteration_without(tiny, capsys, tmp_path):
    out = tmp_path / "record.md"
    assert bench.main(["record", *WORDS, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert out.read_text() in shown and "6 layers" in shown
    header, _, *rows = cells(shown)
    assert header[:3] == ["recorded", "iteration ms", "over without"]
    assert [row[0] for row in rows] == list(record.VARIANTS)
    assert rows[0][2] == "1" and rows[0][4:6] == ["-", "-"]
    for row in rows[1:]:
        assert float(row[1]) > 0 and float(row[4]) > 0 and row[5].endswith("%")
    assert len({row[-1] for row in rows}) == 1 and int(rows[0][-1]) >= 3


def test_a_wrong_value_ends_the_run_without_a_figure(tiny, capsys, monkeypatch):
    statistics = torch.ops.issp.magnitude_statistics
    monkeypatch.setattr(
        issp.ops, "magnitude_statistics", lambda tensors: statistics(tensors) * (1 + 1e-6)
    )
    assert bench.main(["record", *WORDS]) == 1
    shown = capsys.readouterr()
    assert "norm of conv_first is" in shown.err and "|" not in shown.out


def test_a_picture_is_refused(tiny, capsys, tmp_path):
    assert bench.main(["record", "--plot", str(tmp_path / "a.png")]) == 2
    assert "has no picture" in capsys.readouterr().err
