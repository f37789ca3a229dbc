"""How many of the smallest magnitudes each shard has, against the selection in one process."""

import pytest
import torch
import torch.distributed as dist

from issp.ops import reference
from issp.pruning import shard_selection
from issp.pruning.shard_selection import count_selected
from tests.distributed.ranks import needs_gloo, run_ranks

pytestmark = needs_gloo
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def whole_weights(dtype):
    """Uneven and empty shards, ties over all ranks, and every kind of number."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(13, 5, 3, generator=generator, dtype=torch.float64).to(dtype)
    tied = torch.randint(-2, 3, (9, 8), generator=generator).to(dtype)
    special = torch.tensor([float("nan"), 0.0, -0.0, float("inf"), -1.0, 1e-5]).to(dtype)
    special = torch.cat([special, -special, torch.tensor([1], dtype=torch.int64).to(dtype) * 6e-8])
    denormal = torch.arange(8, dtype=reference.INTEGER[dtype]).view(dtype).repeat(5).view(-1, 1)
    one_row, zeros = torch.ones(1, 7, dtype=dtype), torch.zeros(6, dtype=dtype)
    return [random, tied, special, denormal, one_row, zeros]


def compare(dtype):
    """(the counts of this rank, those of the reference) for several k of all weights at once."""
    rank, world, results = dist.get_rank(), dist.get_world_size(), []
    weights = whole_weights(dtype)
    shards = []
    for weight in weights:
        rows = -(-len(weight) // world)
        shards.append([weight[r * rows : (r + 1) * rows] for r in range(world)])
    for share in (0.0, 0.01, 0.3, 0.5, 0.77, 0.95, 1.0):
        k = [round(share * w.numel()) for w in weights]
        actual = count_selected([s[rank].contiguous() for s in shards], torch.tensor(k), None)
        expected = []
        for weight, parts, count in zip(weights, shards, k, strict=True):
            chosen = reference.selected(weight.flatten(), count)
            start = sum(part.numel() for part in parts[:rank])
            expected.append(int(chosen[start : start + parts[rank].numel()].sum()))
        results.append((actual.tolist(), expected))
    return results


def compare_all(block):
    shard_selection._BLOCK = block
    return {str(dtype): compare(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("block", [1, 1 << 22], ids=["one weight a block", "one block"])
def test_counts_are_those_of_the_selection_of_the_whole_weights(world, block):
    for by_dtype in run_ranks(compare_all, world, block):
        for dtype, pairs in by_dtype.items():
            for actual, expected in pairs:
                assert actual == expected, dtype


def count_collectives():
    calls = []
    for name in ("all_reduce", "all_gather"):
        function = getattr(dist, name)
        setattr(dist, name, lambda *a, _f=function, _n=name, **kw: (calls.append(_n), _f(*a, **kw)))
    weights = [torch.randn(4, 4) for _ in range(50)]
    count_selected(weights, torch.full((50,), 7), None)
    return calls


def test_a_bucket_of_float32_needs_four_collectives():
    for calls in run_ranks(count_collectives, 2):
        assert calls == ["all_reduce"] * 3 + ["all_gather"]
