"""A long run: does a pruned training leak memory, lose count or slow down over its steps?

A small network trains on noise, by issp.optim or by torch's optimizer with the pruner's hook. The
sparsity rises along a schedule, then the masks are fixed. At every logged step the counts of all
layers are compared with those that the schedule demands, and the memory of the process is read.
Times are CPU time of the process, which other processes lengthen little.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import issp
from bench.harness import options
from bench.harness.errors import ParityError
from bench.harness.machine import machine_line
from bench.harness.progress import counted
from bench.harness.table import Column, Row, Table
from issp.utils import denormals
from issp.utils.files import user_path

EXAMPLE = "example: python -m bench long --steps 100000 --threads 1"
OPTIMIZERS = {
    "issp.optim.Adam": lambda p: issp.optim.Adam(p, lr=1e-3),
    "torch.optim.Adam and hook": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True),
}
SPARSITY = 0.95
_LOGS = 100  # in a run
_TENTHS = 10
_SETTLE = 2  # tenths of the run before the memory is compared: the freeze is in the fifth


@dataclass
class Log:
    """What one run has shown, once per logged step.

    Args:
        steps: their numbers.
        memory: resident bytes of the process.
        seconds: CPU time per step since the log before.
        pruned: weights that the masks prune, of all layers.
        zeros: weights that are zero.
    """

    steps: list[int] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    zeros: list[int] = field(default_factory=list)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench long`."""
    parser.add_argument("--steps", type=int, default=100_000, help="a multiple of 100")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")


def run(args: argparse.Namespace) -> None:
    """Trains, checks and prints the table.

    Raises:
        ValueError: an argument out of range.
        ParityError: a count is not the schedule's.
    """
    options.at_least_one(args, "steps", "threads")
    if args.steps % _LOGS:
        raise ValueError(f"--steps is {args.steps}: use a multiple of {_LOGS}")
    options.folders_exist(args.out)
    torch.set_num_threads(args.threads)
    denormals.flush_denormals()
    logs = {name: train(name, args.steps) for name in OPTIMIZERS}
    table = _table(logs, args.steps)
    print(table.markdown())
    if args.out:
        args.out.write_text(table.markdown())


def network() -> nn.Module:
    """Convolutions and linear layers of some hundred weights."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.PixelShuffle(2),
        nn.Flatten(),
        nn.Linear(192, 12),
    )


def train(name: str, steps: int) -> Log:
    """One run of an optimizer of `OPTIMIZERS`."""
    model = network()
    opt = OPTIMIZERS[name](model.parameters())
    schedule = issp.Cubic(0.0, SPARSITY, begin=0, end=steps // 5)
    pruner = issp.attach(model, opt, schedule=schedule, freeze_at=steps // 2)
    noise = torch.Generator().manual_seed(1)
    x, y = torch.empty(1, 3, 4, 4), torch.empty(1, 12)
    log, every = Log(), steps // _LOGS
    for number in counted(range(_LOGS), f"{name}: {every} steps"):
        begin = time.process_time()
        for _ in range(every):
            x.normal_(generator=noise)
            y.normal_(generator=noise)
            opt.zero_grad()
            (model(x) - y).abs().mean().backward()
            opt.step()
        log.seconds.append((time.process_time() - begin) / every)
        log.steps.append((number + 1) * every)
        _check(log, pruner, schedule)
    return log


def _check(log: Log, pruner: issp.Pruner, schedule: issp.Cubic) -> None:
    step, pruned, zeros = log.steps[-1], 0, 0
    if pruner.step_count != step:
        raise ParityError(f"step {step}: the pruner counts {pruner.step_count}")
    masks = pruner.masks()
    for layer in pruner.buckets.prunable:
        weight = layer.weight.detach()
        expected = issp.num_pruned(weight.numel(), schedule(step))
        count, own = int((~masks[layer.name]).sum()), int((weight == 0).sum())
        if count != expected or (pruner.frozen and own != expected):
            raise ParityError(
                f"step {step}, {layer.name}: {count} pruned and {own} zeros, not {expected}"
            )
        pruned, zeros = pruned + count, zeros + own
    log.pruned.append(pruned)
    log.zeros.append(zeros)
    gc.collect()
    log.memory.append(resident_bytes())


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _table(logs: dict[str, Log], steps: int) -> Table:
    columns = [
        Column("run", "optimizer"),
        Column("steps", "steps"),
        Column("pruned", "pruned"),
        Column("zeros", "zeros"),
        Column("drift", "memory since warm-up, KB", format=lambda x: f"{x / 1024:+.0f}"),
        Column("seconds", "CPU per step", "us"),
    ]
    title = f"long run: {steps} steps, {SPARSITY:.0%} sparse, frozen at half"
    table = Table(title, machine_line("cpu"), columns)
    size = _LOGS // _TENTHS
    for name, log in logs.items():
        warm = log.memory[_SETTLE * size - 1]
        for tenth in range(_TENTHS):
            last = (tenth + 1) * size - 1
            cells = {
                "run": name,
                "steps": f"{log.steps[last]}",
                "pruned": f"{log.pruned[last]}",
                "zeros": f"{log.zeros[last]}",
                "drift": log.memory[last] - warm if tenth >= _SETTLE else None,
                "seconds": statistics.median(log.seconds[tenth * size : last + 1]),
            }
            table.rows.append(Row(cells))
    table.notes = [
        f"{_LOGS} times in each run the counts of every layer were compared with the schedule's, "
        "and after the freeze the zeros with the masks; a difference ends the run without a table.",
        "Memory: resident bytes of the process at the end of the tenth, against the end of the "
        f"{_SETTLE * 10} % that count as warm-up. CPU time: the median of 10 logs.",
    ]
    return table
