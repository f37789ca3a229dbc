"""`run_ranks`: results by rank, and neither an error nor a hang of one rank keeps the others."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.distributed.ranks import RankError, needs_gloo, run_ranks

pytestmark = needs_gloo


def sum_of_ranks(first):
    total = torch.tensor([first + dist.get_rank()])
    dist.all_reduce(total)
    return dist.get_rank(), total


def fail(rank, how):
    if dist.get_rank() == rank:
        how()
    dist.barrier()


def divide():
    raise ZeroDivisionError("by rank 1")


def leave():
    os._exit(3)


def sleep():
    time.sleep(600)


def test_results_come_back_in_the_order_of_the_ranks():
    assert run_ranks(sum_of_ranks, 2, 10) == [(0, torch.tensor([21])), (1, torch.tensor([21]))]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (divide, "(?s)rank 1 failed:.*in divide.*ZeroDivisionError: by rank 1"),
        (leave, "rank 1 ended with status 3"),
    ],
)
def test_a_rank_that_fails_ends_all(how, message):
    with pytest.raises(RankError, match=message):
        run_ranks(fail, 2, 1, how)


@pytest.mark.full
def test_a_rank_that_hangs_is_ended_and_shown():
    began = time.monotonic()
    with pytest.raises(RankError, match=r"(?s)ranks \[0, 1\] hang after 3 s:.*in sleep"):
        run_ranks(fail, 2, 1, sleep, timeout=3)
    assert time.monotonic() - began < 30
