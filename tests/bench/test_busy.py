"""`python -m bench busy`: its table, its processes, and a worker that ends."""

import contextlib
import os

import pytest

import bench
from bench import busy
from tests.bench.test_accuracy import cells


def _is_running(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def test_the_table_has_each_call_alone_and_beside_others(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(busy, "SETTINGS", {"one thread": {"OMP_NUM_THREADS": "1"}})
    out = tmp_path / "busy.md"
    words = ["--rounds", "2", "--seconds", "0.01", "--beside", "1", "--out", str(out)]
    assert bench.main(["busy", *words]) == 0
    shown = capsys.readouterr()
    assert "round 2 of 2, beside 1" in shown.err
    assert out.read_text() in shown.out
    header, _, *rows = cells(shown.out)
    assert header == ["threads", "call", "idle ms", "beside 1 ms", "times idle"]
    assert [row[:2] for row in rows] == [["one thread", call] for call in busy.CALLS]
    for *_, idle, beside, times in rows:
        assert float(idle) > 0 and float(times) == pytest.approx(
            float(beside) / float(idle), rel=0.02
        )


def test_busy_processes_end_with_the_measurement(monkeypatch):
    started = []
    monkeypatch.setattr(busy, "_BUSY_LOOP", "import time; time.sleep(60)")
    popen = busy.subprocess.Popen
    monkeypatch.setattr(
        busy.subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1]
    )
    with pytest.raises(KeyboardInterrupt), busy._busy_processes(2):
        assert len(started) == 2 and all(_is_running(p.pid) for p in started)
        raise KeyboardInterrupt
    assert all(process.poll() is not None for process in started)


def test_a_worker_that_ends_is_named(monkeypatch, capsys):
    monkeypatch.setattr(busy, "SETTINGS", {"one thread": {"OMP_NUM_THREADS": "1"}})
    assert bench.main(["busy", "--model", "no-such-model"]) == 1
    assert "a worker ended: run python -m bench busy --worker" in capsys.readouterr().err
