"""How much memory the ops take, measured in a fresh process by its peak resident size."""

from __future__ import annotations

import subprocess
import sys

import pytest

from issp import backends

SCRIPT = """
import torch, issp
torch.set_num_threads(2)
n, k = 100_000_000, 95_000_000
w = torch.empty(n).normal_()
# Not getrusage's maximum: that of a new process starts at its parent's.
def peak():
    line = next(x for x in open("/proc/self/status") if x.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
small = torch.randn(10_000)
issp.ops.soft_shrink_([small], issp.ops.ShrinkState([small], [9_000]))
before = peak()
state = issp.ops.ShrinkState([w], [k])
for bracket in (False, True, True):
    issp.ops.soft_shrink_([w], state, bracket=bracket)
tau = issp.ops.magnitude_threshold([w], [k])
after = peak()
below = sum(int((part.abs() <= tau).sum()) for part in w.split(1 << 20))
kept = sum(int(part.sum()) for part in state.masks()[0].split(1 << 20))
print((after - before) / n, below, kept)
"""


@pytest.mark.full
@pytest.mark.skipif(backends.active("cpu") != "cpp", reason="the CPU library is not built here")
def test_a_hundred_million_weights_in_half_a_byte_each():
    """State (1/8 byte of mask) and scratch; torch.quantile refuses above 16 M elements."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    bytes_per_weight, below, kept = done.stdout.split()
    # 0.125 of mask, 0.4 of scratch; magnitude_threshold's own 0.4 come when asked for
    assert 0.1 < float(bytes_per_weight) < 0.125 + 0.5 + 0.5
    assert (int(below), int(kept)) == (95_000_000, 5_000_000)
