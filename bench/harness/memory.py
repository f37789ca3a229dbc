"""The most memory that a call holds."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable

import torch


def peak_bytes(call: Callable[[], object], device: str) -> int:
    """Most memory that a call holds at once beyond what it was given: torch's and Python's."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler reports its own start otherwise
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    now = torch_peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            torch_peak = max(torch_peak, now)
    tracemalloc.start()
    call()
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return torch_peak + python_peak
