"""`python -m bench tiles`: its rows, and its check of the results."""

from __future__ import annotations

import torch

import bench
import issp
from bench import tiles

SMALL = tiles.Layer(8, 20, 3, 6, {0.9: 4.5})


def test_every_way_has_a_row(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tiles, "LAYERS", (SMALL,))
    out = tmp_path / "tiles.md"
    assert bench.main(["tiles", "--rounds", "2", "--threads", "1", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == out.read_text().strip()
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    ways = [f"tiles v={v}, {s} %" for v in (16, 32) for s in (75, 90, 95, 99)]
    assert [row for row in rows if row in ways] == ways
    assert {"dense float32", "float32 to tiles", "tiles to float32"} < set(rows)
    assert "3x3 8->20, 6x6" in shown and ">= 4.5" in shown


def test_the_mask_has_whole_units():
    mask = tiles.unit_mask(torch.zeros(40, 7, 3, 3), 16, 0.75)
    units = mask[:32, :6].view(2, 16, 3, 2, 3, 3)
    assert torch.equal(units.amax((1, 3)), units.amin((1, 3)))
    assert mask[::16, ::2].sum() == 3 * 4 * 9 / 4


def test_results_that_differ_end_it_without_a_number(monkeypatch, capsys):
    monkeypatch.setattr(tiles, "LAYERS", (SMALL,))
    wrong = issp.ops.tiled_conv2d

    def without_bias(t, w, bias, **more):
        return wrong(t, w, **more)

    monkeypatch.setattr(issp.ops, "tiled_conv2d", without_bias)
    assert bench.main(["tiles", "--rounds", "1"]) == 1
    captured = capsys.readouterr()
    assert "tiles differ from torch" in captured.err and "median" not in captured.out


def test_refused_arguments(capsys):
    assert bench.main(["tiles", "--rounds", "0"]) == 2
    assert "--rounds" in capsys.readouterr().err
