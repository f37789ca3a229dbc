"""Mean loss and time per iteration, and the optimizer's share of the time."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from issp.utils.errors import NonFiniteLossError


class StepTimer:
    """Time spent in an optimizer's steps, pruning included.

    It counts whether pruning is part of the update (`issp.optim`) or follows in a hook. On a GPU
    the time is measured by events, which are read only when the sum is taken.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._begin: Any = None
        self._pairs: list[tuple[Any, Any]] = []
        self._seconds = 0.0

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Times every step. Call it after the pruner is attached, so that its hook runs first."""
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
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class AverageMeter:
    """Mean loss and time per iteration between two rows of the log.

    Args:
        device: of the losses.
        rank, gather: this process among several, and what gives the [world] values of a scalar.
    """

    def __init__(
        self, device: torch.device, rank: int = 0, gather: Callable[[Tensor], Tensor] | None = None
    ):
        self.timer = StepTimer(device)
        self._rank, self._gather = rank, gather
        self._ranks: Tensor | None = None  # sums of all ranks, once they have been gathered
        # On the device and in double precision: adding a loss never waits for the GPU.
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._count = 0
        self._timed = 0
        self._start = time.perf_counter()

    def begin(self) -> None:
        """Restarts the clock, so that the preparation of the run does not count."""
        self._start = time.perf_counter()

    def add(self, loss: torch.Tensor) -> None:
        """Counts one iteration."""
        self._loss += loss.detach()
        self._ranks = None
        self._count += 1
        self._timed += 1

    def gather(self) -> None:
        """Gathers the sums of all ranks, for a row or a state; each of them calls it."""
        if self._gather is not None:
            self._ranks = self._gather(self._loss)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside does not count."""
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def check(self) -> float:
        """The mean loss since the previous `take`.

        Raises:
            NonFiniteLossError: it is NaN or infinite.
        """
        total = self._loss if self._ranks is None else self._ranks.mean()
        loss = total.item() / max(self._count, 1)
        if not math.isfinite(loss):
            raise NonFiniteLossError(
                f"the loss became {loss}: start again with a lower learning rate, or resume from "
                "an earlier training state"
            )
        return loss

    def take(self) -> dict[str, float]:
        """loss, seconds and update_share since the previous call.

        Raises:
            NonFiniteLossError: as `check`.
        """
        loss = self.check()
        elapsed = max(time.perf_counter() - self._start, 1e-9)
        row = {
            "loss": loss,
            "seconds": elapsed / max(self._timed, 1),
            "update_share": self.timer.take() / elapsed,
        }
        self._loss.zero_()
        self._ranks = None if self._ranks is None else torch.zeros_like(self._ranks)
        self._count = self._timed = 0
        self._start = time.perf_counter()
        return row

    def state_dict(self) -> dict[str, Any]:
        """Sum and count of the losses since the last row; the sums of all ranks, if gathered."""
        ranks = {} if self._ranks is None else {"ranks": self._ranks}
        return {"loss": self._loss.cpu(), "count": self._count, **ranks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` gave; times start anew."""
        ranks = state.get("ranks")
        own = ranks is not None and self._rank < len(ranks)
        self._loss.copy_(ranks[self._rank] if own else state["loss"])
        self._count = state["count"]
