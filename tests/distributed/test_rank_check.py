"""The comparison of the ranks: what it finds and names, and that it costs nothing elsewhere."""

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import issp
from issp.utils.errors import DivergedRanksError
from tests.distributed.ranks import needs_gloo, run_ranks
from tests.pruning.methods.runs import network, train

pytestmark = needs_gloo


def attached(wrap=lambda model: model, seed=0, lr=1e-2, **arguments):
    model = network(seed)
    optimizer = torch.optim.SGD(model.parameters(), lr)
    return model, optimizer, issp.attach(wrap(model), optimizer, 0.8, **arguments)


def outcome(act):
    """Step by step until it fails: the message, and the steps that went well."""
    for step in range(20):
        try:
            act(step)
        except DivergedRanksError as error:
            return step, str(error)
    return 20, ""


def diverge(layer, at, rank):
    """The weights of one layer are others on some ranks from a step on; nothing is learned."""
    model, optimizer, pruner = attached(lr=0.0)
    issp.RankCheck(pruner, every=5)

    def act(step):
        train(model, optimizer, 1, first=step)
        if step == at and dist.get_rank() in rank:
            with torch.no_grad():
                model.get_submodule(layer).weight.mul_(1 + 2**-20)

    return outcome(act)


def skip_steps():
    model, optimizer, pruner = attached()

    def act(step):
        if not (step == 2 and dist.get_rank() == 1):
            train(model, optimizer, 1, first=step)
        issp.check_ranks(pruner)

    return outcome(act)


def come_late():
    """Rank 1 skips steps, so that it comes to the comparison later than rank 0, or never."""
    model, optimizer, pruner = attached()
    issp.RankCheck(pruner, every=5, patience=timedelta(seconds=1))
    if dist.get_rank() == 1:
        time.sleep(3)
        return None
    return outcome(lambda step: train(model, optimizer, 1, first=step))


def start_differently():
    _, _, pruner = attached(seed=dist.get_rank(), method="l1")
    return outcome(lambda _: issp.RankCheck(pruner))


def wrap_first():
    """The same, but DistributedDataParallel has given all the weights of rank 0."""
    _, _, pruner = attached(DistributedDataParallel, seed=dist.get_rank(), method="l1")
    issp.RankCheck(pruner)
    return pruner.masks()


def freeze_alone(freeze_at):
    """Rank 1 has its masks fixed; rank 0 has not, or both have, from another step on."""
    model, optimizer, pruner = attached(freeze_at=freeze_at)
    issp.RankCheck(pruner, every=7)

    def act(step):
        if step == 3 and dist.get_rank() == 1:
            pruner.freeze()
        train(model, optimizer, 1, first=step)

    return outcome(act)


def check_in_a_group():
    """Ranks 0 and 1 train one model, 2 and 3 another."""
    pair = dist.get_rank() // 2
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    model, optimizer, pruner = attached(seed=pair)
    issp.RankCheck(pruner, every=2, group=groups[pair])
    train(model, optimizer, 6)
    apart = outcome(lambda _: issp.check_ranks(pruner))[1]
    return pruner.step_count, apart


def test_it_names_the_first_layer_and_the_ranks():
    """The smallest change of a weight moves the threshold, before it changes a mask."""
    results = run_ranks(diverge, 4, "blocks.1.conv1", 6, (1, 3))
    assert results == results[:1] * 4, "all ranks raise the same error"
    step, message = results[0]
    assert step == 9  # every fifth step, of which the tenth is the first that can see it
    assert message == (
        "the ranks train different networks: at step 10 the selection of blocks.1.conv1 on ranks "
        "1, 3 is not that of rank 0; wrap the model in DistributedDataParallel before attaching, "
        "and let all ranks take or skip a step together"
    )


def test_steps_are_compared_first():
    results = run_ranks(skip_steps, 2)
    assert [step for step, _ in results] == [2, 2]
    assert "they have taken 3, 2 optimizer steps" in results[0][1]


@pytest.mark.full
def test_a_rank_that_does_not_come_is_not_waited_for_longer_than_asked():
    (step, message), _ = run_ranks(come_late, 2)
    assert step == 4
    assert message == (
        "not all ranks have come to the comparison of their masks at step 5: one has ended, or "
        "skips steps that others take"
    )


def test_masks_fixed_at_attach_are_compared_at_once():
    for step, message in run_ranks(start_differently, 2):
        assert step == 0 and "at step 0 the selection of head on rank 1" in message
    first, second = run_ranks(wrap_first, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("freeze_at", [None, 9])
def test_masks_fixed_on_some_ranks_are_found(freeze_at):
    results = run_ranks(freeze_alone, 2, freeze_at)
    assert all(message for _, message in results)


def test_ranks_of_another_group_train_another_model():
    results = run_ranks(check_in_a_group, 4)
    assert [step for step, _ in results] == [6] * 4
    assert all("selection of head on ranks 2, 3" in message for _, message in results)


def test_every_bit_of_a_mask_and_its_place_count():
    """Flipping any bit, or exchanging two words, changes the hash; nothing else does."""
    from issp.pruning.rank_check import _bucket_hashes

    _, _, pruner = attached(method="l1")
    (bucket,) = pruner.buckets
    words = bucket.state.packed
    before = _bucket_hashes(bucket)
    assert len(set(before)) == len(before) == len(bucket.layers)
    seen = {tuple(before)}
    for place in range(len(words)):
        for bit in (0, 13, 31):
            words[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
            seen.add(tuple(_bucket_hashes(bucket)))
            words[place] ^= torch.tensor(1 << bit, dtype=torch.int64).to(torch.int32)
    assert len(seen) == 1 + 3 * len(words)
    assert _bucket_hashes(bucket) == before


def test_without_ranks_it_does_nothing():
    model, optimizer, pruner = attached()
    check = issp.RankCheck(pruner, every=1)
    train(model, optimizer, 2)
    issp.check_ranks(pruner)
    check.close()
    assert pruner.step_count == 2 and not pruner._callbacks
    with pytest.raises(ValueError, match="every is 0: it must be a whole number"):
        issp.RankCheck(pruner, every=0)
