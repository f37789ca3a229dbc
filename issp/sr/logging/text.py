"""The text log of a run: what it printed, with the time of each line."""

from __future__ import annotations

import time
from pathlib import Path

from issp.utils.files import append_text


class TextLog:
    """A file that every start of a run appends to; lines before `open` are kept until then."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._waiting: list[str] = []

    def open(self, path: Path) -> None:
        """Writes to this file from now on."""
        self._path = path
        append_text(path, "".join(self._waiting))
        self._waiting.clear()

    def add(self, line: str) -> None:
        """Appends a line."""
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n"
        if self._path is None:
            self._waiting.append(text)
        else:
            append_text(self._path, text)
