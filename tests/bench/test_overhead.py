"""`python -m bench overhead`: its table, and a worker that ends."""

from bench import main, overhead
from tests.bench.test_accuracy import cells


def test_the_table_has_each_optimizer_in_both_stages(capsys, tmp_path):
    out = tmp_path / "overhead.md"
    assert main(["overhead", "--tensors", "3", "--rounds", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert out.read_text() in shown
    _, _, *rows = cells(shown)
    names = [f"{name}, {stage}" for name in overhead.OPTIMIZERS for stage in overhead.STAGES]
    assert [row[0] for row in rows] == names
    for row in rows:
        functions, builtins = map(int, row[5].split(" + "))
        assert 50 < functions < 250 and builtins > 10


def test_a_worker_that_ends_is_named(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "OPTIMIZERS", {"no such optimizer": None})
    assert main(["overhead", "--tensors", "3", "--rounds", "2"]) == 1
    assert "a worker ended" in capsys.readouterr().err
