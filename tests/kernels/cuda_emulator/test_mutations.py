"""Every barrier, fence and wait of the CUDA kernels is needed: without it some schedule notices."""

from __future__ import annotations

import torch

from issp.ops import reference
from tests.asserts import assert_bitwise_equal
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import NAN, Model, normal, share
from tests.kernels.cuda_emulator.test_nm_step import MIXES, model_of
from tests.kernels.cuda_emulator.test_nm_step import update_many as update_groups
from tests.kernels.cuda_emulator.test_speculation import update_many

pytestmark = cuda_emulator.needs_compiler
SEEDS = range(12)


def _step(seed: int, removed: int) -> None:
    """Every path of the two launches once, and the auxiliary ops."""
    cuda_emulator.seed(seed, removed=removed, small=True)
    ties = [
        torch.randint(-40, 41, (n,), generator=torch.Generator().manual_seed(n)) / 32
        for n in (400, 600, 3000)
    ]
    model = Model(ties, share(ties, 0.7))
    model.step()  # searched
    model.step()  # too many candidates
    large = normal(450, 1620, 3500, seed=seed)
    model = Model(large, share(large, 0.9), previous=NAN)
    model.step()
    model.perturb(1e-3, seed)
    model.step()
    model.step(bracket=False)
    few = normal(5000, seed=seed)[0]
    few[::91] = 3.0
    few[1:1000:2] *= 1e-37  # products that are flushed
    model = Model([few], [int((few.abs() < 3).sum()) + 40], previous=3.0)
    model.step()  # ties among the candidates
    model.step()  # undone
    for side in model.sides:
        side["k"].zero_()
    model.step()
    assert_bitwise_equal(
        cuda_emulator.nm_prune(large[0], 3, 450, 1, "flat")[0],
        reference.nm_prune(large[0], 3, 450, 1, "flat")[0],
        "n of m",
    )
    assert cuda_emulator.count_zeros(ties).tolist() == [int((w == 0).sum()) for w in ties]
    actual = cuda_emulator.magnitude_statistics(large)
    torch.testing.assert_close(actual, reference.magnitude_statistics(large), rtol=1e-12, atol=0)


def _update(seed: int, removed: int) -> None:
    update_many("adam", "coupled decay", [seed], removed=removed)


def _grouped(seed: int, removed: int) -> None:
    """N:M tensors of one box and of several, by comparison and by warps."""
    cuda_emulator.seed(seed, removed=removed, small=True)
    for mix in MIXES:
        model = model_of(*mix, seed=seed)
        model.step()


def _grouped_update(seed: int, removed: int) -> None:
    update_groups("adam", "coupled decay", [seed], steps=1, removed=removed)


WORKS = (_step, _update, _grouped, _grouped_update)


def _is_noticed(site: int) -> bool:
    for seed in SEEDS:
        for work in WORKS:
            try:
                work(seed, site)
            except (RuntimeError, AssertionError):
                return True
    return False


def test_every_barrier_fence_and_wait_is_needed():
    """Leaves out one after the other; each file's sites are found by running everything once."""
    try:
        for work in WORKS:
            work(0, -1)
        library = cuda_emulator.library(small=True)
        names = [library.emulator_site_name(i).decode() for i in range(library.emulator_sites())]
        own = [i for i, name in enumerate(names) if not name.startswith("planted")]
        assert {"speculate", "settle", "nm_shrink"} <= {n.split(".")[0] for n in names}
        assert [names[site] for site in own if not _is_noticed(site)] == []
    finally:
        cuda_emulator.machine()
