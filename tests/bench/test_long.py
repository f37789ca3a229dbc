"""`python -m bench long`: what it checks, and a run that loses count."""

import issp
from bench import long, main
from tests.bench.test_accuracy import cells


def test_the_table_has_counts_and_memory(capsys, tmp_path):
    out = tmp_path / "long.md"
    assert main(["long", "--steps", "200", "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert out.read_text() in shown
    header, _, *rows = cells(shown)
    assert header[:4] == ["optimizer", "steps", "pruned", "zeros"]
    assert [row[0] for row in rows] == [name for name in long.OPTIMIZERS for _ in range(10)]
    sizes = [m.weight.numel() for m in long.network() if hasattr(m, "weight")]
    full = sum(issp.num_pruned(n, 0.95) for n in sizes)
    for row in rows:
        step = int(row[1])
        assert (int(row[2]) == full) == (step >= 40)
        assert int(row[3]) == (full if step >= 100 else 0)
        assert (row[4] == "-") == (step <= 40)
        assert float(row[5]) > 0


def test_a_lost_count_ends_the_run(capsys, monkeypatch):
    monkeypatch.setattr(issp, "num_pruned", lambda n, ratio: 1)
    assert main(["long", "--steps", "100"]) == 1
    assert "pruned and 0 zeros, not 1" in capsys.readouterr().err


def test_steps_that_cannot_be_logged_are_refused(capsys):
    assert main(["long", "--steps", "150"]) == 2
    assert "use a multiple of 100" in capsys.readouterr().err
