"""Rice codes of positions: exact, near the entropy, and refused where they are none."""

import math

import numpy as np
import pytest

from issp.deploy import rice_code


def positions(share, end, seed=0):
    return np.flatnonzero(np.random.default_rng(seed).random(end) < share)


def entropy_bytes(share, end):
    return -end / 8 * sum(p * math.log2(p) for p in (share, 1 - share))


def test_the_bytes_are_those_of_the_text():
    """Gaps 3, 0, 6 with r = 1: zeros and ones 01 1 0001, low bits 1 0 0, lowest bit first."""
    r, code = rice_code.encode(np.array([3, 4, 11]))
    assert (r, code.tolist()) == (1, [0b1000110, 0b001])
    assert rice_code.decode(code, 1, 3, 12).tolist() == [3, 4, 11]


def test_without_low_bits_it_is_a_bit_mask():
    chosen = positions(0.6, 1000)
    r, code = rice_code.encode(chosen)
    mask = np.zeros(1000, np.uint8)
    mask[chosen] = 1
    assert (
        r == 0
        and code.tobytes() == np.packbits(mask[: chosen[-1] + 1], bitorder="little").tobytes()
    )


@pytest.mark.parametrize("share", [0.5, 0.25, 0.1, 0.05, 0.01, 0.005])
def test_random_positions_take_little_more_than_their_entropy(share):
    end = 400_000
    chosen = positions(share, end)
    r, code = rice_code.encode(chosen)
    assert np.array_equal(rice_code.decode(code, r, len(chosen), end), chosen)
    assert len(code) <= 1.02 * entropy_bytes(len(chosen) / end, end)


@pytest.mark.parametrize(
    "chosen", [[], [0], [7], [10**9], [0, 10**9], list(range(40)), [5, 2**31]], ids=len
)
def test_extremes_come_back(chosen):
    r, code = rice_code.encode(np.array(chosen, np.int64))
    end = chosen[-1] + 1 if chosen else 0
    assert rice_code.decode(code, r, len(chosen), end).tolist() == chosen
    if chosen:
        with pytest.raises(ValueError, match=f"position {end - 1} is beyond the {end - 1}"):
            rice_code.decode(code, r, len(chosen), end - 1)


def test_no_other_bytes_are_taken_for_a_code():
    """One code for one set of positions: bits that say nothing are zeros, and no byte is spare."""
    chosen = positions(0.1, 500)
    r, code = rice_code.encode(chosen)
    low = -(-len(chosen) * r // 8)
    assert len(chosen) * r % 8 and r
    spare = np.insert(code, len(code) - low, 0)
    filled = code.copy()
    filled[-1] |= 128
    for wrong, count in [(spare, len(chosen)), (filled, len(chosen)), (code, len(chosen) + 1)]:
        with pytest.raises(ValueError, match="are not the code of|are too few for"):
            rice_code.decode(wrong, r, count, 500)
    with pytest.raises(ValueError, match="0 bytes are too few for 1 positions"):
        rice_code.decode(code[:0], 0, 1, 500)


def test_sums_beyond_64_bits_are_refused_and_not_wrapped():
    code = np.full(8, 255, np.uint8)
    for r in range(rice_code.MOST_LOW_BITS + 1):
        for count in range(1, 65):
            with pytest.raises(ValueError):
                rice_code.decode(code, r, count, 1)
