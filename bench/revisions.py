"""Two revisions side by side: steps, optimizers, sparse ops and the hook's Python, in turn.

    python -m bench revisions --old PATH_OF_A_BUILT_CHECKOUT

Each revision runs in a process of its own and keeps its workloads; the two take turns, call by
call, in random order, so that a busy machine slows both alike. Only public names are used, which
every revision has. The table gives the median of the ratios new / old within a round.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

EXAMPLE = "python -m bench revisions --old ../issp-before --rounds 30"
ROOT = Path(__file__).resolve().parents[1]


def _step(name: str) -> Callable[[], object]:
    import torch

    import issp

    shapes = _shapes(name)
    weights = [torch.randn(shape) * 0.02 for shape in shapes]
    k = [issp.num_pruned(w.numel(), 0.95) for w in weights]
    state = issp.ops.ShrinkState(weights, k)
    return lambda: issp.ops.soft_shrink_(weights, state, 0.95)


def _shapes(name: str) -> list[tuple[int, ...]]:
    import torch
    from torch import nn

    import issp

    with torch.device("meta"):
        model = issp.models.build(name, scale=4)
    kinds = (nn.Conv2d, nn.Linear)
    return [tuple(m.weight.shape) for m in model.modules() if isinstance(m, kinds)]


def _optimizer(name: str, kind: str = "Adam") -> Callable[[], object]:
    import torch
    from torch import nn

    import issp

    # A model without a forward pass: the optimizer's work alone.
    layers = [nn.Linear(s[1] * s[2] * s[3] if len(s) > 2 else s[1], s[0]) for s in _shapes(name)]
    model = nn.Sequential(*layers)
    options = {"momentum": 0.9} if kind == "SGD" else {}
    optimizer = getattr(issp.optim, kind)(model.parameters(), lr=1e-4, **options)
    issp.attach(model, optimizer, sparsity=0.95)
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return optimizer.step


def _hook() -> Callable[[], object]:
    """Many tiny layers: what is timed is Python, once per step and once per layer."""
    import torch
    from torch import nn

    import issp

    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(200)))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, foreach=True)
    issp.attach(model, optimizer, sparsity=0.5)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    return optimizer.step


def _conv(rows: int, size: int) -> Callable[[], object]:
    import torch

    import issp

    weight = torch.randn(rows, rows, 3, 3)
    weight *= torch.rand_like(weight) < 0.05
    packed = issp.ops.sparse_pack(weight)
    x = torch.randn(1, rows, size, size)
    return lambda: issp.ops.sparse_conv2d(x, packed, padding=1)


def _matmul() -> Callable[[], object]:
    import torch

    import issp

    weight = torch.randn(180, 720)
    weight *= torch.rand_like(weight) < 0.05
    packed = issp.ops.sparse_pack(weight)
    x = torch.randn(2304, 720)
    return lambda: issp.ops.sparse_matmul(x, packed)


def _small_call() -> Callable[[], object]:
    import torch

    import issp

    packed = issp.ops.sparse_pack(torch.eye(8))
    x = torch.randn(4, 8)
    return lambda: issp.ops.sparse_matmul(x, packed)


def _small_training_call() -> Callable[[], object]:
    import torch

    import issp

    packed = issp.ops.sparse_pack(torch.randn(8, 8, 3, 3))
    packed.values.requires_grad_()
    x = torch.randn(1, 8, 6, 6, requires_grad=True)
    return lambda: issp.ops.sparse_conv2d(x, packed, padding=1).sum().backward()


CASES: dict[str, Callable[[], Callable[[], object]]] = {
    "step, EDSR-L": lambda: _step("edsr-l"),
    "step, SwinIR-light": lambda: _step("swinir-light"),
    "Adam and step, edsr-baseline": lambda: _optimizer("edsr-baseline"),
    "Adam and step, SwinIR-light": lambda: _optimizer("swinir-light"),
    "SGD and step, SwinIR-light": lambda: _optimizer("swinir-light", "SGD"),
    "hook of 200 tiny layers": _hook,
    "sparse conv 3x3 256->256, 48x48": lambda: _conv(256, 48),
    "sparse conv 3x3 60->60, 64x64": lambda: _conv(60, 64),
    "sparse matmul 720->180, 2304 tokens": _matmul,
    "sparse matmul 8->8, 4 tokens": _small_call,
    "sparse conv 8->8, 6x6, forward and backward": _small_training_call,
}


def serve() -> None:
    """The worker: reads a case per line, times one call (or enough of them), answers seconds."""
    import torch

    torch.set_grad_enabled(True)
    calls: dict[str, tuple[Callable[[], object], int]] = {}
    for line in sys.stdin:
        name = json.loads(line)
        if name not in calls:
            call = CASES[name]()
            for _ in range(3):
                call()
            start = time.perf_counter()
            call()
            calls[name] = (call, max(1, int(0.02 / (time.perf_counter() - start))))
        call, count = calls[name]
        start = time.perf_counter()
        for _ in range(count):
            call()
        print(json.dumps((time.perf_counter() - start) / count), flush=True)


class _Worker:
    def __init__(self, checkout: Path, threads: int) -> None:
        # The worker is this very file in both; the package is that of the checkout.
        path = os.pathsep.join([str(checkout), str(ROOT)])
        code = (
            f"import sys, issp; assert issp.__file__.startswith({str(checkout)!r}), issp.__file__; "
            f"import runpy; runpy.run_path({__file__!r}, run_name='worker')['serve']()"
        )
        env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        self._process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
            cwd=checkout,
        )

    def time(self, name: str) -> float:
        self._process.stdin.write(json.dumps(name) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the benchmark."""
    parser.add_argument("--old", type=Path, required=True, metavar="PATH", help="built checkout")
    parser.add_argument("--rounds", type=int, default=15, help="calls of each (default: 15)")
    parser.add_argument("--processes", type=int, default=3, help="of each revision (default: 3)")
    parser.add_argument("--threads", type=int, default=1, help="of each process (default: 1)")


def run(args: argparse.Namespace) -> None:
    """Prints the table."""
    # Not at the top: the worker of the old revision runs this file with that revision's package.
    from bench.harness.machine import machine_line
    from bench.harness.progress import counted
    from issp.utils.text import table

    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in CASES}
    for _ in range(args.processes):
        # New processes: where their memory lies changes a step by several per cent.
        roots = {"old": args.old.resolve(), "new": ROOT}
        workers = {w: _Worker(roots[w], args.threads) for w in random.sample(list(roots), 2)}
        for name in counted(list(CASES), "case"):
            for which in workers:
                workers[which].time(name)
            for _ in range(args.rounds):
                order = random.sample(list(workers), 2)
                rounds[name].append({which: workers[which].time(name) for which in order})
        for worker in workers.values():
            worker.close()
    rows = []
    for name, times in rounds.items():
        old, new = (statistics.median(r[which] for r in times) for which in ("old", "new"))
        ratio = statistics.median(r["new"] / r["old"] for r in times)
        rows.append([name, f"{1e6 * old:.1f}", f"{1e6 * new:.1f}", f"{ratio:.3f}"])
    print(f"{machine_line('cpu')}; {args.threads} threads each\n")
    print(table(["case", "old us", "new us", "new / old"], rows))
