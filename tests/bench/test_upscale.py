"""`python -m bench upscale`: its rows, its check of the results, and the photograph."""

import numpy as np
import pytest

import bench
from bench import upscale
from issp import data

pytest.importorskip("PIL", reason="the command reads and writes images")
pytest.importorskip("safetensors", reason="models are kept as safetensors")


@pytest.fixture(autouse=True)
def photographs(monkeypatch):
    y, x = np.mgrid[:300, :280]
    image = np.stack([np.sin(x * y / 300 + c) * 90 + 128 for c in range(3)], axis=2)
    pictures = {"a": image.astype(np.uint8), "b": image.astype(np.uint8)[::-1]}
    monkeypatch.setattr(data, "sample_photographs", lambda split: pictures)


def test_the_photograph_has_the_size_that_is_asked_for():
    assert upscale.photograph(300, 700).shape == (300, 700, 3)
    assert upscale.photograph(20, 30).shape == (20, 30, 3)


def test_every_way_has_a_row(tmp_path, capsys):
    out = tmp_path / "table.md"
    words = ["--size", "40x50", "--rounds", "1", "--threads", "1", "--before", str(upscale.ROOT)]
    assert bench.main(["upscale", *words, "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert shown.strip() == out.read_text().strip()
    rows = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    ways = ["as it is", "--dense", "--dense --tile 256", "before: --tile 256"]
    assert [row for row in rows if row in ways] == ways


def test_results_that_differ_end_it_without_a_number(tmp_path, capsys, monkeypatch):
    for i, level in enumerate((100, 103)):
        image = np.full((8, 8, 3), level, np.uint8)
        data.write_image(tmp_path / str(i) / "photo_x2.png", image)
    with pytest.raises(upscale.ParityError, match="100 % of the samples"):
        upscale._compare(tmp_path, ["as it is", "--dense"])
