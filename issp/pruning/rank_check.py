"""Whether all ranks of a distributed training have the same masks, as they must without talking.

Every rank selects for itself. Selection is exact, so equal weights give equal masks, and under
DistributedDataParallel equal gradients keep the weights equal. What breaks that (a rank that skips
a step, a model that was not wrapped, random numbers of its own) shows here, by layer and ranks.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from issp.ops.schemas import mask_words
from issp.pruning.buckets import WeightBucket
from issp.pruning.pruner import Pruner
from issp.pruning.shards import ShardedBucket
from issp.utils.errors import DivergedRanksError

_MULTIPLIERS = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64)  # SplitMix64's, signed
_PATIENCE = datetime.timedelta(minutes=10)


class RankCheck:
    """Compares the ranks now, every `every` optimizer steps, and when the masks are fixed.

    It costs a pass over the packed masks, a thirty-second of the weights' memory in float32, and
    one gather of a few bytes. In a process that is not one of several it does nothing. All ranks
    make one, in the same place.

    Args:
        pruner: of this rank.
        every: interval in optimizer steps.
        group: the ranks that train one model; None: all.
        patience: how long a rank waits for the others. One that skips steps comes late.

    Raises:
        DivergedRanksError: here or in a later `optimizer.step()`, on all ranks: see `check_ranks`.
        ValueError: `every` is below 1.
    """

    def __init__(
        self,
        pruner: Pruner,
        every: int = 1000,
        group: Any = None,
        patience: datetime.timedelta = _PATIENCE,
    ) -> None:
        if every < 1:
            raise ValueError(f"every is {every}: it must be a whole number of steps from 1 on")
        self._every, self._was_frozen, self._steps = every, pruner.frozen, 0
        self.close = lambda: None
        if _num_ranks(group) == 1:
            return
        # A group of its own: a rank that comes late cannot mistake another gather for this one,
        # and no GPU is needed.
        ranks = dist.get_process_group_ranks(dist.group.WORLD if group is None else group)
        self._group = dist.new_group(
            ranks, patience, backend="gloo", use_local_synchronization=True
        )
        check_ranks(pruner, self._group)
        self.close = pruner.on_step(self._step)

    def _step(self, pruner: Pruner) -> None:
        self._steps += 1
        is_fixed = pruner.frozen and not self._was_frozen
        self._was_frozen = pruner.frozen
        if is_fixed or self._steps % self._every == 0:
            check_ranks(pruner, self._group)


def check_ranks(pruner: Pruner, group: Any = None) -> None:
    """Compares step count, masks and thresholds of all ranks; each rank must call it.

    In a process that is not one of several it does nothing.

    Args:
        pruner: of this rank.
        group: the ranks that train one model; None: all.

    Raises:
        DivergedRanksError: they differ, or a rank does not come in the group's time; it names the
            first layer that differs, and on which ranks. All ranks raise it.
    """
    if _num_ranks(group) == 1:
        return
    layers = _hashes(pruner)
    step = pruner.step_count
    gathered = _gather((step, pruner.frozen, hash(tuple(layers.values()))), group, step)
    if all(facts == gathered[0] for facts in gathered):
        return
    steps = [facts[0] for facts in gathered]
    if len(set(steps)) > 1:
        raise _diverged(f"they have taken {_listed(steps)} optimizer steps")
    everywhere = _gather(layers, group, step)
    names = list(dict.fromkeys(name for one in everywhere for name in one))
    for name in names:
        values = [one.get(name) for one in everywhere]
        if others := [rank for rank, value in enumerate(values) if value != values[0]]:
            ranks = ("rank " if len(others) == 1 else "ranks ") + _listed(others)
            raise _diverged(
                f"at step {step} the selection of {name} on {ranks} is not that of rank 0"
            )
    raise _diverged(f"at step {step} the masks are fixed on some of them only")


def _hashes(pruner: Pruner) -> dict[str, int]:
    """By layer 64 bits that its mask and threshold decide; waits for the device."""
    return pruner.buckets.column(_bucket_hashes)


@torch.no_grad()
def _bucket_hashes(bucket: WeightBucket) -> list[int]:
    """The hash of a layer: the sum of its words, each mixed with its place.

    DistributedDataParallel requires one memory order on all ranks, so the words are taken as they
    are packed. Ranks that have shards select together: only their counts can differ.
    """
    if isinstance(bucket, ShardedBucket):
        return bucket.k
    words = bucket.state.packed
    ends = list(accumulate(map(mask_words, bucket.state.numels)))
    last = torch.tensor(ends, dtype=torch.int64, device=words.device) - 1
    sums = _mixed(words).cumsum(0)[last]  # integers wrap around: exact in any order
    sums = sums.diff(prepend=torch.zeros_like(sums[:1]))
    return (sums ^ _mixed(bucket.state.thresholds.double().view(torch.int64))).tolist()


def _mixed(words: Tensor) -> Tensor:
    """int64 words, each a function of one word and its place, that spreads over all bits."""
    x = torch.arange(1, len(words) + 1, dtype=torch.int64, device=words.device)
    x *= _MULTIPLIERS[0]
    x ^= words
    x *= _MULTIPLIERS[1]
    x ^= (x >> 29) & (2**35 - 1)  # a logical shift
    x *= _MULTIPLIERS[0]
    return x ^ ((x >> 32) & (2**32 - 1))


def _gather(value: Any, group: Any, step: int) -> list[Any]:
    """The values of all ranks, in their order.

    Raises:
        DivergedRanksError: one of them does not come.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(values, value, group)
    except RuntimeError as error:  # gloo and NCCL have no class of their own for it
        raise DivergedRanksError(
            f"not all ranks have come to the comparison of their masks at step {step}: one has "
            "ended, or skips steps that others take"
        ) from error
    return values


def _diverged(how: str) -> DivergedRanksError:
    return DivergedRanksError(
        f"the ranks train different networks: {how}; wrap the model in DistributedDataParallel "
        "before attaching, and let all ranks take or skip a step together"
    )


def _listed(values: Iterable[int]) -> str:
    return ", ".join(map(str, values))


def _num_ranks(group: Any) -> int:
    is_parallel = dist.is_available() and dist.is_initialized()
    return dist.get_world_size(group) if is_parallel else 1
