"""Does soft shrinkage slow a CPU? Half of the hidden units are dead: their weights only shrink.

Prints the median milliseconds per training iteration of every 500, for the fused step and for the
same selection followed by a plain `w *= 0.95`, which leaves denormals. Neither flushes to zero.

    python -m bench.denormals --iterations 2000
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import issp
from bench.harness.machine import machine_line
from bench.harness.progress import counted
from bench.harness.table import Column, Row, Table

_EACH = 500  # iterations to a median


def network() -> torch.nn.Module:
    """A 16-feature EDSR whose first convolutions have eight dead outputs each."""
    torch.manual_seed(0)
    model = issp.models.EDSR(3, 3, num_feat=16, num_block=8, upscale=2, res_scale=1.0)
    with torch.no_grad():
        for block in model.body:
            block.conv1.bias[:8] = -1e3
    return model


@torch.no_grad()
def plain_shrink(weights: list[torch.Tensor]) -> None:
    """The step without the rule that writes results below the smallest normal number as zero."""
    for w in weights:
        k = issp.num_pruned(w.numel(), 0.95)
        w.view(-1)[torch.topk(w.abs().flatten(), k, largest=False).indices] *= 0.95


def denormals(model: torch.nn.Module) -> int:
    """How many weights are denormal."""
    tiny = torch.finfo(torch.float32).tiny
    return sum(int(((p != 0) & (p.abs() < tiny)).sum()) for p in model.parameters())


def measure(fused: bool, iterations: int) -> Row:
    """One row of the table."""
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), 2e-4, betas=(0.9, 0.99))
    weights = [m.weight for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    if fused:
        issp.attach(model, optimizer, sparsity=0.95, shrink=0.95)
    lq, gt = torch.rand(4, 3, 24, 24), torch.rand(4, 3, 48, 48)
    times = []
    for _ in counted(range(iterations), "iteration"):
        start = time.perf_counter()
        loss = (model(lq) - gt).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not fused:
            plain_shrink(weights)
        times.append(time.perf_counter() - start)
    cells = {"what": "fused step" if fused else "plain w *= 0.95", "denormals": denormals(model)}
    cells |= {f"to {i}": statistics.median(times[i - _EACH : i]) for i in _marks(iterations)}
    return Row(cells)


def _marks(iterations: int) -> range:
    return range(_EACH, iterations + 1, _EACH)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.denormals", description=__doc__)
    parser.add_argument("--iterations", type=int, default=2000, help="a multiple of 500")
    iterations = parser.parse_args().iterations
    torch.set_num_threads(2)
    columns = [Column("what", "iteration")]
    columns += [Column(f"to {i}", f"to {i}", "ms", "{:.1f}".format) for i in _marks(iterations)]
    columns += [Column("denormals", "denormal weights at the end")]
    rows = [measure(fused, iterations) for fused in (True, False)]
    title = f"training with dead units, medians of {_EACH} iterations"
    print(Table(title, machine_line("cpu"), columns, rows).markdown())


if __name__ == "__main__":
    main()
