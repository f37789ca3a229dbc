"""CSV logs that a resumed run cuts back to where it starts."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from issp.utils.files import append_text, atomic_write, user_path


class CsvLog:
    """A CSV file that grows by whole rows and can be cut back to where a resumed run starts.

    Args:
        path: file; made with its header when absent.
        columns: names; the first is the iteration. Columns of an earlier file that are not among
            them are dropped, new ones stay empty in its rows.
        upto: rows of later iterations, and a row cut short by a crash, are dropped.
    """

    def __init__(self, path: Path, columns: tuple[str, ...], upto: int = 0):
        self.path, self.columns = path, columns
        rows = [row for row in read_csv(path) if row[columns[0]] <= upto] if path.exists() else []
        text = _text([columns, *map(self._cells, rows)])
        atomic_write(path, text.encode())

    def add(self, *rows: dict[str, Any]) -> None:
        """Appends rows; absent columns stay empty.

        Raises:
            OSError: the file cannot be written; none of the rows is in it.
        """
        self.add_cells(map(self._cells, rows))

    def add_cells(self, rows: Iterable[Sequence[Any]]) -> None:
        """Appends rows of which each has a value, or None, for every column; errors as `add`."""
        append_text(self.path, _text(rows))

    def _cells(self, row: dict[str, Any]) -> list[Any]:
        return [row.get(column) for column in self.columns]


def _text(rows: Iterable[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a log by column name: numbers where they are numbers, None where empty.

    Raises:
        ValueError: the file cannot be read or is not a log.
    """
    return list(iterate_csv(path))


def iterate_csv(
    path: str | Path, columns: Collection[str] | None = None
) -> Iterator[dict[str, Any]]:
    """The rows of `read_csv` one after the other: a log of layers may be larger than the memory.

    Args:
        path: of the log.
        columns: that are read, beside the iteration; None: all.
    """
    try:
        with open(user_path(path), encoding="utf-8", newline="") as file:
            lines = csv.reader(file)
            header = next(lines, [])
            if header[:1] != ["iteration"]:
                raise ValueError(
                    f"{path} is not a log of `issp train`: the first column is not `iteration`"
                )
            wanted = [i for i, name in enumerate(header) if columns is None or name in columns]
            for line in lines:
                iteration = _value(line[0]) if len(line) == len(header) else None
                if isinstance(iteration, int):
                    yield {"iteration": iteration, **{header[i]: _value(line[i]) for i in wanted}}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot read log {path}: {reason}") from None


def _value(text: str) -> Any:
    try:  # twice as fast as contextlib.suppress, and a log of layers has millions of cells
        return int(text)
    except ValueError:
        pass
    try:
        return float(text)
    except ValueError:
        return text or None
