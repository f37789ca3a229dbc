"""The display of a training run: a bar with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any


class Progress:
    """A progress bar with ETA on a terminal, plain lines elsewhere.

    Args:
        total: iterations of the whole run.
        done: iterations of it that an earlier run did.
        quiet: show nothing.
    """

    def __init__(self, total: int, done: int = 0, quiet: bool = False):
        self.total, self.done, self.first, self.quiet = total, done, done, quiet
        self._start = time.perf_counter()
        self._psnr: float | None = None
        self._bar = None if quiet or not sys.stdout.isatty() else _rich_bar(total, done)

    def write_line(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.quiet:
            return
        if self._bar:
            self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)
        else:
            print(line, flush=True)

    def advance(self, iteration: int) -> None:
        """One more iteration is done."""
        self.done = iteration
        if self._bar:
            self._bar.update(0, completed=iteration)

    def show_row(self, row: dict[str, Any]) -> None:
        """Shows a row of the log."""
        if self._bar:
            # The latest score stays in the bar between validations; 80 columns must hold it all.
            self._psnr = row.get("psnr") or self._psnr
            self._bar.update(0, facts=format_row_briefly({**row, "psnr": self._psnr}))
        else:
            width = len(str(self.total))
            text = f"{format_row(row)}  ETA {self._eta()}"
            self.write_line(f"{row['iteration']:{width}d}/{self.total}  {text}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def _eta(self) -> str:
        speed = (time.perf_counter() - self._start) / max(self.done - self.first, 1)
        seconds = round(speed * (self.total - self.done))
        return f"{seconds // 3600}:{seconds // 60 % 60:02d}:{seconds % 60:02d}"


def format_row(row: dict[str, Any]) -> str:
    """A row of the log as a line of text."""
    parts = [row["stage"], f"loss {row['loss']:.5f}"]
    if row.get("psnr") is not None:
        parts.append(f"PSNR {row['psnr']:.2f} dB")
    if row.get("selected") is not None:
        parts.append(f"sparsity {100 * row['selected']:.1f} %")
        parts.append(f"{row['flips']} flips/it")
    parts.append(f"{row['seconds']:.3f} s/it")
    return "  ".join(parts)


def format_row_briefly(row: dict[str, Any]) -> str:
    """A row of the log in some forty characters."""
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("psnr") is not None:
        parts.append(f"{row['psnr']:.2f} dB")
    if row.get("selected") is not None:
        parts.append(f"{100 * row['selected']:.1f} %")
        parts.append(f"{row['flips']} flips" if row["stage"] == "pruning" else "frozen")
    return " ".join(parts)


def _rich_bar(total: int, done: int) -> Any:
    try:
        from rich import progress
    except ImportError:
        return None
    bar = progress.Progress(
        progress.MofNCompleteColumn(),
        progress.BarColumn(bar_width=10),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[facts]}", markup=False),
    )
    bar.add_task("train", total=total, completed=done, facts="")
    bar.start()
    return bar
