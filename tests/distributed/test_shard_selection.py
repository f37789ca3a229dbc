"""How many of the smallest magnitudes each shard has, against the selection in one process."""

import pytest
import torch
import torch.distributed as dist

from issp.ops import reference
from issp.pruning import shard_selection
from issp.pruning.shard_selection import Span, count_selected
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
    shards, spans = [], []
    for weight in weights:
        rows = -(-len(weight) // world)
        parts = [weight[r * rows : (r + 1) * rows] for r in range(world)]
        shards.append(parts)
        start = sum(part.numel() for part in parts[:rank])
        spans.append(Span(start, start + parts[rank].numel(), weight.numel()))
    for share in (0.0, 0.01, 0.3, 0.5, 0.77, 0.95, 1.0):
        k = [max(1, round(share * w.numel())) for w in weights]
        actual = count_selected([s[rank] for s in shards], spans, k, None)
        expected = []
        for weight, span, count in zip(weights, spans, k, strict=True):
            chosen = reference.selected(weight.flatten(), count)
            expected.append(int(chosen[span.start : span.stop].sum()))
        results.append((actual.tolist(), expected))
    return results


def compare_all(bits):
    shard_selection._DIGIT = bits
    return {str(dtype): compare(dtype) for dtype in DTYPES}


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("bits", [8, 2])
def test_counts_are_those_of_the_selection_of_the_whole_weights(world, bits):
    for by_dtype in run_ranks(compare_all, world, bits):
        for dtype, pairs in by_dtype.items():
            for actual, expected in pairs:
                assert actual == expected, dtype


def count_collectives(layers):
    calls = []
    for name in ("all_reduce", "all_gather"):
        function = getattr(dist, name)
        setattr(dist, name, lambda *a, _f=function, _n=name, **kw: (calls.append(_n), _f(*a, **kw)))
    size, rank, world = 10_000, dist.get_rank(), dist.get_world_size()
    span = Span(size * rank, size * (rank + 1), size * world)
    generator = torch.Generator().manual_seed(rank)
    weights = [torch.randn(100, 100, generator=generator) for _ in range(layers)]
    k = [int(0.9 * span.numel)] * layers
    count_selected(weights, [span] * layers, k, None)
    return calls


@pytest.mark.parametrize(("layers", "reductions"), [(1, 3), (40, 4)])
def test_all_layers_share_the_collectives(layers, reductions):
    """One more digit: of 40 layers some have thresholds that lie further apart."""
    for calls in run_ranks(count_collectives, 2, layers):
        assert calls == ["all_reduce"] * reductions + ["all_gather"]
