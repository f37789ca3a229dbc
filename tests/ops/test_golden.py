"""The authors' code on random data (tests/golden), reproduced bit for bit by every back end.

Names that end in "_small" are layers of the file of that name without the ending, which is used too
where ../shared/golden exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

import issp
from issp.ops import ShrinkState, reference
from tests import golden
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS
from tests.ops.test_parity import step

pytestmark = pytest.mark.sampled(slow_only=True, most=2)
REFERENCE = "reference"


@dataclass(frozen=True)
class GoldenLayer:
    """One layer: start [shape], updates [T, shape], kept [T, bytes], end [shape], its ratio."""

    start: Tensor
    updates: Tensor
    kept: np.ndarray
    end: Tensor
    ratio: float


def layers(arrays):
    return [
        GoldenLayer(
            start=torch.tensor(arrays[f"l{i}_w0"]),
            updates=torch.tensor(arrays[f"l{i}_updates"]),
            kept=arrays[f"l{i}_kept"],
            end=torch.tensor(arrays[f"l{i}_w"]),
            ratio=float(arrays[f"l{i}_pr"]),
        )
        for i in range(sum(name.endswith("_w0") for name in arrays.files))
    ]


def table_of(back_end):
    return issp.backends.implementations(REFERENCE) if back_end == REFERENCE else back_end.load()


def device_of(back_end):
    return "cpu" if back_end == REFERENCE else back_end.device


@pytest.mark.parametrize("bracket", [True, False], ids=["bracket", "no-bracket"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["ist_pr95_small", "iht_pr95", "ist_pr99_tiny", "ist_pr95"])
@pytest.mark.parametrize("back_end", [REFERENCE, *BACK_ENDS], ids=str)
def test_soft_shrink(back_end, name, count, bracket, threads):
    """All layers of the file in one call, as in training."""
    threads(count)
    arrays = golden.load(name)
    found, device = layers(arrays), device_of(back_end)
    weights = [layer.start.to(device, copy=True) for layer in found]
    k = [issp.num_pruned(layer.start.numel(), layer.ratio) for layer in found]
    state = ShrinkState(weights, k)
    for t in range(len(found[0].updates)):
        for w, layer in zip(weights, found, strict=True):
            w += layer.updates[t].to(device)
        step(table_of(back_end), weights, state, float(arrays["ratio"]), bracket=bracket)
        for mask, layer in zip(state.masks(), found, strict=True):
            assert (np.packbits(mask.cpu().numpy()) == layer.kept[t]).all()
    for w, layer in zip(weights, found, strict=True):
        assert_bitwise_equal(w.cpu(), layer.end, f"{back_end} on {name}")


@pytest.mark.sampled(slow_only=True, most=1)
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["nm_prune19of20_small", "nm_prune19of20"])
@pytest.mark.parametrize("back_end", [REFERENCE, *BACK_ENDS], ids=str)
def test_nm_prune(back_end, name, count, threads):
    """The authors' min_19:20: 19 of 20 consecutive weights in flattened order are shrunk."""
    threads(count)
    arrays = golden.load(name)
    pruned, of = (int(v) for v in arrays["nm"])
    nm_prune = table_of(back_end)["nm_prune"]
    for layer in layers(arrays):
        w = layer.start.to(device_of(back_end))
        for t, update in enumerate(layer.updates):
            w = w + update.to(w.device)
            w, mask = nm_prune(w, of - pruned, of, 1, "flat", float(arrays["ratio"]))
            bits = reference.unpack(mask, w.numel()).cpu().numpy()
            assert (np.packbits(bits) == layer.kept[t]).all()
        assert_bitwise_equal(w.cpu(), layer.end, f"{back_end} on min_{pruned}:{of}")
