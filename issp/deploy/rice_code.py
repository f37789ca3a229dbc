"""Ascending positions in few bits: Rice codes of the gaps between them.

With parameter r, a gap g (positions skipped since the last one) is g >> r zeros and a one, and its
r low bits apart from that. r = 0 is a bit mask. For random positions the best r is within some 2 %
of the entropy.

Source: Rice and Plaunt, "Adaptive variable-length coding", 1971; Golomb, 1966.
"""

from __future__ import annotations

import numpy as np

MOST_LOW_BITS = 32


def encode(positions: np.ndarray) -> tuple[int, np.ndarray]:
    """The parameter r that needs the fewest bits, of those that suit the mean gap, and the code.

    Args:
        positions: int64 [E], strictly ascending, from 0 on.

    Returns:
        r, and the bytes: the bits of the zeros and ones, then the low bits, each filled up to a
        whole byte with zeros; the first bit of a byte is its lowest.
    """
    gaps = np.diff(positions, prepend=-1) - 1
    typical = int(gaps.mean()).bit_length() if len(gaps) else 0
    near = {0, *range(max(0, typical - 2), typical + 1)}
    r = min(sorted(near), key=lambda r: int((gaps >> r).sum()) + len(gaps) * (r + 1))
    ones = np.cumsum((gaps >> r) + 1) - 1
    unary = np.zeros(int(ones[-1]) + 1 if len(ones) else 0, np.uint8)
    unary[ones] = 1
    low = (gaps[:, None] >> np.arange(r)) & 1
    parts = [np.packbits(bits, bitorder="little") for bits in (unary, low.astype(np.uint8))]
    return r, np.concatenate(parts)


def decode(code: np.ndarray, r: int, count: int, end: int) -> np.ndarray:
    """The positions that `encode` was given.

    Args:
        code: the bytes.
        r: the parameter, 0 to `MOST_LOW_BITS`.
        count: the number of positions, E.
        end: all of them are below this.

    Returns:
        int64 [E], strictly ascending.

    Raises:
        ValueError: the code is none of so many positions, or one of them is not below `end`.
    """
    low_bytes = -(-count * r // 8)
    high_bytes = len(code) - low_bytes
    if not count <= 8 * high_bytes:
        raise ValueError(f"{len(code)} bytes are too few for {count} positions")
    high = np.unpackbits(code[:high_bytes], bitorder="little")
    ones = np.flatnonzero(high)
    low_bits = np.unpackbits(code[high_bytes:], bitorder="little")
    needed = -(-(int(ones[-1]) + 1) // 8) if len(ones) else 0
    if len(ones) != count or high_bytes != needed or low_bits[count * r :].any():
        raise ValueError(f"its {len(code)} bytes are not the code of {count} positions")
    low = low_bits[: count * r].reshape(count, r) @ (1 << np.arange(r, dtype=np.int64))
    highs = np.diff(ones, prepend=-1) - 1
    # In Python's numbers first: these cannot overflow.
    last = (int(highs.sum()) << r) + int(low.sum()) + count - 1
    if last >= end:
        raise ValueError(f"position {last} is beyond the {end} of the weight")
    return np.cumsum((highs << r) + low + 1) - 1
