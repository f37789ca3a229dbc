"""Counts optimizer steps without waiting for the GPU that knows whether AMP skipped them."""

from __future__ import annotations

import torch
from torch import Tensor


class StepCounter:
    """The number of optimizer steps that AMP did not skip.

    Attributes:
        known: the count without the newest step, as long as its overflow flag has not been read,
            and without replays of CUDA graphs since the latest `synchronize`.
        captured: whether a step has been captured in a CUDA graph.
    """

    def __init__(self) -> None:
        self.known = 0
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self._replays: Tensor | None = None  # on the device: steps that graphs have replayed
        self._replays_known = 0
        self.captured = False

    def prepare(self, device: torch.device) -> None:
        """Allocates, before any capture, what a captured step counts its replays in."""
        if self._replays is None or self._replays.device != device:
            self.synchronize()
            self._replays = torch.zeros((), dtype=torch.int64, device=device)
            self._replays_known = 0

    def add_captured(self, found_inf: Tensor | None) -> None:
        """Lets every replay of the step that is being captured count itself, on the device."""
        assert self._replays is not None
        self._replays += 1 if found_inf is None else (found_inf.view(()) == 0)
        self.captured = True

    def add(self, found_inf: Tensor | None) -> None:
        """Counts a step, unless AMP's overflow flag is not 0.

        The flag is copied to the CPU now and read when the next step needs the count. So nothing
        waits for GPU work that is younger than one iteration.

        Args:
            found_inf: CUDA tensor of one element, or None: the step counts.
        """
        if found_inf is None:
            self.known += 1
        else:
            flag = torch.empty(1, dtype=torch.float32, device="cpu", pin_memory=True)
            flag.copy_(found_inf.view(1), non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(torch.cuda.current_stream(found_inf.device))
            self._pending = (flag, copied)

    def synchronize(self) -> int:
        """The count; waits for the newest step, and for replays of captured ones."""
        if self._pending is not None:
            flag, copied = self._pending
            self._pending = None
            copied.synchronize()
            self.known += int(flag.item() == 0)
        if self.captured and self._replays is not None:
            replays = int(self._replays.item())
            self.known += replays - self._replays_known
            self._replays_known = replays
        return self.known

    @property
    def upper_bound(self) -> int:
        """The count if the newest step was not skipped; waits for nothing."""
        return self.known + (self._pending is not None)

    def reached(self, count: int | None) -> bool:
        """Whether there have been `count` steps; waits for the newest only if it decides."""
        if count is None or self.upper_bound < count:
            return False
        return self.synchronize() >= count

    def set(self, count: int) -> None:
        """Goes on from a saved count."""
        self.synchronize()
        self.known = count


def is_skipped(found_inf: Tensor | None) -> bool:
    """Whether AMP skips the step, where that is known without waiting for a GPU."""
    return found_inf is not None and found_inf.device.type != "cuda" and found_inf.item() != 0
