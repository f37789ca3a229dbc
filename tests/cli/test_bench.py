"""`issp bench`: forwards to the checkout it belongs to, and elsewhere says where to find them."""

import subprocess
import sys

import issp.cli.bench
from issp.cli import main


def test_forwards_to_this_checkout_from_any_folder(tmp_path):
    (tmp_path / "bench.py").write_text("raise SystemExit('not these')")
    command = [sys.executable, "-m", "issp", "bench", "nope"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'nope'" in done.stderr and "python -m bench" in done.stderr


def test_without_a_checkout_it_says_where_to_find_them(monkeypatch, tmp_path, capsys):
    installed = tmp_path / "site-packages" / "issp" / "cli" / "bench.py"
    monkeypatch.setattr(issp.cli.bench, "__file__", str(installed))
    assert main(["bench", "step"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "issp bench: error: the benchmarks are not part of the installed package"
    )
    assert "clone the repository and run `python -m bench` there" in line
