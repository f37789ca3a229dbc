"""The display of a training run: a bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from issp.sr.logging.scores import psnr_parts
from issp.sr.logging.text import TextLog
from issp.utils.text import duration

_BAR_WIDTH, _BAR_NEEDS = 8, 70  # columns


class Progress:
    """A progress bar with ETA on a terminal, plain lines elsewhere, and a text log of the lines.

    A terminal that is closed, or a reader of the output that ends, does not end the run: it goes on
    without a display.

    Args:
        quiet: show nothing.
    """

    def __init__(self, quiet: bool = False):
        self.quiet = quiet
        self.total = self.done = self.first = 0
        self._start = time.perf_counter()
        self._scored: dict[str, Any] = {}
        self._bar: Any = None
        self._log = TextLog()

    def begin(self, total: int, done: int, log: Path) -> None:
        """Starts the display and the text log.

        Args:
            total: iterations of the whole run.
            done: iterations of it that an earlier start did.
            log: file of the text log.
        """
        self.total, self.done, self.first = total, done, done
        self._start = time.perf_counter()
        self._log.open(log)
        if not self.quiet and sys.stdout is not None and sys.stdout.isatty():
            with self._while_shown():
                self._bar = rich_bar(total, done)

    def write_line(self, line: str) -> None:
        """Logs a line and prints it, above the bar if there is one."""
        self._log.add(line)
        with self._while_shown():
            if self._bar:
                self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
            elif not self.quiet:
                print(line, flush=True)

    def record(self, line: str) -> None:
        """Logs a line without printing it: the caller, or its caller, does that."""
        self._log.add(line)

    def advance(self, iteration: int) -> None:
        """One more iteration is done."""
        self.done = iteration
        if self._bar:
            with self._while_shown():
                self._bar.update(0, completed=iteration)

    def show_row(self, row: dict[str, Any]) -> None:
        """Shows a row of the log."""
        width = len(str(self.total))
        line = f"{row['iteration']:{width}d}/{self.total}  {format_row(row)}  ETA {self._eta()}"
        if not self._bar:
            self.write_line(line)
            return
        self._log.add(line)
        if psnr_parts(row):
            self._scored = row  # the latest score stays in the bar between validations
        parts = brief_parts(row, self._scored)
        used = 2 * width + len("/  0:00:00 ") + 1
        columns = self._bar.console.width
        room = columns - used - (_BAR_WIDTH + 1) * (columns >= _BAR_NEEDS)
        with self._while_shown():
            self._bar.update(0, facts=fit(parts, room))

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            with self._while_shown():
                self._bar.stop()
        self._bar = None

    @contextlib.contextmanager
    def _while_shown(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.quiet, self._bar = True, None
            with contextlib.suppress(OSError):
                # Whatever else prints later, Python's own flush at the end included.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())

    def _eta(self) -> str:
        speed = (time.perf_counter() - self._start) / max(self.done - self.first, 1)
        return duration(speed * (self.total - self.done))


def format_row(row: dict[str, Any]) -> str:
    """A row of the log as a line of text."""
    parts = [row["stage"], f"loss {row['loss']:.5f}"]
    scores = psnr_parts(row)
    if scores:
        parts.append(f"PSNR {', '.join(scores)}")
    if row.get("selected") is not None:
        if row["stage"] == "pruning":
            parts.append(f"selected {100 * row['selected']:.1f} %")
        parts.append(f"zeros {100 * row['zeros']:.1f} %")
        if row["stage"] == "pruning":
            parts.append(f"{row['flips']} flips/it")
    parts.append(f"{row['seconds']:.3f} s/it")
    return "  ".join(parts)


def brief_parts(row: dict[str, Any], scored: dict[str, Any]) -> list[str]:
    """A row of the log for the bar, the most wanted facts first.

    Args:
        row: of the log.
        scored: the latest row of a validation; empty before the first.
    """
    parts = [f"{row['seconds']:.2g} s/it" if row["seconds"] < 10 else f"{row['seconds']:.0f} s/it"]
    scores = psnr_parts(scored)
    parts += scores[:1]
    if row.get("selected") is not None:
        parts.append(f"zeros {100 * row['zeros']:.3g} %")
    parts.append(f"loss {row['loss']:.4f}")
    if row.get("selected") is not None:
        parts.append(f"{row['flips']} flips" if row["stage"] == "pruning" else "frozen")
    return parts + scores[1:]


def fit(parts: Sequence[str], columns: int) -> str:
    """As many of the parts as the columns hold, from the first on."""
    text = ""
    for part in parts:
        longer = f"{text} {part}".strip()
        if len(longer) > columns:
            break
        text = longer
    return text


def rich_bar(total: int, done: int, console: Any = None) -> Any:
    """A started progress bar with one task whose field `facts` is shown; None without rich."""
    try:
        from rich import progress
        from rich.console import Console
        from rich.table import Column
    except ImportError:
        return None
    console = console or Console()

    class Bar(progress.BarColumn):
        """A bar that a narrow terminal leaves out."""

        def render(self, task: Any) -> Any:
            return super().render(task) if console.width >= _BAR_NEEDS else ""

    whole = Column(no_wrap=True)
    bar = progress.Progress(
        progress.MofNCompleteColumn(table_column=whole),
        Bar(bar_width=_BAR_WIDTH),
        progress.TimeRemainingColumn(table_column=whole),
        progress.TextColumn(
            "{task.fields[facts]}", markup=False, table_column=Column(no_wrap=True, ratio=1)
        ),
        console=console,
    )
    bar.add_task("train", total=total, completed=done, facts="")
    bar.start()
    return bar
