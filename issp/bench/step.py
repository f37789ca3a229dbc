"""The fused step (select, shrink, mask, flips) against its peers, in the steady state of training.

Weights start as PyTorch initialises them and drift by a learning rate's length before every step;
the drift is not timed. Before anything is timed, the step is compared with the reference bit for
bit; if it differs, nothing is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from issp import backends, ops, reference, shapes
from issp.bench import peers
from issp.bench.machine import machine_line
from issp.bench.registry import ParityError, Row
from issp.bench.report import Line, Table, plot, write_atomically
from issp.bench.timing import CpuClock, CudaClock, Task, interleave, peak_bytes
from issp.bench.workload import Workload

EXAMPLE = "example: issp bench step --model swinir-light --sparsity 0.95 --quick"
DTYPES = ("float32", "float16", "bfloat16", "float64")
_CUT = 1 << 16


@dataclass(frozen=True)
class Settings:
    """How long and how carefully to measure.

    Attributes:
        sparsity: share of each weight that is selected.
        shrink: alpha.
        dtype: one of `DTYPES`.
        device: "cpu" or "cuda".
        rounds: calls of each row in each mode.
        seconds: limit per row and mode; slow rows get fewer calls, at least one.
        settle: steps before the first timed one. For some 60 steps the thresholds fall by the
            factor alpha each, then drift and shrinkage balance: training is in that second state.
        whole: the parity check includes the largest tensor whole.
        flush_bytes: read between calls to empty the caches; None: the clock's choice.
    """

    sparsity: float = 0.95
    shrink: float = 0.95
    dtype: str = "float32"
    device: str = "cpu"
    rounds: int = 30
    seconds: float = 6.0
    settle: int = 200
    whole: bool = True
    flush_bytes: int | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `issp bench step`."""
    default = ["swinir-light", "edsr-l", "cat-r"]
    parser.add_argument("--model", nargs="+", default=default, choices=shapes.MODELS)
    parser.add_argument("--scale", type=int, default=4, choices=shapes.SCALES)
    parser.add_argument("--sparsity", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--shrink", type=float, default=0.95, help="factor alpha, default 0.95")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--settle", type=int, help="untimed steps first, default 200 (quick: 100)")
    parser.add_argument(
        "--seconds", type=float, help="limit per row and mode, default 6 (quick: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", type=Path, help="also write the tables to this .md file")
    parser.add_argument("--plot", type=Path, help="also draw the times into this .png file")


def run(args: argparse.Namespace) -> list[Table]:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: the step is not bitwise equal to the reference.
    """
    settings = _settings(args)
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads is {args.threads}: use at least 1")
        torch.set_num_threads(args.threads)
    for path in filter(None, (args.out, args.plot)):
        if not path.parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist: create {path.parent}")
    models = {
        f"{name} x{args.scale}": shapes.prunable_shapes(name, args.scale) for name in args.model
    }
    for model_shapes in models.values():
        check_parity(model_shapes, settings)
    tables = []
    for name, model_shapes in models.items():
        tables.append(measure(name, model_shapes, settings))
        print(tables[-1].markdown(), flush=True)
    if args.out:
        write_atomically(args.out, "\n".join(table.markdown() for table in tables).encode())
    if args.plot:
        plot(tables, args.plot)
    return tables


def _settings(args: argparse.Namespace) -> Settings:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("torch sees no CUDA device: use --device cpu")
    if not 0.0 <= args.shrink <= 1.0:
        raise ValueError(f"--shrink is {args.shrink}: it must lie in 0..1")
    ops.num_pruned(1, args.sparsity)
    pace = {"rounds": 7, "seconds": 1.0, "settle": 100, "whole": False} if args.quick else {}
    if args.settle is not None:
        if args.settle < 1:
            raise ValueError(f"--settle is {args.settle}: use at least 1")
        pace["settle"] = args.settle
    if args.seconds is not None:
        if args.seconds <= 0:
            raise ValueError(f"--seconds is {args.seconds}: it must be above 0")
        pace["seconds"] = args.seconds
    return Settings(args.sparsity, args.shrink, args.dtype, args.device, **pace)


def check_parity(model_shapes: Sequence[tuple[int, ...]], settings: Settings) -> None:
    """Compares three steps of each size of tensor, cut short, with the reference, bit for bit.

    Raises:
        ParityError: names the first difference.
    """
    sizes = sorted({math.prod(shape) for shape in model_shapes})
    sample = sorted(
        {min(size, _CUT) for size in sizes} | ({sizes[-1]} if settings.whole else set())
    )
    dtype = getattr(torch, settings.dtype)
    for bracket in (True, False):
        work = Workload(
            [(1, n) for n in sample], settings.sparsity, dtype, settings.device, settings.shrink
        )
        for step in range(3):
            work.drift()
            expected = _reference_step(work)
            work.step(bracket)
            state = work.state
            found = [*work.weights, state.thresholds, state.packed, state.flips]
            names = [f"weight of {n} elements" for n in sample] + ["thresholds", "masks", "flips"]
            for name, mine, theirs in zip(names, found, expected, strict=True):
                if not torch.equal(mine.cpu().view(torch.uint8), theirs.view(torch.uint8)):
                    raise ParityError(
                        f"the step is not bitwise equal to the reference ({name}, step {step}, "
                        f"bracket {bracket}, back end {backends.active(settings.device)}): "
                        "nothing was timed"
                    )


def _reference_step(work: Workload) -> list[torch.Tensor]:
    """What the step must leave behind, computed on the CPU: weights, thresholds, masks, flips."""
    weights = [w.cpu().clone() for w in work.weights]
    state = work.state
    names = ("k", "thresholds", "packed", "flips", "scratch")
    k, thresholds, packed, flips, scratch = (getattr(state, name).cpu().clone() for name in names)
    reference.soft_shrink_(weights, k, work.shrink, thresholds, packed, flips, scratch)
    return [*weights, thresholds, packed, flips]


def measure(
    name: str,
    model_shapes: Sequence[tuple[int, ...]],
    settings: Settings,
    rows: Sequence[Row] = peers.ROWS,
) -> Table:
    """Times every row on weights of these shapes. Call `check_parity` first.

    Args:
        name: of the model, for the title.
        model_shapes: one per prunable weight.
        settings: see `Settings`.
        rows: what to time.
    """
    dtype = getattr(torch, settings.dtype)
    work = Workload(model_shapes, settings.sparsity, dtype, settings.device, settings.shrink)
    clock = (CudaClock if settings.device == "cuda" else CpuClock)(settings.flush_bytes)
    work.settle(settings.settle)
    machine = machine_line(settings.device)
    tasks = {row.name: _task(row, work) for row in rows}
    interleave(list(tasks.values()), clock, settings.rounds, settings.seconds)
    table = Table(
        title=f"{name}: {len(model_shapes)} tensors, {work.numel} weights, {settings.dtype}, "
        f"sparsity {settings.sparsity}, shrink {settings.shrink}",
        machine=machine,
        unit=clock.unit,
        basis=clock.basis,
        base=peers.BASE,
        floors=peers.FLOORS,
    )
    for row in rows:
        task = tasks[row.name]
        table.lines.append(
            Line(
                name=row.name,
                seconds={mode.name: task.median(mode.name) for mode in clock.modes},
                repetitions=max(map(len, task.samples.values()), default=0),
                best=task.best(clock.basis),
                spread=task.spread(clock.basis),
                traffic=row.traffic(work.numel, work.flat.element_size()),
                extra=_extra_bytes(row, work, settings) / work.numel,
            )
        )
    table.notes = _notes(rows, tasks, work, clock, settings)
    return table


def _task(row: Row, work: Workload) -> Task:
    prepare = row.prepare
    return Task(row.make(work), lambda: prepare(work), row.ours, row.capturable)


def _extra_bytes(row: Row, work: Workload, settings: Settings) -> int:
    """Working memory: what the call allocates, and the state's scratch for the fused step."""
    if row.per_layer:
        # One layer after the other: the largest sets the peak, and a slow peer runs only on it.
        largest = max(work.weights, key=torch.Tensor.numel)
        dtype = getattr(torch, settings.dtype)
        work = Workload([largest.shape], settings.sparsity, dtype, settings.device)
    row.prepare(work)
    try:
        allocated = peak_bytes(row.make(work), settings.device)
    except (RuntimeError, TypeError):
        if row.ours:
            raise
        return 0
    fused = row.name.startswith(peers.STEP)
    return allocated + (work.state.scratch.nbytes if fused else 0)


def _notes(rows, tasks, work, clock, settings) -> list[str]:
    counted = {}
    for row in rows:
        counted.setdefault(row.counted, []).append(row.name)
    notes = [
        "Medians, all rows in turn in one run; ratio: time over that of "
        f"`{peers.BASE}` in the same column. GB/s, roofline share, spread (quartile distance "
        f"over median) and best (shortest call): column {clock.basis}. Roofline: the fastest of "
        f"{', '.join(peers.FLOORS)}.",
        "Bytes counted: "
        + "; ".join(f"{what} ({', '.join(names)})" for what, names in counted.items())
        + ". torch.topk, kthvalue and sort select only: no shrink, mask or flips.",
        "Extra: memory at once beyond weights and results, from torch's and Python's allocators, "
        "and the state's scratch for the step; bookkeeping inside the native code is not seen.",
        f"Cold: {clock.flush_bytes / 1e6:.0f} MB were read before each call. {settings.settle} "
        "steps came before the first timed one.",
    ]
    few = [
        f"{row.name} ({max(map(len, tasks[row.name].samples.values()), default=0)})"
        for row in rows
        if max(map(len, tasks[row.name].samples.values()), default=0) < settings.rounds
    ]
    if few:
        notes.append(f"Slow, so run less often than {settings.rounds} times: {', '.join(few)}.")
    notes += [
        f"{row.name} could not be timed, {tasks[row.name].error}"
        for row in rows
        if tasks[row.name].error
    ]
    if backends.active(settings.device) == "reference":
        notes.append("The step ran on its slow reference: no compiled back end is active here.")
    else:
        steps = 10
        notes.append(
            f"The bracket around the previous threshold missed {work.missed(steps)} of "
            f"{steps * len(work.weights)} searches."
        )
    return notes
