"""Schedules: the sparsity as a function of the optimizer step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Constant:
    """The full sparsity from step `begin` on, 0 before: the paper's schedule with begin = 0.

    Args:
        sparsity: ratio in (0, 1].
        begin: first optimizer step that prunes; 0 and 1 both mean the very first.

    Raises:
        ValueError: a ratio outside (0, 1] or a negative step.
    """

    sparsity: float
    begin: int = 0

    def __post_init__(self) -> None:
        _check(0.0, self.sparsity, self.begin, self.begin + 1)

    @property
    def final(self) -> float:
        """Sparsity at the end."""
        return self.sparsity

    @property
    def end(self) -> int:
        """First step with the final sparsity."""
        return self.begin

    def __call__(self, step: int) -> float:
        """Sparsity selected after optimizer step `step` (the first step is 1)."""
        return self.sparsity if step >= self.begin else 0.0


@dataclass(frozen=True)
class _Ramp:
    initial: float
    final: float
    begin: int
    end: int

    _power: ClassVar[int]  # of the share of steps that remain

    def __post_init__(self) -> None:
        _check(self.initial, self.final, self.begin, self.end)

    def __call__(self, step: int) -> float:
        """Sparsity selected after optimizer step `step` (the first step is 1)."""
        # Both ends are returned exactly. Interpolation could miss them by a rounding error, and
        # then the count of pruned weights would be off by one.
        if step <= self.begin:
            return self.initial
        if step >= self.end:
            return self.final
        remaining = (self.end - step) / (self.end - self.begin)
        return self.final + (self.initial - self.final) * remaining**self._power


class Linear(_Ramp):
    """From `initial` to `final` sparsity, by equal amounts per step.

    Args:
        initial: ratio in 0..1 up to step `begin`.
        final: ratio in (0, 1] from step `end` on.
        begin, end: optimizer steps, 0 <= begin < end.

    Raises:
        ValueError: ratios or steps outside these ranges.
    """

    _power = 1


class Cubic(_Ramp):
    """From `initial` to `final` sparsity, fast at first and slower towards the end.

    Arguments and errors are those of `Linear`.

    Source: Zhu & Gupta, "To prune, or not to prune" (2017), equation 1.
    """

    _power = 3


Schedule = Constant | Linear | Cubic


def final_sparsity(
    sparsity: float | None, schedule: Schedule | None, freeze_at: int | None, from_zeros: bool
) -> float:
    """The sparsity that the arguments of `issp.attach` lead to: 0.95 if they leave it open.

    Raises:
        ValueError: two of the arguments contradict each other.
    """
    if schedule is not None and sparsity is not None and sparsity != schedule.final:
        raise ValueError(
            f"sparsity is {sparsity} but the schedule ends at {schedule.final}: give one of them"
        )
    end = 1 if schedule is None else max(1, schedule.end)
    if freeze_at is not None and freeze_at < end:
        raise ValueError(f"freeze_at is {freeze_at}: the schedule needs at least step {end}")
    if from_zeros and (schedule is not None or freeze_at is not None):
        raise ValueError("from_zeros fixes the masks at once: drop schedule and freeze_at")
    if sparsity is not None:
        return sparsity
    return 0.95 if schedule is None else schedule.final


def _check(initial: float, final: float, begin: int, end: int) -> None:
    if not 0.0 <= initial <= 1.0:
        raise ValueError(f"schedule starts at sparsity {initial}: it must lie in 0..1")
    if not 0.0 < final <= 1.0:
        raise ValueError(f"schedule ends at sparsity {final}: it must lie above 0 and up to 1")
    if not 0 <= begin < end:
        raise ValueError(f"schedule runs from step {begin} to {end}: use 0 <= begin < end")
