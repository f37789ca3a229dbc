"""The smallest magnitudes of weights whose rows are spread over ranks: how many each rank has.

Of the keys that equal the k-th smallest key (see `issp.ops.reference.key`) the lowest flat indices
are selected. They are those of the lowest ranks, since a rank has whole rows. So the selection
within a shard is that of its own smallest keys, and their number is all that a rank must know.

1. The ranks share k among them, in proportion to their rows, and each finds its local threshold
   (0 for a share of 0). The k-th smallest key of all lies between the lowest and the highest of
   these thresholds: below the lowest there are less than k keys, up to the highest k at least.
2. Of the keys in between it is found digit by digit, from the highest: every rank counts its keys
   by their next digit, and the counts are summed over the ranks.
3. The ranks learn how many equal keys the lower ranks have.

All layers of a call share the collectives: two, and one of 2 KiB per layer for each 8 bits of the
distance between the thresholds. In float32 it has 20 bits where rows are alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp import ops
from issp.ops import reference

_DIGIT = 8  # bits
_NONE = torch.iinfo(torch.int64).max


class Span(NamedTuple):
    """Which part of the flat weight a shard is: elements start..stop of `numel`."""

    start: int
    stop: int
    numel: int


@torch.no_grad()
def count_selected(
    shards: Sequence[Tensor], spans: Sequence[Span], k: Sequence[int], group: Any
) -> Tensor:
    """How many of each weight's k smallest magnitudes lie in the shard of this rank.

    All ranks of the group must call it, with the same weights in the same order.

    Args:
        shards: T contiguous tensors of one device and float dtype, which may be empty: the rows of
            this rank; a higher rank has higher rows.
        spans: where they lie in the whole weights.
        k: T ints, 1..n of the whole weight.
        group: process group.

    Returns:
        int64 [T] on their device.
    """
    lowest, highest = _bracket(shards, spans, k, group)
    keys, owners, outside = _between(shards, lowest, highest)
    missing = torch.tensor(k, dtype=torch.int64, device=keys.device)
    below = torch.zeros_like(missing)
    equal = below
    widths = [high - low for low, high in zip(lowest, highest, strict=True)]
    for shift, bits in _digits(max(widths).bit_length()):
        digits = (keys >> shift) & ((1 << bits) - 1)
        places = (owners << bits) + digits
        counts = torch.bincount(places, minlength=len(k) << bits).view(len(k), -1)
        # In front stand the keys below the lowest threshold.
        counts = torch.cat([outside[:, None], counts], 1)
        total = counts.clone()
        torch.distributed.all_reduce(total, group=group)
        sums = total.cumsum(1)
        chosen = (sums < missing[:, None]).sum(1, keepdim=True)
        missing -= (sums - total).gather(1, chosen).squeeze(1)
        equal = counts.gather(1, chosen).squeeze(1)
        below += counts.cumsum(1).gather(1, chosen).squeeze(1) - equal
        matching = digits + 1 == chosen[owners, 0]
        keys, owners, outside = keys[matching], owners[matching], torch.zeros_like(outside)
    before = _on_lower_ranks(equal, group)
    return below + torch.minimum((missing - before).clamp_(min=0), equal)


def _bracket(
    shards: Sequence[Tensor], spans: Sequence[Span], k: Sequence[int], group: Any
) -> tuple[list[int], list[int]]:
    """The lowest and the highest local threshold of each weight over all ranks, as keys."""
    shares = [
        count * span.stop // span.numel - count * span.start // span.numel
        for count, span in zip(k, spans, strict=True)
    ]
    # Maxima of -lowest and highest; a rank without elements changes neither.
    nothing = [[0 if span.start < span.stop else -_NONE, 0] for span in spans]
    ends = torch.tensor(nothing, dtype=torch.int64, device=shards[0].device)
    ranked = [t for t, share in enumerate(shares) if share]
    if ranked:
        weights = [shards[t].detach() for t in ranked]
        thresholds = ops.magnitude_threshold(weights, [shares[t] for t in ranked])
        keys = reference.key(thresholds).long()
        ends[ranked] = torch.stack([-keys, keys], 1)
    torch.distributed.all_reduce(ends, torch.distributed.ReduceOp.MAX, group=group)
    return (-ends[:, 0]).tolist(), ends[:, 1].tolist()


def _between(
    shards: Sequence[Tensor], lowest: Sequence[int], highest: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The keys from lowest to highest, minus lowest, and how many are below.

    Returns:
        Keys of all weights one behind the other; for each the number of its weight; [T] how many
        keys of each weight are lower. All int64.
    """
    inside, below = [], []
    for shard, low, high in zip(shards, lowest, highest, strict=True):
        keys = reference.key(shard.detach().view(-1))
        not_below = keys >= low
        below.append(keys.numel() - not_below.sum())
        inside.append(keys[not_below & (keys <= high)].long() - low)
    device = inside[0].device
    sizes = torch.tensor([x.numel() for x in inside], dtype=torch.int64, device=device)
    numbers = torch.arange(len(shards), dtype=torch.int64, device=device)
    return torch.cat(inside), numbers.repeat_interleave(sizes), torch.stack(below)


def _digits(end: int) -> Iterator[tuple[int, int]]:
    """(shift, bits) of the digits of a number of `end` bits, the highest first; one at least."""
    while True:
        bits = min(_DIGIT, end)
        end -= bits
        yield end, bits
        if not end:
            return


def _on_lower_ranks(counts: Tensor, group: Any) -> Tensor:
    """The sum of counts [T] over the ranks below this one."""
    distributed = torch.distributed
    gathered = counts.new_empty(distributed.get_world_size(group), len(counts))
    distributed.all_gather(list(gathered), counts, group=group)
    return gathered[: distributed.get_rank(group)].sum(0)
