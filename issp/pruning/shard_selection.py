"""The smallest magnitudes of weights whose rows are spread over ranks: how many each rank has.

The k smallest keys (see `issp.ops.reference.key`) over all shards are found digit by digit, from
the highest: every rank counts its keys by their next digit, the counts are summed over the ranks,
and the digit of the k-th smallest key follows. Of the keys that equal it the lowest flat indices
are selected, which are those of the lowest ranks, since a rank has whole rows. So the selection
within a shard is that of its own smallest keys, and their number is all that a rank must know.

All layers of a call share the collectives: for float32 three reductions, of 16 KiB per layer, and
one gathering of 8 bytes per layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from issp.ops import reference

_DIGIT = 11  # bits
_BLOCK = 1 << 22  # keys that are counted in one go, which bounds the memory


class _Keys(NamedTuple):
    """The keys that are still possible, of weights one behind the other.

    Args:
        first: number of the first weight.
        length: number of weights.
        keys: 1-d integers.
        owners: 1-d int64, for each key the number of its weight minus `first`.
    """

    first: int
    length: int
    keys: Tensor
    owners: Tensor


def count_selected(shards: Sequence[Tensor], k: Tensor, group: Any) -> Tensor:
    """How many of each weight's k smallest magnitudes lie in the shard of this rank.

    All ranks of the group must call it, with the same weights in the same order.

    Args:
        shards: T contiguous tensors of one device and float dtype, which may be empty: the rows of
            this rank; a higher rank has higher rows.
        k: int64 [T] on their device, 0..n of the whole weight.
        group: process group.

    Returns:
        int64 [T].
    """
    blocks = [_keys(shards, numbers) for numbers in _blocks([x.numel() for x in shards])]
    missing, below = k.clone(), torch.zeros_like(k)
    equal = below
    for shift, bits in _digits(shards[0].dtype):
        counts = torch.zeros(len(shards), 1 << bits, dtype=torch.int64, device=k.device)
        digits = [(block.keys >> shift) & ((1 << bits) - 1) for block in blocks]
        for block, digit in zip(blocks, digits, strict=True):
            here = counts[block.first : block.first + block.length]
            places = (block.owners << bits) + digit
            here += torch.bincount(places, minlength=here.numel()).view_as(here)
        total = counts.clone()
        torch.distributed.all_reduce(total, group=group)
        chosen = (total.cumsum(1) < missing[:, None]).sum(1, keepdim=True)
        missing -= _sum_before(total, chosen)
        below += _sum_before(counts, chosen)
        equal = counts.gather(1, chosen).squeeze(1)
        blocks = [
            _matching(block, digit == chosen[block.first :, 0][block.owners])
            for block, digit in zip(blocks, digits, strict=True)
        ]
    before = _on_lower_ranks(equal, group)
    return below + torch.minimum((missing - before).clamp_(min=0), equal)


def _digits(dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """(shift, bits) of the digits of a key, the highest first."""
    end = torch.iinfo(reference.INTEGER[dtype]).bits - 1  # without the sign
    while end:
        bits = min(_DIGIT, end)
        end -= bits
        yield end, bits


def _blocks(numels: Sequence[int]) -> Iterator[range]:
    """Numbers of successive weights with `_BLOCK` elements together, or one with more."""
    start, size = 0, 0
    for i, numel in enumerate(numels):
        if size and size + numel > _BLOCK:
            yield range(start, i)
            start, size = i, 0
        size += numel
    yield range(start, len(numels))


def _keys(shards: Sequence[Tensor], numbers: range) -> _Keys:
    part = [shards[i].detach().view(-1) for i in numbers]
    device = part[0].device
    sizes = torch.tensor([x.numel() for x in part], dtype=torch.int64, device=device)
    keys = torch.cat([reference.key(x) for x in part])
    owners = torch.arange(len(part), dtype=torch.int64, device=device)
    owners = owners.repeat_interleave(sizes, output_size=keys.numel())
    return _Keys(numbers.start, len(part), keys, owners)


def _matching(block: _Keys, mask: Tensor) -> _Keys:
    return block._replace(keys=block.keys[mask], owners=block.owners[mask])


def _sum_before(counts: Tensor, place: Tensor) -> Tensor:
    """The sum of each row [T, n] up to its place [T, 1], without it: [T]."""
    return (counts.cumsum(1) - counts).gather(1, place).squeeze(1)


def _on_lower_ranks(counts: Tensor, group: Any) -> Tensor:
    """The sum of counts [T] over the ranks below this one."""
    distributed = torch.distributed
    gathered = counts.new_empty(distributed.get_world_size(group), len(counts))
    distributed.all_gather(list(gathered), counts, group=group)
    return gathered[: distributed.get_rank(group)].sum(0)
