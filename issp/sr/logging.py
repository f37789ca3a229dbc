"""What a training run reports: CSV, TensorBoard, the progress display, and where the time goes."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from issp.utils.files import atomic_write

COLUMNS = (
    "iteration",
    "stage",  # pruning | fine-tuning | dense
    "lr",
    "loss",  # mean since the previous row
    "psnr",  # first validation set, at iterations that validated; of the soft model while pruning
    "flips",  # mask bits that this iteration's selection changed
    "threshold",  # mean over layers
    "selected",  # share of prunable weights the masks mark
    "zeros",  # share of prunable weights that are exactly 0
    "seconds",  # per iteration, validation and saving excluded
    "update_share",  # share of them spent in the optimizer's step, pruning included
)


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
        text = self._text([dict(zip(columns, columns, strict=True)), *rows])
        atomic_write(path, text.encode())

    def add(self, *rows: dict[str, Any]) -> None:
        """Appends rows; absent columns stay empty."""
        with open(self.path, "a", encoding="utf-8", newline="") as file:
            file.write(self._text(rows))

    def _text(self, rows: Iterable[dict[str, Any]]) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        for row in rows:
            values = [row.get(column) for column in self.columns]
            writer.writerow(["" if v is None else repr(v) if _real(v) else v for v in values])
        return buffer.getvalue()


def read_csv(path: str | Path) -> list[dict[str, Any]]:
    """Rows of a log by column name: numbers where they are numbers, None where empty.

    Raises:
        ValueError: the file cannot be read or is no log.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read log {path}: {error}") from None
    if not lines or lines[0][0] != "iteration":
        raise ValueError(f"{path} is not a log of `issp train`: its first column is no iteration")
    header = lines[0]
    rows = [
        dict(zip(header, map(_value, line), strict=True))
        for line in lines[1:]
        if len(line) == len(header)
    ]
    return [row for row in rows if isinstance(row["iteration"], int)]


def _real(value: Any) -> bool:
    return isinstance(value, float)


def _value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text or None


class StepTimer:
    """Time spent in an optimizer's steps, the pruner's work included.

    Whether that work is part of the update (`issp.optim`) or follows in a hook makes no difference.
    On a GPU by events, read only when the sum is taken.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Times every step; to be called after the pruner attached, whose hook then runs first."""
        optimizer.register_step_pre_hook(self._start)
        optimizer.register_step_post_hook(self._stop)

    def _start(self, *_: Any) -> None:
        self._begin = self._now()

    def _stop(self, *_: Any) -> None:
        if self._cuda:
            self._pairs.append((self._begin, self._now()))
        else:
            self._seconds += self._now() - self._begin

    def take(self) -> float:
        """Seconds since the previous call."""
        if self._cuda and self._pairs:
            self._pairs[-1][1].synchronize()
            self._seconds = sum(a.elapsed_time(b) for a, b in self._pairs) / 1000
            self._pairs.clear()
        taken, self._seconds = self._seconds, 0.0
        return taken

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Meter:
    """Mean loss and time per iteration between two rows of the log."""

    def __init__(self, device: torch.device):
        self.timer = StepTimer(device)
        # On the device and in double precision: adding a loss never waits for the GPU.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._count = 0
        self._timed = 0
        self._start = time.perf_counter()

    def begin(self) -> None:
        """Starts the clock anew: what came before was preparation."""
        self._start = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Counts one iteration."""
        self._loss += loss.detach()
        self._count += 1
        self._timed += 1

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def take(self) -> dict[str, float]:
        """loss, seconds and update_share since the previous call.

        Raises:
            RuntimeError: the loss is not finite.
        """
        loss = self._loss.item() / self._count
        if not math.isfinite(loss):
            raise RuntimeError(
                f"the loss became {loss}: start again with a lower learning rate, or resume from "
                "an earlier training state"
            )
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        row = {
            "loss": loss,
            "seconds": elapsed / self._timed,
            "update_share": self.timer.take() / elapsed,
        }
        self._loss.zero_()
        self._count = self._timed = 0
        self._start = time.perf_counter()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Sum and count of the losses since the last row."""
        return {"loss": self._loss.cpu(), "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; times start anew."""
        self._loss.copy_(state["loss"])
        self._count = state["count"]


class TensorBoard:
    """Scalars for TensorBoard; without the package, nothing, and `problem` says so."""

    def __init__(self, folder: Path, first_step: int, wanted: bool = True):
        self.problem, self._writer = None, None
        if not wanted:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.problem = 'no TensorBoard log: pip install "issp[train]"'
            return
        self._writer = SummaryWriter(str(folder), purge_step=first_step)

    def add(self, row: dict[str, Any], prefix: str = "") -> None:
        """One scalar for every number in the row."""
        if self._writer:
            for key, value in row.items():
                if isinstance(value, int | float) and key != "iteration":
                    self._writer.add_scalar(prefix + key, value, row["iteration"])

    def close(self) -> None:
        """Writes what is buffered."""
        if self._writer:
            self._writer.close()


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

    def say(self, line: str) -> None:
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

    def report(self, row: dict[str, Any]) -> None:
        """Shows a row of the log."""
        if self._bar:
            # The bar shows the latest score all the time, and has to fit into 80 columns.
            self._psnr = row.get("psnr") or self._psnr
            self._bar.update(0, facts=brief({**row, "psnr": self._psnr}))
        else:
            width = len(str(self.total))
            text = f"{describe(row)}  ETA {self._eta()}"
            self.say(f"{row['iteration']:{width}d}/{self.total}  {text}")

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._bar:
            self._bar.stop()

    def _eta(self) -> str:
        speed = (time.perf_counter() - self._start) / max(self.done - self.first, 1)
        left = round(speed * (self.total - self.done))
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"


def describe(row: dict[str, Any]) -> str:
    """A row of the log as a line for people."""
    parts = [row["stage"], f"loss {row['loss']:.5f}"]
    if row.get("psnr") is not None:
        parts.append(f"PSNR {row['psnr']:.2f} dB")
    if row.get("selected") is not None:
        parts.append(f"sparsity {100 * row['selected']:.1f} %")
        parts.append(f"{row['flips']} flips/it")
    parts.append(f"{row['seconds']:.3f} s/it")
    return "  ".join(parts)


def brief(row: dict[str, Any]) -> str:
    """The same in some forty characters."""
    parts = [f"loss {row['loss']:.4f}"]
    if row.get("psnr") is not None:
        parts.append(f"{row['psnr']:.2f} dB")
    if row.get("selected") is not None:
        parts.append(f"{100 * row['selected']:.1f} %")
        parts.append(f"{row['flips']} flips" if row["stage"] == "pruning" else "frozen")
    return " ".join(parts)


def _rich_bar(total: int, done: int) -> Any:
    try:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import (
            Progress as Bar,
        )
    except ImportError:
        return None
    bar = Bar(
        MofNCompleteColumn(),
        BarColumn(bar_width=10),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}", markup=False),
    )
    bar.add_task("train", total=total, completed=done, facts="")
    bar.start()
    return bar
