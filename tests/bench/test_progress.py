"""Progress of long benchmarks: one line every ten seconds, on stderr."""

from bench.harness import progress


def test_a_line_every_ten_seconds_names_what_begins(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    progress.restart()
    for _ in progress.counted(range(7), "round"):
        now[0] += 4.0
    for _ in progress.counted(["a", "b"], "row"):
        now[0] += 9.0
    shown = capsys.readouterr()
    assert shown.err.splitlines() == ["round 4 of 7", "round 7 of 7", "row 2 of 2"]
    assert shown.out == ""


def test_a_new_benchmark_starts_the_clock_again(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    progress.restart()
    now[0] += 60.0
    progress.restart()
    assert list(progress.counted(range(2), "round")) == [0, 1]
    assert capsys.readouterr().err == ""
