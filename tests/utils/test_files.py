"""Files are whole or as before; the cache folder is the user's."""

import errno
from pathlib import Path

import pytest

from issp.utils.files import atomic_write, cache_folder
from tests.utils.disk import full_disk


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(
    "content", [b"new", lambda file: file.write(b"new")], ids=["bytes", "call"]
)
def test_a_file_is_written_whole_and_its_folder_made(tmp_path, content, durable):
    path = tmp_path / "a" / "b" / "file"
    atomic_write(path, content, durable)
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_leaves_the_old_file_and_names_the_remedy(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="cannot write .*file: No space left .*; free") as caught:
        atomic_write(path, b"new content")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_failing_writer_leaves_nothing(tmp_path):
    def broken(file):
        file.write(b"half")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        atomic_write(tmp_path / "file", broken)
    assert not list(tmp_path.iterdir())


def test_cache_folder_is_the_given_one_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ISSP_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ISSP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/x")
    assert cache_folder() == tmp_path / "x" / "issp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(tmp_path, ".cache", "issp")
