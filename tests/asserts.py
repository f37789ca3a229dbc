"""Assertions that name the first place where bits differ."""

from __future__ import annotations

import torch
from torch import Tensor

_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, on the CPU."""
    return x.detach().cpu().contiguous().view(_INTEGER[x.element_size()])


def assert_bitwise_equal(actual: Tensor, expected: Tensor, what: str) -> None:
    """Same dtype, shape and bits (NaN payloads and signs of zero included)."""
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype} is not {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    different = bits(actual) != bits(expected)
    if different.any():
        at = tuple(different.nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: {int(different.sum())} of {different.numel()} differ, first at {at}: "
            f"{actual[at].item()!r} instead of {expected[at].item()!r}"
        )
