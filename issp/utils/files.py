"""Files: written whole or not at all, paths as users write them, and the user's cache folder."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # a system without such locks: what a killed process left behind stays
    fcntl = None  # type: ignore[assignment]

# .<name>.<process>-<random>.tmp
_TEMPORARY = re.compile(r"\..+\.\d+-[0-9a-f]{8}\.tmp")
_LONGEST_NAME = 200  # bytes of it in the name of a temporary file; systems allow 255 in all
# A folder of more entries is looked through only once by a process: a cache gets file after file.
_MANY_ENTRIES = 1000
_crowded: set[Path] = set()


def atomic_write(
    path: str | os.PathLike, content: bytes | Callable[[BinaryIO], object], durable: bool = True
) -> None:
    """Writes a file beside its place and moves it there once it is complete.

    Through a link the file behind it is written. What writers that were killed left in the folder
    is removed.

    Args:
        path: of the file; its folder is made when absent.
        content: the bytes, or a function that writes them to an open file.
        durable: wait until the content is on disk, so that a power failure leaves the old file or
            the new one. False: only other processes are protected.

    Raises:
        OSError: the file cannot be written (full disk, no permission, a folder or a device is in
            its place); what was there is intact.
        ValueError: `path` begins with `~` and the home folder is unknown.
    """
    path = user_path(path)
    try:
        _check_replaceable(path)
        path = path.resolve() if path.is_symlink() else path
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        with _temporary_file(path) as (temporary, file):
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(temporary, path)
            if durable:
                _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch.save hides the OSError of a full disk behind an error of its own.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:  # it is a sentence already
            raise
        raise _cannot_write(path, cause) from None


def _check_replaceable(path: Path) -> None:
    """Refuses a folder, and what is not a file, in whose place one would be put."""
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; name a file")
    if path.exists() and not path.is_file():
        raise OSError(f"cannot write {path}: it is a device or a pipe; name a file")
    if path.is_symlink() and not path.exists():
        raise OSError(f"cannot write {path}: it is a link to nothing; name a file")


def _sync_folder(folder: Path) -> None:
    """Waits until the names in a folder are on disk, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def append_text(path: str | os.PathLike, text: str) -> None:
    """Adds text to a file.

    Raises:
        OSError: as `atomic_write`; nothing of the text is in the file.
    """
    place = user_path(path)
    size = os.path.getsize(place) if os.path.exists(place) else 0
    try:
        with open(place, "ab") as file:
            file.write(text.encode(errors="backslashreplace"))  # names of files may not be UTF-8
    except OSError as error:
        with contextlib.suppress(OSError):
            os.truncate(place, size)
        raise _cannot_write(path, error) from None


def _cannot_write(path: str | os.PathLike, error: OSError) -> OSError:
    reason = f"{error.strerror}{', the disk is full' * (error.errno == errno.ENOSPC)}"
    return OSError(error.errno, f"cannot write {path}: {reason}; free space or choose a folder")


@contextlib.contextmanager
def _temporary_file(path: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """An open file beside `path`, locked as long as its writer lives; removed if it is left."""
    # The longest name that a file may have leaves no room for more.
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    while True:
        temporary = path.with_name(f".{name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
        try:
            with open(temporary, "w+b") as file:
                lock(file.fileno())
                if not temporary.exists():
                    continue  # another process tidied up between the two lines above
                yield temporary, file
                return
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of `atomic_write` whose writer is gone."""
    folder = folder.absolute()
    if folder in _crowded:
        return
    try:
        names = os.listdir(folder)
    except OSError:  # writing is allowed, reading is not
        return
    if len(names) > _MANY_ENTRIES:
        _crowded.add(folder)
    for name in filter(_TEMPORARY.fullmatch, names):
        with contextlib.suppress(OSError), open(folder / name, "r+b") as file:
            if lock(file.fileno()):
                (folder / name).unlink(missing_ok=True)


def lock(descriptor: int) -> bool:
    """Locks an open file if no other process has; the system unlocks it when its process ends.

    Args:
        descriptor: of the file.

    Returns:
        False when another process holds the lock, or the file system has none.
    """
    with contextlib.suppress(OSError):
        if fcntl:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    return False


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Waits until no other process is changing a file: its content may be read, then written.

    All who change it have to ask for this. The lock is a file beside it, removed at the end; the
    folder is made when absent. Where the system has no locks nothing is waited for.

    Raises:
        OSError: the folder cannot be written.
    """
    name = os.fsdecode(os.fsencode(path.name)[:_LONGEST_NAME])
    place = path.with_name(f".{name}.lock")
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(place, "w")  # noqa: SIM115
        except OSError as error:
            raise _cannot_write(path, error) from None
        with file:
            if fcntl:
                with contextlib.suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX)
            if not _is_at(place, file.fileno()):
                continue  # who had the lock has removed it: others begin with a new one
            try:
                yield
            finally:
                place.unlink(missing_ok=True)
            return


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether an open file still has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def check_file(path: Path) -> None:
    """Refuses a file that `atomic_write` could not write; makes nothing.

    Raises:
        OSError: a folder or a device is in its place, or `check_folder` refuses its folder.
    """
    _check_replaceable(path)
    check_folder(path.parent)


def check_folder(folder: Path) -> None:
    """Refuses a folder that cannot be made or written; makes nothing.

    Raises:
        OSError: a file or a link to nowhere is in its place, or there is no permission.
    """
    place = folder.absolute()
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir():
        kind = "a link to nothing" if place.is_symlink() else "a file"
        raise NotADirectoryError(f"cannot write into {folder}: {place} is {kind}; choose a folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"cannot write into {folder}: no permission; choose another folder")


def user_path(path: str | os.PathLike) -> Path:
    """A path as a user writes it: `~` in front is the home folder, `~name` that of a user.

    Raises:
        ValueError: it is empty, which Python would take for the working folder; or the home folder
            is unknown (no HOME, and a user without a password entry).
    """
    text = os.path.expanduser(path)
    if not text:
        raise ValueError("the name of a file or folder is empty: write . for the working folder")
    if Path(text).parts[:1] == ("~",):
        raise ValueError(f"{path}: the home folder is unknown; set HOME or write the whole path")
    return Path(text)


def cache_folder() -> Path:
    """`$ISSP_CACHE`, else "issp" in `$XDG_CACHE_HOME` or `~/.cache`; `~` is the home folder.

    Where the home folder is unknown it is a place that cannot be written: whoever keeps something
    there goes on without it, after one warning.
    """
    given = os.environ.get("ISSP_CACHE")
    try:
        if given:
            return user_path(given)
        return user_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "issp"
    except ValueError:
        return Path(os.devnull, "unknown home folder")
