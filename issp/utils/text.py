"""Text that several modules print: markdown tables, suggestions, durations."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence


def suggest(name: object, known: Iterable[str]) -> str:
    """The end of an error sentence: the known name nearest to `name`, or all of them."""
    known = list(known)
    lower = {one.lower(): one for one in reversed(known)}
    close = difflib.get_close_matches(str(name).lower(), lower, n=1, cutoff=0.5)
    return f"did you mean {lower[close[0]]!r}?" if close else f"known: {', '.join(known)}"


def cell(text: str) -> str:
    """Text of a name as one cell of a markdown table: in one line, and `|` does not end it."""
    escaped = {"|": r"\|"}
    return "".join(escaped.get(c, c) if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table whose columns are aligned: the first to the left, others to the right.

    Args:
        header: names of the columns.
        rows: cells, as many as the header has.
    """
    lines = [[cell(entry) for entry in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]

    def text(line: Sequence[str]) -> str:
        cells = [line[0].ljust(widths[0])]
        cells += [entry.rjust(width) for entry, width in zip(line[1:], widths[1:], strict=True)]
        return "| " + " | ".join(cells) + " |"

    dashes = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([text(lines[0]), text(dashes), *map(text, lines[1:])])


def duration(seconds: float) -> str:
    """A time as hours:minutes:seconds."""
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_bytes(text: str) -> int:
    """Bytes that "800M", "1.5G" or "4 GiB" mean; the units are powers of 1024.

    Raises:
        ValueError: it is no such size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if match is None:
        raise ValueError(f"{text!r} is no size: write 800M or 4G")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def byte_text(count: int) -> str:
    """A size as `parse_bytes` takes it, rounded up to three digits or whole MB."""
    if count >= 2**30:
        return f"{math.ceil(count / 2**30 * 100) / 100:.2f}G"
    return f"{math.ceil(count / 2**20)}M"
