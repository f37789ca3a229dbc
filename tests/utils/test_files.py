"""Files are whole or as before; the cache folder is the user's."""

import contextlib
import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from issp.utils import files
from issp.utils.files import append_text, atomic_write, cache_folder, user_path
from tests.utils.disk import full_disk

# Writes half a file, says so, and waits to be killed.
_SLOW_WRITER = """
import runpy, sys, time

def content(file):
    file.write(b"half")
    file.flush()
    print("writing", flush=True)
    time.sleep(600)

# By its path: importing issp would import torch.
runpy.run_path(sys.argv[1])["atomic_write"](sys.argv[2], content)
"""


@contextlib.contextmanager
def slow_writer(path):
    """A process in the middle of writing `path`."""
    command = [sys.executable, "-c", _SLOW_WRITER, files.__file__, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("durable", [True, False])
@pytest.mark.parametrize(
    "content", [b"new", lambda file: file.write(b"new")], ids=["bytes", "call"]
)
def test_a_file_is_written_whole_and_its_folder_made(tmp_path, content, durable):
    path = tmp_path / "a" / "b" / "file"
    atomic_write(path, content, durable)
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("durable", [True, False])
def test_content_and_then_name_are_on_disk_before_the_next_file(tmp_path, monkeypatch, durable):
    """A run removes old states once a new one is written, which a power failure must not undo."""
    fsync, replace, done = os.fsync, os.replace, []

    def record_fsync(descriptor):
        done.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def record_replace(*paths):
        done.append("replace")
        replace(*paths)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    atomic_write(tmp_path / "file", b"new", durable)
    assert done == (["file", "replace", "folder"] if durable else ["replace"])


def test_a_full_disk_leaves_the_old_file_and_names_the_remedy(tmp_path, monkeypatch):
    path = tmp_path / "file"
    atomic_write(path, b"old")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="cannot write .*file: No space left .*; free") as caught:
        atomic_write(path, b"new content")
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_named_whatever_the_writer_makes_of_it(tmp_path, monkeypatch):
    """torch.save turns the error into one about a position in its archive."""

    def like_torch(file):
        try:
            file.write(b"new content")
        except OSError:
            raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904

    full_disk(monkeypatch)
    with pytest.raises(OSError, match="No space left on device, the disk is full; free space"):
        atomic_write(tmp_path / "file", like_torch)
    with pytest.raises(
        OSError, match=r"cannot write .*log\.csv: No space left on device, the disk"
    ):
        append_text(tmp_path / "log.csv", "1,2,3\n")
    monkeypatch.undo()
    append_text(tmp_path / "log.csv", "1,2\n")
    full_disk(monkeypatch)
    with pytest.raises(OSError, match="the disk is full"):
        append_text(tmp_path / "log.csv", "3,4,5,6\n")
    monkeypatch.undo()
    assert (tmp_path / "log.csv").read_text() == "1,2\n"  # whole lines, so that a retry is safe

    def broken(file):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        atomic_write(tmp_path / "file", broken)


def test_a_failing_writer_leaves_nothing(tmp_path):
    def broken(file):
        file.write(b"half")
        raise KeyError("bug")

    with pytest.raises(KeyError):
        atomic_write(tmp_path / "file", broken)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_by_the_next_write_to_its_folder(tmp_path):
    with slow_writer(tmp_path / "1.state") as process:
        process.send_signal(signal.SIGKILL)
    (left,) = tmp_path.iterdir()
    assert left.read_bytes() == b"half"
    atomic_write(tmp_path / "2.state", b"new")
    assert os.listdir(tmp_path) == ["2.state"]


def test_the_file_of_a_living_writer_and_files_of_others_stay(tmp_path):
    others = {".vimrc.tmp", "1.state.123-deadbeef.tmp", ".1.state.123-deadbeef.tmp.bak", "x.tmp"}
    for name in others:
        (tmp_path / name).touch()
    with slow_writer(tmp_path / "1.state"):
        (unfinished,) = set(os.listdir(tmp_path)) - others
        atomic_write(tmp_path / "2.state", b"new")
        assert set(os.listdir(tmp_path)) == {unfinished, "2.state", *others}
        assert (tmp_path / unfinished).read_bytes() == b"half"


def test_a_large_folder_is_looked_through_once(tmp_path, monkeypatch):
    monkeypatch.setattr("issp.utils.files._MANY_ENTRIES", 1)
    abandoned = tmp_path / ".file.123-deadbeef.tmp"
    for number in range(3):
        abandoned.touch()
        atomic_write(tmp_path / f"{number}", b"")
        assert abandoned.exists() == (number == 2)


def test_a_folder_that_cannot_be_listed_is_written_to(tmp_path, monkeypatch):
    def refuse(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "listdir", refuse)
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_file_that_was_tidied_up_before_its_lock_is_begun_again(tmp_path, monkeypatch):
    lock, calls = files.lock, []

    def removed_first(descriptor):
        calls.append(descriptor)
        if len(calls) == 1:
            (unfinished,) = tmp_path.iterdir()
            unfinished.unlink()
        return lock(descriptor)

    monkeypatch.setattr(files, "lock", removed_first)
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new" and len(calls) == 2
    assert os.listdir(tmp_path) == ["file"]


# Adds 1 to the number in a file, many times.
_COUNTER = """
import pathlib, runpy, sys

files = runpy.run_path(sys.argv[1])
path = pathlib.Path(sys.argv[2])
for _ in range(40):
    with files["exclusive"](path):
        number = int(path.read_text()) if path.exists() else 0
        files["atomic_write"](path, str(number + 1).encode(), durable=False)
"""


def test_no_change_of_a_file_by_several_processes_is_lost(tmp_path):
    path = tmp_path / "number"
    command = [sys.executable, "-c", _COUNTER, files.__file__, str(path)]
    processes = [subprocess.Popen(command) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4
    assert path.read_text() == "160"
    assert list(tmp_path.iterdir()) == [path]


def test_what_a_killed_holder_of_a_lock_left_is_used_again(tmp_path):
    (tmp_path / ".number.lock").touch()
    with pytest.raises(ZeroDivisionError), files.exclusive(tmp_path / "number"):
        assert (tmp_path / ".number.lock").exists()
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_a_folder_a_device_and_a_pipe_are_not_replaced(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("absent")
    for path, kind in (
        (tmp_path / "link", "a link to nothing"),
        (tmp_path / "folder", "a folder"),
        (tmp_path / "pipe", "a device or a pipe"),
        (Path(os.devnull), "a device or a pipe"),
    ):
        for refuse in (files.check_file, lambda path: atomic_write(path, b"new")):
            with pytest.raises(OSError, match=f"^cannot write {path}: it is {kind}; name a file$"):
                refuse(path)
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link", "pipe"]


def test_a_link_stays_and_the_file_behind_it_is_written(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("old")
    (tmp_path / "link").symlink_to(Path("other", "file"))
    atomic_write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "other" / "file").read_text() == "new"
    assert len(list(tmp_path.iterdir())) == 2 and len(list((tmp_path / "other").iterdir())) == 1


def test_a_file_that_could_not_be_written_is_named_before(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write into .*file/below: .*file is a file; choose"):
        files.check_file(tmp_path / "file" / "below" / "new")
    files.check_file(tmp_path / "a" / "b" / "new")
    files.check_file(tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_cache_folder_is_the_given_one_or_the_users(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("ISSP_CACHE", "~/mine")
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("ISSP_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/x")
    assert cache_folder() == tmp_path / "x" / "issp"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path(tmp_path, ".cache", "issp")


def test_a_tilde_in_front_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_path("~/a b") == tmp_path / "a b" and user_path("~") == tmp_path
    assert user_path("a/~/b") == Path("a/~/b") and user_path("/~/b") == Path("/~/b")
    assert user_path("~backup~.png") == Path("~backup~.png")  # no user of that name
    atomic_write("~/made/file", b"new")
    assert (tmp_path / "made" / "file").read_bytes() == b"new"


@pytest.mark.parametrize("name", ["a" * 255, "\u6771" * 85, "\u00e9" * 127 + "x"])
def test_the_longest_name_that_a_file_may_have(tmp_path, name):
    for content in (b"old", b"new"):
        atomic_write(tmp_path / name, content)
    assert (tmp_path / name).read_bytes() == b"new" and os.listdir(tmp_path) == [name]
