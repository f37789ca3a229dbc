"""How the pruner and an optimizer that prunes within its step (`issp.optim`) work together.

1. At its start, `optimizer.step()` asks the pruner for a `PruneStep`: what is to be done.
2. The optimizer does what it can in the same pass as its update.
3. The pruner's post-step hook takes the buckets that are still to be shrunk, by one call of
   `take_remaining`, and shrinks just those.

A `PruneStep` is never modified. Any other optimizer knows none of this: the hook does all the work.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeGuard

from torch import Tensor

if TYPE_CHECKING:  # buckets.py imports this module
    from issp.pruning.buckets import WeightBucket


@dataclass(frozen=True)
class PruneStep:
    """The pruner's work of one optimizer step.

    Args:
        buckets: the weights that this optimizer's steps prune.
        factor: what the selected weights are multiplied by.
        frozen: whether the masks are fixed: then they are applied, and nothing is selected.
        deferred: why the step must leave all pruning to the hook, or "".
    """

    buckets: tuple[WeightBucket, ...]
    factor: float
    frozen: bool
    deferred: str = ""

    def bucket_of(self, param_group: int) -> WeightBucket | None:
        """The bucket of a parameter group, by the group's number; None if nothing is pruned."""
        for bucket in self.buckets:
            if bucket.param_group == param_group:
                return bucket
        return None

    def remaining(self, completed: Collection[WeightBucket]) -> tuple[WeightBucket, ...]:
        """The buckets that are not among the completed ones."""
        return tuple(bucket for bucket in self.buckets if bucket not in completed)


class BeginStep(Protocol):
    """What an optimizer calls at the start of its step; again, `exact`, where an op has refused.

    Args:
        found_inf: AMP's overflow flag, or None.
        exact: False: weights whose memory has been replaced may go unnoticed, as long as the op
            refuses what the pruner's state does not suit.
    """

    def __call__(self, found_inf: Tensor | None, exact: bool = False) -> PruneStep: ...


class PruningOptimizer(Protocol):
    """An optimizer that can prune within its step."""

    def attach_pruner(self, begin_step: BeginStep) -> bool:
        """Lets a pruner's work be done within the step; one pruner at a time.

        Args:
            begin_step: to be called at the start of a step.

        Returns:
            False if another pruner is attached already; this one then works in its hook alone.
        """

    def detach_pruner(self) -> None:
        """Ends `attach_pruner`."""

    def take_remaining(self) -> tuple[WeightBucket, ...] | None:
        """The buckets of the latest step that are still to be shrunk; can be taken once.

        Returns:
            None if the step has called no `begin_step`: then all the work is left.
        """

    def grad_scale_of(self, param_group: int | None) -> Tensor | None:
        """GradScaler's scale, which the running step has left in a group's gradients, or None."""


def prunes_within_step(optimizer: object) -> TypeGuard[PruningOptimizer]:
    """Whether an optimizer can prune within its step, as those of `issp.optim` do."""
    return hasattr(optimizer, "attach_pruner")
