"""`python -m bench overhead`: its table, and a worker that ends."""

from bench import main, overhead
from tests.bench.test_accuracy import cells


def test_the_table_has_a_row_per_case(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "CASES", [overhead.CASES[0], overhead.CASES[4]])
    out = tmp_path / "overhead.md"
    assert main(["overhead", "--tensors", "3", "--rounds", "2", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert out.read_text() in shown
    _, _, *rows = cells(shown)
    names = [f"{name}, {stage}" for name, stage in overhead.CASES]
    assert [row[0] for row in rows] == names
    for name, *_, calls in rows:
        functions, builtins = map(int, calls.split(" + "))
        if not name.startswith(("torch", "versions")):
            assert 50 < functions < 250 and 10 < builtins < 250, name


def test_a_worker_that_ends_is_named(capsys, monkeypatch):
    monkeypatch.setattr(overhead, "CASES", [("no such optimizer", "frozen")])
    assert main(["overhead", "--tensors", "3", "--rounds", "2"]) == 1
    assert "a worker ended" in capsys.readouterr().err
