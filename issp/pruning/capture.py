"""CUDA graphs: a captured step is replayed without Python, whose decisions must be settled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NoReturn

import torch

from issp.pruning import methods
from issp.pruning.buckets import WeightBucket
from issp.pruning.schedules import Schedule

# Device types whose steps can be captured.
DEVICES = ("cuda",)


def can_capture(device: torch.device) -> bool:
    """Whether steps on a device can be captured in a graph."""
    return device.type in DEVICES


def is_capturing() -> bool:
    """Whether a graph is being captured on the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def check_settled(
    method: methods.Method, schedule: Schedule | None, freeze_at: int | None, steps: int
) -> None:
    """Refuses to capture a step of the pruning stage that Python would decide in each replay.

    Args:
        method: of the pruner, likewise the others.
        schedule: its counts must not change any more.
        freeze_at: must be None, since a replay fixes no masks.
        steps: taken so far; the first one sets the counts.

    Raises:
        RuntimeError: the captured step would go on as the first replay.
    """
    kind = type(method)
    own = (kind.ranks_after, kind.after_step, kind.penalty, kind.loss)
    base = methods.Method
    reason = ""
    if own != (base.ranks_after, base.after_step, base.penalty, base.loss):
        reason = f"{method.name} decides in Python in every step: freeze() first"
    elif freeze_at is not None:
        reason = f"a replay does not fix the masks at step {freeze_at}: leave out freeze_at"
    elif steps == 0:
        reason = "the first step sets the counts: take one before"
    elif schedule is not None and steps < schedule.end:
        reason = f"the schedule changes the counts until step {schedule.end}: capture a later step"
    if reason:
        _refuse(reason)


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raises RuntimeError if there are callbacks of `Pruner.on_step`."""
    if callbacks:
        _refuse(
            "a replay calls no callback of pruner.on_step (issp.Recorder has one): end them, or "
            "capture the model alone"
        )


def check_local(buckets: Iterable[WeightBucket]) -> None:
    """Raises RuntimeError if weights are sharded."""
    if not all(bucket.is_one_call for bucket in buckets):
        _refuse("the ranks of fully_shard select together, in Python: capture the model alone")


def _refuse(reason: str) -> NoReturn:
    raise RuntimeError(f"this step cannot be captured in a CUDA graph: {reason}")
