"""Counts optimizer steps without waiting for the GPU that knows whether AMP skipped them."""

from __future__ import annotations

import torch
from torch import Tensor


class StepCounter:
    """The number of steps that were not skipped.

    Attributes:
        known: the count without a step whose fate only the device knows yet.
    """

    def __init__(self) -> None:
        self.known = 0
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, found_inf: Tensor | None) -> None:
        """Counts a step, unless AMP's overflow flag turns out not to be 0.

        The flag is read when the next step needs the count: nobody waits for work younger than one
        iteration.
        """
        if found_inf is None:
            self.known += 1
        else:
            flag = torch.empty(1, pin_memory=True)
            flag.copy_(found_inf.view(1), non_blocking=True)
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(found_inf.device))
            self._pending = (flag, done)

    def most(self) -> int:
        """The count if the newest step was not skipped."""
        return self.known + (self._pending is not None)

    def settled(self) -> int:
        """The count; waits for the newest step."""
        if self._pending is not None:
            flag, done = self._pending
            self._pending = None
            done.synchronize()
            self.known += int(flag.item() == 0)
        return self.known

    def reached(self, count: int | None) -> bool:
        """Whether there have been `count` steps; waits for the newest only if it decides."""
        return count is not None and self.most() >= count and self.settled() >= count

    def set(self, count: int) -> None:
        """Goes on from a saved count."""
        self.settled()
        self.known = count


def skipped(found_inf: Tensor | None) -> bool:
    """Whether AMP skips the step, where that is known without waiting for a GPU."""
    return found_inf is not None and found_inf.device.type != "cuda" and found_inf.item() != 0
