"""Assertions that name the first place where bits differ."""

from __future__ import annotations

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(x: Tensor) -> Tensor:
    """The tensor's bits as integers, on the CPU."""
    return x.detach().cpu().contiguous().view(INTEGERS[x.element_size()])


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


def assert_as_close_as_dense(actual: Tensor, exact: Tensor, dense: Tensor, what: str) -> None:
    """At most twice the error of the dense product of the same precision, plus one rounding.

    Args:
        actual: what is tested.
        exact: the result in float64, from the same inputs.
        dense: torch's dense product in the dtype of `actual`.
        what: names the case in the message.
    """
    assert actual.dtype == dense.dtype, f"{what}: {actual.dtype} is not {dense.dtype}"
    assert actual.shape == exact.shape, f"{what}: {actual.shape} is not {exact.shape}"
    finite = exact.dtype == torch.float64 and torch.isfinite(exact).all()
    assert finite, f"{what}: the exact result is not finite float64"
    if not exact.numel():
        return
    error, expected = ((x.detach().cpu().double() - exact.cpu()).abs() for x in (actual, dense))
    # In float64 the exact result itself is rounded: a few dozen terms, both sides.
    roundings = 16 if actual.dtype == torch.float64 else 1
    rounding = torch.finfo(actual.dtype).eps * float(exact.abs().max())
    allowed = 2 * float(expected.max()) + roundings * rounding
    if not bool((error <= allowed).all()):  # NaN is an error as well
        at = tuple((~(error <= allowed)).nonzero()[0].tolist())
        raise AssertionError(
            f"{what}: error {float(error.max()):.3e}, allowed {allowed:.3e}, first at {at}: "
            f"{actual[at].item()!r} instead of {exact[at].item()!r}"
        )
