"""Calls with units of weights go to Triton where the CUDA library serves the others."""

from __future__ import annotations

PROGRAM = """
import importlib
import torch
import issp
from issp import Keep, Unit, backends
from issp.ops import ShrinkState, reference

backends._active["cpu"] = "cuda"
for _ in range(2):
    backends.share_units("CPU")
backends._active["cpu"] = "cpp"
kernels = importlib.import_module(backends._import_triton().__name__ + ".soft_shrink")
seen = []
plain = torch.ops.issp.soft_shrink_


def run(op, patterns, k):
    torch.manual_seed(0)
    w = [torch.randn(8, 12, 3, 3), torch.randn(500)]
    s = ShrinkState(w, k, patterns)
    op(w, s.k, 0.9, s.thresholds, s.packed, s.flips, s.scratch, None, True, s.patterns)
    return [*w, s.thresholds, s.packed, s.flips]


original = kernels.launch_score
kernels.launch_score = lambda *args: (seen.append(1), original(*args))
for patterns, k, launches in (
    ([Unit(4, 2), None], [400, 100], 1),
    ([Keep(2, of=4), None], [432, 100], 0),
    (None, [400, 100], 0),
):
    del seen[:]
    actual, expected = (run(op, patterns, k) for op in (plain, reference.soft_shrink_))
    for x, y in zip(actual, expected, strict=True):
        assert torch.equal(x, y), patterns
    assert len(seen) == launches, patterns
model = torch.nn.Linear(64, 32)
opt = issp.optim.Adam(model.parameters(), 1e-2)
pruner = issp.attach(model, opt, 0.9, unit=(16, 2))
del seen[:]
model(torch.randn(4, 64)).sum().backward()
opt.step()
assert len(seen) == 1 and opt.report[0].fused, opt.report
print("shared")
"""


def test_units_go_to_triton_and_the_rest_stays_native(fresh_python):
    """On the CPU's key, with Triton interpreted: what the first unit on a GPU registers."""
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = fresh_python.run(PROGRAM, warnings="error", **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "shared" in done.stdout
