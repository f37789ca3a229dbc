"""Many schedules for the kernels that test_speculation.py and test_auxiliary.py leave out."""

from __future__ import annotations

import pytest
import torch

from issp.ops import reference
from tests.asserts import assert_bitwise_equal
from tests.cases import DTYPES
from tests.kernels import cuda_emulator
from tests.kernels.cuda_emulator.model import normal, share

pytestmark = [cuda_emulator.needs_compiler, pytest.mark.sampled(most=4)]


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
