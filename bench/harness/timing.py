"""Clocks for the CPU and for CUDA, and the interleaved rounds."""

from __future__ import annotations

import functools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from bench.harness.progress import counted

_SLOW = 1.0  # seconds: a call this long needs no warm-up call, and hardly a second one
_SPIN = 200_000  # GPU cycles, about 100 us: the host is ahead when the timed part begins
_UNKNOWN_CACHE = 128 << 20
_LARGEST_FLUSH = 1 << 30


@dataclass(frozen=True)
class Mode:
    """One way to time a call.

    Attributes:
        name: heads the column.
        cold: the caches are flushed before each call.
        graph: the call is replayed from a CUDA graph.
    """

    name: str
    cold: bool
    graph: bool = False


class CpuClock:
    """Wall-clock time of a call on the CPU.

    Args:
        flush_bytes: how much is read to flush the caches; default: twice the last-level cache.

    Attributes:
        flush_bytes: the same, as it is.
    """

    unit = "ms"
    modes = (Mode("warm", cold=False), Mode("cold", cold=True))
    basis = "cold"

    def __init__(self, flush_bytes: int | None = None) -> None:
        size = min(2 * _last_level_cache(), _LARGEST_FLUSH) if flush_bytes is None else flush_bytes
        self.flush_bytes = max(size, 64) // 8 * 8

    @functools.cached_property
    def _lines(self) -> torch.Tensor:
        # Written once: pages that were never written would all be the same page of zeros.
        return torch.ones(self.flush_bytes // 8, dtype=torch.int64)

    def compile(self, call: Callable[[], object], mode: Mode) -> Callable[[], object]:
        """The call as `time` wants it."""
        return call

    def time(self, call: Callable[[], object], mode: Mode) -> float:
        """Seconds of one call."""
        if mode.cold:
            self._lines.sum()  # reads only: dirty lines would cost the next call
        begin = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - begin) * 1e-9


class CudaClock:
    """Time between two events around a call, launched eagerly or replayed from a graph.

    Args:
        flush_bytes: how much is read to flush the caches; default: four times the L2.
    """

    unit = "us"
    modes = (
        Mode("eager", cold=True),
        Mode("graph", cold=True, graph=True),
        Mode("graph, warm", cold=False, graph=True),
    )
    basis = "graph"

    def __init__(self, flush_bytes: int | None = None) -> None:
        if flush_bytes is None:
            flush_bytes = 4 * torch.cuda.get_device_properties().L2_cache_size
        self._lines = torch.ones(max(flush_bytes, 64) // 8, dtype=torch.int64, device="cuda")
        self.flush_bytes = self._lines.nbytes
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True)

    def compile(self, call: Callable[[], object], mode: Mode) -> Callable[[], object]:
        """The call itself, or the replay of its graph."""
        if not mode.graph:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def time(self, call: Callable[[], object], mode: Mode) -> float:
        """Seconds between the events. Eager: from an idle GPU, launches included."""
        if mode.cold:
            self._lines.sum()  # reads only: dirty lines would cost the next call
        if mode.graph:
            torch.cuda._sleep(_SPIN)
        else:
            torch.cuda.synchronize()
        self._begin.record()
        call()
        self._end.record()
        self._end.synchronize()
        return self._begin.elapsed_time(self._end) * 1e-3


def _last_level_cache() -> int:
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number = path.read_text().strip()
        factor = {"K": 1 << 10, "M": 1 << 20}.get(number[-1:], 1)
        sizes.append(int(number.rstrip("KM")) * factor)
    return max(sizes) or _UNKNOWN_CACHE


@dataclass
class Task:
    """A call to be timed in every mode of a clock.

    Attributes:
        call: what is timed.
        prepare: runs before every call, untimed.
        required: its errors are raised; those of other tasks are kept in `error`.
        capturable: a CUDA graph can hold the call.
        samples: mode name -> seconds of each call.
    """

    call: Callable[[], object]
    prepare: Callable[[], object]
    required: bool = True
    capturable: bool = True
    samples: dict[str, list[float]] = field(default_factory=dict)
    error: str | None = None

    def median(self, mode: str) -> float | None:
        """Seconds, or None where the task could not be timed."""
        return statistics.median(self.samples[mode]) if self.samples.get(mode) else None

    def best(self, mode: str) -> float | None:
        """Seconds of the shortest call: the least disturbed on a shared machine."""
        return min(self.samples.get(mode, ()), default=None)

    def spread(self, mode: str) -> float | None:
        """Distance of the quartiles, as a share of the median; None below four samples."""
        seconds = self.samples.get(mode, ())
        if len(seconds) < 4:
            return None
        low, middle, high = statistics.quantiles(seconds, n=4)
        return (high - low) / middle


def interleave(
    tasks: Sequence[Task],
    clock: CpuClock | CudaClock,
    rounds: int,
    seconds: float,
    modes: Sequence[Mode] | None = None,
) -> None:
    """Times the tasks in turn, round after round, so that a slow minute of the machine hits all.

    Args:
        tasks: get their samples.
        clock: how to time.
        rounds: calls of each task in each mode.
        seconds: a task whose calls would take longer in one mode gets fewer, at least one.
        modes: default: all of the clock's.
    """
    schedule = []
    for task in counted(tasks, "first call of row"):
        for mode in clock.modes if modes is None else modes:
            if mode.graph and not task.capturable:
                continue
            try:
                task.prepare()
                call = clock.compile(task.call, mode)
                task.prepare()
                first = clock.time(call, mode)
            except Exception as error:  # any failure of a baseline is printed
                if task.required:
                    raise
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                task.error = f"{mode.name}: {reason}"
                continue
            repetitions = min(rounds, max(1, int(seconds / first)))
            task.samples[mode.name] = [first] if first > _SLOW else []
            schedule.append((task, mode, call, repetitions - len(task.samples[mode.name])))
    # In another order each round: nobody always comes after the one that emptied the caches.
    order = random.Random(0)
    for i in counted(range(rounds), "round"):
        order.shuffle(schedule)
        for task, mode, call, repetitions in schedule:
            if (i + 1) * repetitions // rounds > i * repetitions // rounds:
                task.prepare()
                task.samples[mode.name].append(clock.time(call, mode))
