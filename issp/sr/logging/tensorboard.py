"""Scalars of a run for TensorBoard."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from issp.utils.errors import MissingPackageError


class TensorBoardLog:
    """Scalars for TensorBoard; writes nothing when disabled or when the package is absent.

    Args:
        folder: of the event files.
        first_step: events of an earlier run from this iteration on are hidden.
        enabled: write events.

    Attributes:
        unavailable_reason: why nothing is written although enabled; None when all is well.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool = True):
        self.unavailable_reason: str | None = None
        self._writer: Any = None
        if not enabled:
            return
        try:
            str(folder).encode()
        except UnicodeEncodeError:
            self.unavailable_reason = (
                "no TensorBoard logs: they need a folder whose name is UTF-8 (--root); CSV logs "
                "are written all the same"
            )
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self.unavailable_reason = str(MissingPackageError("TensorBoard logs", "tensorboard"))
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
