"""The reference against an independent statement of the rules: numpy and Python's own floats."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import issp
from issp.ops import reference
from issp.ops.schemas import mask_layout, mask_words, scratch_words
from tests.cases import DTYPES, NAMED


@pytest.mark.parametrize("case", NAMED, ids=lambda c: c.name)
def test_selection_is_a_stable_sort_of_magnitudes(case):
    for w, k in zip(case.build(torch.float32), case.k, strict=True):
        magnitudes = np.abs(w.flatten().numpy())  # numpy sorts NaN last, as the rule does
        order = np.argsort(magnitudes, kind="stable")[:k]
        chosen = reference.selected(w.view(-1), k)
        assert chosen.sum() == k
        if not np.isnan(magnitudes).any():
            assert set(chosen.nonzero()[:, 0].tolist()) == set(order.tolist())
        assert not np.isnan(magnitudes[order]).any() or np.isnan(magnitudes).sum() > w.numel() - k


def test_shrunk_float32_is_one_rounded_multiplication_then_the_zero_rule():
    w = np.concatenate([c.build(torch.float32)[0].flatten().numpy() for c in NAMED])
    product = w * np.float32(0.95)
    tiny = np.abs(product) < np.finfo(np.float32).tiny
    expected = np.where(np.isnan(w), w, np.where(tiny, np.copysign(np.float32(0), w), product))
    actual = reference.shrunk(torch.from_numpy(w), 0.95).numpy()
    assert (actual.view(np.int32) == expected.view(np.int32)).all()


def test_shrunk_float16_keeps_its_denormals():
    w = torch.tensor([6e-8, 1e-6, 6.1e-5], dtype=torch.float16)
    product = (w.numpy().astype(np.float32) * np.float32(0.95)).astype(np.float16)
    assert reference.shrunk(w, 0.95).tolist() == product.tolist()
    assert (product != 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_thresholding_gives_zeros_of_the_weights_sign(dtype):
    w = torch.tensor([1.0, -1.0, float("inf"), -float("inf"), 0.0, -0.0], dtype=dtype)
    zeros = reference.shrunk(w, 0.0)
    assert (zeros == 0).all()
    assert torch.signbit(zeros).tolist() == torch.signbit(w).tolist()


def test_the_bound_is_judged_after_rounding():
    """Half a denormal step below the smallest normal number, rounding to even turns up to it."""
    tiny = torch.finfo(torch.float32).tiny
    w = torch.tensor([1.0, 1 - 2**-24, 1 - 2**-23], dtype=torch.float64) * tiny * 2
    assert reference.shrunk(w.float(), 0.5).tolist() == [tiny, tiny, 0.0]


def test_pack_puts_the_first_element_in_the_lowest_bit():
    kept = torch.zeros(40, dtype=torch.bool)
    kept[[0, 5, 31, 33]] = True
    words = reference.pack(kept)
    assert len(words) == mask_words(40) == 16
    assert words[:3].tolist() == [1 + 32 - 2**31, 2, 0]
    assert torch.equal(reference.unpack(words, 40), kept)


def test_every_mask_starts_on_its_own_line():
    assert mask_layout([1, 512, 513, 10]) == ([0, 16, 32, 64], 80)


def test_scratch_is_at_most_half_a_byte_per_weight_on_the_real_networks():
    swinir = [1620] + [10800, 3600, 7200, 7200] * 24 + [32400] * 5 + [25920]
    edsr = [6912] + [589824] * 65 + [2359296] * 2 + [6912]
    for numels in (swinir, edsr, [100_000_000]):
        assert 4 * scratch_words(numels) <= sum(numels) / 2


@pytest.mark.parametrize(
    ("n", "ratio", "k"),
    [(1620, 0.95, 1539), (25920, 0.95, 24624), (2359296, 0.95, 2241332), (10, 0.99, 9)]
    + [(15, 0.99, 14), (25, 0.99, 24), (1000, 1.0, 995), (1, 0.95, 0), (7, 0.0, 0)],
)
def test_num_pruned(n, ratio, k):
    assert issp.num_pruned(n, ratio) == k


def test_num_pruned_refuses_a_percentage():
    with pytest.raises(ValueError, match="0..1"):
        issp.num_pruned(100, 95)
