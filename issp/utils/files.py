"""Files: written whole or not at all, and the user's cache folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def atomic_write(
    path: str | os.PathLike, content: bytes | Callable[[BinaryIO], object], durable: bool = True
) -> None:
    """Writes a file beside its place and moves it there once it is complete.

    Args:
        path: of the file; its folder is made when absent.
        content: the bytes, or a function that writes them to an open file.
        durable: wait until the content is on disk, so that a power failure leaves the old file or
            the new one. False: only other processes are protected.

    Raises:
        OSError: the file cannot be written (full disk, no permission); what was there is intact.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                content(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path}: {error.strerror}; free space or choose a folder"
        ) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def cache_folder() -> Path:
    """`$ISSP_CACHE`, else "issp" in `$XDG_CACHE_HOME` or `~/.cache`; `~` is the home folder."""
    given = os.environ.get("ISSP_CACHE")
    if given:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "issp"
