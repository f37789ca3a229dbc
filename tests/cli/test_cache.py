"""`issp cache` shows and removes what this program keeps, and nothing else."""

import numpy as np
import pytest

from issp import cli, data
from issp.cli import cache as cache_command
from issp.nn.autotune import Cache, Choice
from issp.utils.files import lock


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("ISSP_CACHE", str(folder))
    data.write_image(tmp_path / "hr" / "a.png", np.full((40, 40, 3), 7, np.uint8))
    for scale in (2, 4):
        data.PairedFolder(tmp_path / "hr", scale).load(0)
    Cache().put("machine", "layer", Choice("dense", {"dense": 1.0}, {}, "it is alone"))
    (folder / ".choices.json.123-deadbeef.tmp").write_bytes(b"half")
    return folder


def test_cache_is_shown_and_cleared(cache, capsys):
    (cache / "thesis.pdf").write_bytes(b"a user's own")
    (cache / "ab").mkdir(exist_ok=True)
    (cache / "ab" / "holiday.png").write_bytes(b"a user's own")
    assert cli.main(["cache"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{cache} ")
    numbers = [row.split("|")[2].strip() for row in text.splitlines() if row.startswith("|")]
    assert numbers[2:] == ["2", "1", "1"]  # images, choices, unfinished
    assert (cache / "choices.json").is_file()
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed 4 files" in capsys.readouterr().out
    left = [file.relative_to(cache).as_posix() for file in cache.rglob("*") if file.is_file()]
    assert sorted(left) == ["ab/holiday.png", "thesis.pdf"]
    assert [file.name for file in cache.iterdir() if file.is_dir()] == ["ab"]


def test_no_cache_is_an_empty_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ISSP_CACHE", str(tmp_path / "none"))
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed 0 files" in capsys.readouterr().out and not (tmp_path / "none").exists()


def test_a_file_that_is_being_written_stays(cache, capsys):
    written = cache / ".choices.json.7-0badcafe.tmp"
    with open(written, "wb") as file:
        assert lock(file.fileno())
        assert cli.main(["cache", "--clear"]) == 0
    assert [file for file in cache.rglob("*") if file.is_file()] == [written]
    assert "removed 4 files" in capsys.readouterr().out


def test_files_that_another_process_removes_are_no_error(cache, monkeypatch, capsys):
    listed = cache_command._files

    def then_they_go(folder):
        files = listed(folder)
        for file in files:
            file.unlink()
        return files

    monkeypatch.setattr(cache_command, "_files", then_they_go)
    assert cli.main(["cache", "--clear"]) == 0
    assert "removed 0 files" in capsys.readouterr().out
