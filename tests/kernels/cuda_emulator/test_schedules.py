"""Many schedules for the kernels that test_resident.py and test_auxiliary.py leave out."""

from __future__ import annotations

import pytest
import torch

from issp.ops import reference
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import Model, normal, share

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]


@pytest.fixture(autouse=True)
def _machine():
    yield
    cuda_emulator.machine()


@pytest.mark.parametrize("previous", [None, 0.3, 5.0], ids=["cold", "too low", "too high"])
def test_the_streamed_step(previous):
    """Two launches; the second searches where the bracket misses, with few or many blocks."""
    cuda_emulator.machine(streamed=True)
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, resident=(1, 2, 5, 40)[seed % 4], small=True)
        weights = normal(700, 40, 1500, dtype=DTYPES[seed % 7 % 4], seed=seed)
        guess = {} if previous is None else {"previous": previous}
        model = Model(weights, share(weights, 0.9 if seed % 3 else 0.5), **guess)
        model.step()
        model.perturb(1e-4, seed)
        model.step()


def test_magnitude_threshold():
    table = cuda_emulator.implementations()
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, small=True)
        weights = normal(700, 33, 1500, dtype=DTYPES[seed % 4], seed=seed)
        k = share(weights, (0.0, 0.3, 0.9, 1.0)[seed % 5 % 4])
        expected = reference.magnitude_threshold(weights, k)
        assert_bitwise_equal(table["magnitude_threshold"](weights, k), expected, f"seed {seed}")


@pytest.mark.parametrize("v, layout", [(1, "channels"), (4, "channels"), (1, "flat")])
def test_nm_prune(v, layout):
    table = cuda_emulator.implementations()
    for seed in cuda_emulator.schedules():
        cuda_emulator.seed(seed, small=True)
        source = torch.Generator().manual_seed(seed)
        weight = torch.randn((8, 40, 3, 1), generator=source).to(DTYPES[seed % 4])
        n, m = ((2, 4), (1, 10), (3, 20))[seed % 3]
        expected, mask = reference.nm_prune(weight, n, m, v, layout, 0.95)
        pruned, packed = table["nm_prune"](weight, n, m, v, layout, 0.95)
        assert_bitwise_equal(pruned, expected, f"seed {seed}, {n} of {m}")
        assert_bitwise_equal(packed, mask, f"mask, seed {seed}, {n} of {m}")
