"""Calls of the pruner that speak of whole weights: ranks that have shards must make them together.

A rank that is alone with one would wait in a collective that the others never come to, and would
then be ended without a word of the cause.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch.distributed as dist

from issp.utils.errors import DivergedRanksError

_PATIENCE = datetime.timedelta(minutes=10)


class JointCalls:
    """Compares what the ranks call before they do it; without shards it does nothing."""

    def __init__(self) -> None:
        self._groups: dict[Any, Any] = {}  # of the meshes, each one of its own

    def watch(self, mesh: Any) -> None:
        """Takes in the ranks of a mesh; all of them must call it."""
        if mesh not in self._groups and dist.is_gloo_available():
            ranks = dist.get_process_group_ranks(mesh.get_group())
            self._groups[mesh] = dist.new_group(
                ranks, _PATIENCE, backend="gloo", use_local_synchronization=True
            )

    def check(self, call: str) -> None:
        """Waits for the others.

        Raises:
            DivergedRanksError: they do not come, or call something else.
        """
        for group in self._groups.values():
            calls: list[Any] = [None] * dist.get_world_size(group)
            try:
                dist.all_gather_object(calls, call, group)
            except RuntimeError as error:  # gloo has no class of its own for it
                raise DivergedRanksError(
                    f"not all ranks have called {call} in {_PATIENCE}, and weights that are "
                    "sharded need all of them: call it on every rank, and use the result on one"
                ) from error
            if len(set(calls)) > 1:
                raise DivergedRanksError(
                    f"the ranks have called {', '.join(calls)}, in the order of the ranks, and "
                    "weights that are sharded need one call of all"
                )

    def __getstate__(self) -> dict[str, Any]:
        return {"_groups": {}}
