"""What a step costs in Python beyond the ops: hook, issp.optim and torch's, for many tiny tensors.

All ops, torch's as well, are replaced by functions that do nothing, and torch's wrapper around
`step` is timed in the same rounds and taken off. Cold: 64 MB are written before each step. Each row
has a process of its own, since every optimizer's step asks all pruners of a process.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import subprocess
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import optimizer as torch_optimizer

import issp
from bench.harness import options
from bench.harness.errors import BenchmarkFailed
from bench.harness.machine import machine_line
from bench.harness.progress import counted
from bench.harness.table import Column, Row, Table
from issp import ops
from issp.pruning import buckets
from issp.utils.files import user_path

EXAMPLE = "example: python -m bench overhead --tensors 480 --rounds 500"
ROOT = Path(__file__).resolve().parents[1]
_OPS = ("soft_shrink_", "adam_soft_shrink_", "sgd_soft_shrink_")
_OPS_OF_TORCH = ("_foreach_", "_fused_")
_VERSIONS = "versions of the weights"
_EVICTED = 64 << 20  # bytes


class IdleAdam(torch.optim.Adam):
    """Its step does nothing; it has Adam's state."""

    def step(self, closure: Any = None) -> None:
        """Nothing."""

    def fill(self) -> None:
        """Creates the state of every parameter."""
        for group in self.param_groups:
            for p in group["params"]:
                moments = {x: torch.zeros_like(p) for x in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros(()), **moments}


def _sgd(of: Any, **options: Any) -> Callable[[Any], Any]:
    return lambda p: of.SGD(p, lr=1e-3, momentum=0.9, **options)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "hook of any optimizer": IdleAdam,
    "issp.optim.Adam": issp.optim.Adam,
    "torch Adam(fused=True)": lambda p: torch.optim.Adam(p, fused=True),
    "torch Adam(foreach=True)": lambda p: torch.optim.Adam(p, foreach=True),
    "issp.optim.SGD": _sgd(issp.optim),
    "torch SGD(fused=True)": _sgd(torch.optim, fused=True),
}
STAGES = ("pruning", "frozen")
_ALONE = "no pruner"
CASES = [
    (name, stage)
    for name in OPTIMIZERS
    for stage in ([_ALONE] if name.startswith("torch") else []) + list(STAGES)
    if "foreach" not in name or stage == _ALONE
] + [(_VERSIONS, _ALONE)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench overhead`."""
    parser.add_argument("--tensors", type=int, default=480, help="default 480, as CAT-R prunes")
    parser.add_argument("--rounds", type=int, default=300, help="default 300")
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Prints the table.

    Raises:
        ValueError: an argument out of range.
        BenchmarkFailed: a worker ended.
    """
    options.at_least_one(args, "tensors", "rounds")
    options.folders_exist(args.out)
    if args.worker:
        print(json.dumps(measure(*args.worker, args.tensors, args.rounds)))
        return
    columns = [
        Column("case", "case"),
        Column("warm", "warm, least", "us"),
        Column("warm median", "median", "us"),
        Column("cold", "cold, least", "us"),
        Column("cold median", "median", "us"),
        Column("calls", "calls of functions"),
    ]
    title = f"Python per step beyond the op, {args.tensors} tensors in one call"
    table = Table(title, machine_line("cpu"), columns)
    for name, stage in counted(CASES, "case"):
        table.rows.append(Row(_measure_apart(name, stage, args) | {"case": f"{name}, {stage}"}))
    table.notes = [
        "Beyond the ops and torch's own wrapper around step, which ran in turn with it. All "
        "optimizers read the gradients and the entries of their state in it.",
        "torch's optimizers, pruning or frozen: with the hook, as issp.optim does all of it alone.",
        "The versions of weights that autograd compares are counted up by torch's ops in C++ and "
        "by a call beside ours: left out of all rows but the last.",
        "Cold: 64 MB were written before each step. Calls: of Python's functions, and of C "
        "functions from Python, in one whole step, torch's wrapper included.",
    ]
    print(table.markdown())
    if args.out:
        args.out.write_text(table.markdown())


def _measure_apart(name: str, stage: str, args: argparse.Namespace) -> dict[str, Any]:
    numbers = ["--tensors", str(args.tensors), "--rounds", str(args.rounds)]
    command = [sys.executable, "-m", "bench", "overhead", "--worker", name, stage, *numbers]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, check=False)
    if done.returncode:
        raise BenchmarkFailed(f"a worker ended: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout)


def measure(name: str, stage: str, tensors: int, rounds: int) -> dict[str, Any]:
    """The cells of a row, in this process; the ops do nothing from then on."""
    torch.set_num_threads(1)
    alone, step = _steps(name, stage, tensors)
    alone = _without_hooks(alone)
    evicted = torch.zeros(_EVICTED // 4)
    cells: dict[str, Any] = {"calls": _calls(step)}
    gc.disable()
    for state in ("warm", "cold"):
        times: dict[Any, list[float]] = {alone: [], step: []}
        for _ in range(rounds):
            for call in random.sample([alone, step], 2):
                if state == "cold":
                    evicted.add_(1.0)
                else:
                    call()
                begin = time.perf_counter()
                call()
                times[call].append(time.perf_counter() - begin)
        cells[state] = min(times[step]) - min(times[alone])
        medians = statistics.median(times[step]), statistics.median(times[alone])
        cells[f"{state} median"] = medians[0] - medians[1]
    return cells


def _steps(name: str, stage: str, tensors: int) -> tuple[Any, Any]:
    """The step of an idle optimizer without a pruner, and that of the row."""
    alone = IdleAdam(nn.Linear(4, 4).parameters())
    model = nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(tensors)))
    if name == _VERSIONS:
        weights = list(model.parameters())
        return (lambda: None), (lambda: torch.autograd.graph.increment_version(weights))
    opt: Any = OPTIMIZERS[name](model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if isinstance(opt, IdleAdam):
        opt.fill()
    pruner = None if stage == _ALONE else issp.attach(model, opt, sparsity=0.5)
    opt.step()
    if pruner is not None and stage == "frozen":
        pruner.freeze()
        opt.step()
    _replace_ops()
    return alone.step, opt.step


def _replace_ops() -> None:
    for op in _OPS:
        setattr(ops, op, lambda *_: None)
    buckets.write_zeros_ = lambda *_: None  # type: ignore[assignment]
    torch.autograd.graph.increment_version = lambda _: None  # type: ignore[assignment]
    for name in dir(torch):
        if name.startswith(_OPS_OF_TORCH):
            setattr(torch, name, lambda first, *_, **__: first)


def _without_hooks(step: Callable[[], None]) -> Callable[[], None]:
    """The step without the hook on all optimizers of the process, which pruners register."""

    def call() -> None:
        hooks = torch_optimizer._global_optimizer_post_hooks
        torch_optimizer._global_optimizer_post_hooks = OrderedDict()
        step()
        torch_optimizer._global_optimizer_post_hooks = hooks

    return call


def _calls(step: Any) -> str:
    counts = {"call": 0, "c_call": 0}

    def count(frame: Any, event: str, argument: Any) -> None:
        if event in counts:
            counts[event] += 1

    step()
    sys.setprofile(count)
    step()
    sys.setprofile(None)
    return f"{counts['call']} + {counts['c_call']}"
