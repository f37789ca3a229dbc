"""What a step costs in Python beyond the ops: the hook and issp.optim, for many tiny tensors.

The ops are replaced by functions that do nothing, and torch's own part, the wrapper around `step`,
is timed in the same rounds and taken off. Cold: 64 MB are written before each step. Each row has a
process of its own, since every optimizer's step asks all pruners of a process.
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
from pathlib import Path
from typing import Any

import torch
from torch import nn

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


OPTIMIZERS = {
    "hook of any optimizer": IdleAdam,
    "issp.optim.Adam": issp.optim.Adam,
    "issp.optim.SGD": lambda p: issp.optim.SGD(p, lr=1e-3, momentum=0.9),
}
STAGES = ("pruning", "frozen")


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
    for name, stage in counted([(n, s) for n in OPTIMIZERS for s in STAGES], "case"):
        table.rows.append(Row(_measure_apart(name, stage, args) | {"case": f"{name}, {stage}"}))
    table.notes = [
        "Beyond the op and torch's own wrapper around step, which ran in turn with it. issp.optim "
        "reads the gradients and checks the entries of the optimizer's state in it.",
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
    opt: Any = OPTIMIZERS[name](model.parameters())
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    if isinstance(opt, IdleAdam):
        opt.fill()
    pruner = issp.attach(model, opt, sparsity=0.5)
    opt.step()
    if stage == "frozen":
        pruner.freeze()
        opt.step()
    for op in _OPS:
        setattr(ops, op, lambda *_: None)
    buckets.write_zeros_ = lambda *_: None  # type: ignore[assignment]
    return alone.step, opt.step


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
