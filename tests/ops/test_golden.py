"""The authors' code on random data (../shared/golden), reproduced bit for bit by every back end."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import issp
from issp.ops import ShrinkState, reference
from tests.asserts import assert_bitwise_equal
from tests.backends import BACK_ENDS
from tests.ops.test_parity import step

pytestmark = pytest.mark.sampled(slow_only=True, most=4)
REFERENCE = "reference"


def layers(golden):
    for i in range(len([name for name in golden.files if name.endswith("_w0")])):
        start, updates = torch.tensor(golden[f"l{i}_w0"]), torch.tensor(golden[f"l{i}_updates"])
        yield (
            start,
            updates,
            golden[f"l{i}_kept"],
            torch.tensor(golden[f"l{i}_w"]),
            golden[f"l{i}_pr"],
        )


def table_of(back_end):
    return issp.backends.implementations(REFERENCE) if back_end == REFERENCE else back_end.load()


def device_of(back_end):
    return "cpu" if back_end == REFERENCE else back_end.device


@pytest.mark.parametrize("bracket", [True, False], ids=["bracket", "no-bracket"])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["ist_pr95", "iht_pr95", "ist_pr99_tiny"])
@pytest.mark.parametrize("back_end", [REFERENCE, *BACK_ENDS], ids=str)
def test_soft_shrink(back_end, name, count, bracket, shared_dir, threads):
    """All layers of the file in one call, as in training."""
    threads(count)
    golden = np.load(shared_dir / "golden" / f"{name}.npz")
    starts, updates, kept, ends, ratios = zip(*layers(golden), strict=True)
    device = device_of(back_end)
    weights = [w.to(device, copy=True) for w in starts]
    k = [issp.num_pruned(w.numel(), float(r)) for w, r in zip(weights, ratios, strict=True)]
    state = ShrinkState(weights, k)
    for t in range(len(updates[0])):
        for w, update in zip(weights, updates, strict=True):
            w += update[t].to(device)
        step(table_of(back_end), weights, state, float(golden["ratio"]), bracket=bracket)
        for mask, expected in zip(state.masks(), kept, strict=True):
            assert (np.packbits(mask.cpu().numpy()) == expected[t]).all()
    for w, end in zip(weights, ends, strict=True):
        assert_bitwise_equal(w.cpu(), end, f"{back_end} on {name}")


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("back_end", [REFERENCE, *BACK_ENDS], ids=str)
def test_nm_prune(back_end, count, shared_dir, threads):
    """The authors' min_19:20: 19 of 20 consecutive weights in flattened order are shrunk."""
    threads(count)
    golden = np.load(shared_dir / "golden" / "nm_prune19of20.npz")
    pruned, of = (int(v) for v in golden["nm"])
    nm_prune = table_of(back_end)["nm_prune"]
    for start, updates, kept, end, _ in layers(golden):
        w = start.to(device_of(back_end))
        for t, update in enumerate(updates):
            w = w + update.to(w.device)
            w, mask = nm_prune(w, of - pruned, of, 1, "flat", float(golden["ratio"]))
            bits = reference.unpack(mask, w.numel()).cpu().numpy()
            assert (np.packbits(bits) == kept[t]).all()
        assert_bitwise_equal(w.cpu(), end, f"{back_end} on min_19:20")
