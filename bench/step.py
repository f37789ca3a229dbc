"""The fused step (select, shrink, mask, flips) against its peers, in the steady state of training.

Weights start as PyTorch initialises them and drift by a learning rate's length before every step;
the drift is not timed. Before anything is timed, the step is compared with the reference bit for
bit; if it differs, nothing is printed and the exit status is 1. With --pattern the step prunes N:M
groups: layers that the pattern does not divide are left out, and the peers, which know no groups,
select as many weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bench import baselines, scaling
from bench.harness import options
from bench.harness.bandwidth import Probe
from bench.harness.machine import machine_line
from bench.harness.registry import ParityError, Row
from bench.harness.report import Table, exceptions, measured, plot
from bench.harness.workload import Workload, divides
from issp.ops import backends, reference
from issp.ops.keep import Keep
from issp.sr import shapes
from issp.utils.timing import CpuClock, CudaClock, Task, interleave, peak_bytes

EXAMPLE = """examples:
  issp bench step --model swinir-light --sparsity 0.95 --quick
  issp bench step --pattern 1:10:4 --quick
  issp bench step --scaling --quick --plot scaling.png"""
DTYPES = ("float32", "float16", "bfloat16", "float64")
_CUT = 1 << 16


@dataclass(frozen=True)
class Settings:
    """How long and how carefully to measure.

    Attributes:
        sparsity: share of each weight that is selected, unless `keep` says it.
        shrink: alpha.
        dtype: one of `DTYPES`.
        device: "cpu" or "cuda".
        rounds: calls of each row in each mode.
        seconds: limit per row and mode; slow rows get fewer calls, at least one.
        settle: steps before the first timed one. For some 60 steps the thresholds fall by the
            factor alpha each, then drift and shrinkage balance: training is in that second state.
        whole: the parity check includes the largest tensor whole.
        flush_bytes: read between calls to empty the caches; None: the clock's choice.
        probe_bytes: of the buffers that give the roofline; None: the default of `Probe`.
        keep: the N:M pattern; None: unstructured.
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
    probe_bytes: int | None = None
    keep: Keep | None = None

    @property
    def pruning(self) -> str:
        """What is selected, for titles."""
        if self.keep is None:
            return f"sparsity {self.sparsity}"
        return f"{self.keep.name} ({100 * self.keep.sparsity:.4g} %)"

    def fitting(self, model_shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes that the pattern divides.

        Raises:
            ValueError: it divides none.
        """
        found = [s for s in model_shapes if self.keep is None or divides(self.keep, s)]
        if not found:
            raise ValueError(f"the pattern {self.keep.name} divides no layer: choose another")
        return found

    def workload(self, model_shapes: Sequence[tuple[int, ...]]) -> Workload:
        """Weights of these shapes, all of which the pattern divides."""
        dtype = getattr(torch, self.dtype)
        return Workload(
            model_shapes, self.sparsity, dtype, self.device, self.shrink, keep=self.keep
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `issp bench step`."""
    default = ["swinir-light", "edsr-l", "cat-r"]
    parser.add_argument("--model", nargs="+", default=default, choices=shapes.MODELS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--pattern", metavar="N:M[:v]", help="prune N:M groups, such as 2:4, 1:10:4 or 1:20:flat"
    )
    parser.add_argument("--settle", type=int, help="untimed steps first, default 200 (quick: 100)")
    parser.add_argument(
        "--scaling",
        action="store_true",
        help="time against the number of weights, and of tensors, instead of models",
    )
    scaling.add_arguments(parser)
    options.add_arguments(parser, "limit per row and mode, default 6 (quick: 1)")
    parser.set_defaults(sparsity=None)  # so that giving both it and a pattern is noticed


def run(args: argparse.Namespace) -> list:
    """Measures and prints what the arguments ask for; returns the tables.

    Raises:
        ValueError: an argument out of range, no GPU for --device cuda, or a pattern that divides
            no layer.
        ParityError: the step is not bitwise equal to the reference.
    """
    keep = _pattern(args)
    args.sparsity = Settings.sparsity if args.sparsity is None else args.sparsity
    options.apply(args)
    options.at_least_one(args, "settle")
    settings = _settings(args, keep)
    if args.scaling:
        check_parity([(1, 1000), (100, 100), (1, _CUT)], settings)
        return scaling.run(args, settings)
    models = {
        f"{name} x{args.scale}": shapes.prunable_shapes(name, args.scale) for name in args.model
    }
    for model_shapes in models.values():
        check_parity(model_shapes, settings)
    # Groups are selected without a bracket, so their step has no cold start.
    rows = [
        row for row in baselines.rows(args.device) if keep is None or row.name != baselines.COLD
    ]
    tables = []
    for name, model_shapes in models.items():
        tables.append(measure(name, model_shapes, settings, rows))
        print(tables[-1].markdown(), flush=True)
    options.deliver(args, tables, plot)
    return tables


def _pattern(args: argparse.Namespace) -> Keep | None:
    if args.pattern is None:
        return None
    if args.sparsity is not None:
        raise ValueError("--pattern says how many weights are pruned: leave --sparsity out")
    if args.scaling:
        raise ValueError("--scaling makes tensors of any size: leave --pattern out")
    return Keep.parse(args.pattern)


def _settings(args: argparse.Namespace, keep: Keep | None) -> Settings:
    pace = {"rounds": 7, "seconds": 1.0, "settle": 100, "whole": False} if args.quick else {}
    given = {"settle": args.settle, "seconds": args.seconds}
    pace |= {name: value for name, value in given.items() if value is not None}
    return Settings(args.sparsity, args.shrink, args.dtype, args.device, keep=keep, **pace)


def check_parity(model_shapes: Sequence[tuple[int, ...]], settings: Settings) -> None:
    """Compares three steps of each size of tensor, cut short, with the reference, bit for bit.

    Raises:
        ParityError: names the first difference.
    """
    sample = _sample(settings.fitting(model_shapes), settings)
    for bracket in (True, False):
        work = settings.workload(sample)
        for step in range(3):
            work.drift()
            expected = _reference_step(work)
            work.step(bracket)
            state = work.state
            found = [*work.weights, state.thresholds, state.packed, state.flips]
            names = [f"weight of {w.numel()} elements" for w in work.weights]
            names += ["thresholds", "masks", "flips"]
            for name, mine, theirs in zip(names, found, expected, strict=True):
                if not torch.equal(mine.cpu().view(torch.uint8), theirs.view(torch.uint8)):
                    raise ParityError(
                        f"the step is not bitwise equal to the reference ({name}, step {step}, "
                        f"bracket {bracket}, back end {backends.active(settings.device)}): "
                        "nothing was timed"
                    )


def _sample(model_shapes: Sequence[tuple[int, ...]], settings: Settings) -> list[tuple[int, ...]]:
    """One tensor of each size, cut to `_CUT` elements; the largest also whole, if asked for."""
    largest = max(model_shapes, key=math.prod)
    whole = {largest} if settings.whole else set()
    if settings.keep is None:
        found = {(1, min(math.prod(s), _CUT)) for s in model_shapes}
        found |= {(1, math.prod(s)) for s in whole}
    else:
        found = {_fewer_rows(s, settings.keep) for s in model_shapes} | whole
    return sorted(found, key=lambda shape: (math.prod(shape), shape))


def _fewer_rows(shape: tuple[int, ...], keep: Keep) -> tuple[int, ...]:
    """A weight's shape with as many rows as fit into `_CUT`, and its groups whole."""
    row = math.prod(shape[1:])
    together = keep.v if keep.layout == "channels" else keep.of // math.gcd(keep.of, row)
    most = max(together, _CUT // row // together * together)
    return (min(shape[0], most), *shape[1:])


def _reference_step(work: Workload) -> list[torch.Tensor]:
    """What the step must leave behind, computed on the CPU: weights, thresholds, masks, flips."""
    weights = [w.cpu().clone() for w in work.weights]
    names = ("k", "thresholds", "packed", "flips", "scratch")
    k, *state = (getattr(work.state, name).cpu().clone() for name in names)
    reference.soft_shrink_(weights, k, work.shrink, *state, patterns=work.state.patterns)
    return [*weights, *state[:3]]


def measure(
    name: str,
    model_shapes: Sequence[tuple[int, ...]],
    settings: Settings,
    rows: Sequence[Row] = baselines.ROWS,
) -> Table:
    """Times every row on weights of these shapes. Call `check_parity` first.

    Args:
        name: of the model, for the title.
        model_shapes: one per prunable weight.
        settings: see `Settings`.
        rows: what to time.
    """
    fitting = settings.fitting(model_shapes)
    work = settings.workload(fitting)
    clock = (CudaClock if settings.device == "cuda" else CpuClock)(settings.flush_bytes)
    work.settle(settings.settle)
    machine = machine_line(settings.device)
    tasks = {row.name: _task(row, work) for row in rows}
    timed = [tasks[row.name] for row in rows if not row.missing()]
    probe = Probe(settings.device, settings.probe_bytes)
    interleave([*timed, *probe.tasks], clock, settings.rounds, settings.seconds)
    table = Table(
        title=f"{name}: {len(fitting)} tensors, {work.numel} weights, {settings.dtype}, "
        f"{settings.pruning}, shrink {settings.shrink}",
        machine=machine,
        unit=clock.unit,
        basis=clock.basis,
        base=baselines.BASE,
        numel=work.numel,
        roof=probe.roof(clock.basis),
    )
    for row in rows:
        traffic = row.traffic(work.numel, work.flat.element_size())
        extra = None if row.missing() else _extra_bytes(row, work, settings) / work.numel
        table.lines.append(
            measured(row.name, tasks[row.name], clock, traffic, extra, row.missing())
        )
    errors = {name: task.error for name, task in tasks.items() if task.error}
    table.notes = _notes(rows, work, clock, settings)
    if settings.keep:
        table.notes.append(_pattern_note(settings.keep, len(fitting), len(model_shapes)))
    table.notes += exceptions(table.lines, errors, settings.rounds)
    return table


def _pattern_note(keep: Keep, fitting: int, tensors: int) -> str:
    text = f"The step prunes {keep.name} groups; its peers select as many weights without groups."
    if fitting == tensors:
        return text
    left = tensors - fitting
    return f"{text} {left} of {tensors} tensors, which the pattern does not divide, are left out."


def _task(row: Row, work: Workload) -> Task:
    prepare = row.prepare
    return Task(row.make(work), lambda: prepare(work), row.ours, row.capturable)


def _extra_bytes(row: Row, work: Workload, settings: Settings) -> int:
    """Working memory: what the call allocates, and the state's scratch for the fused step."""
    if row.per_layer:
        # One layer after the other: the largest sets the peak, and a slow peer runs only on it.
        largest = max(work.weights, key=torch.Tensor.numel)
        work = settings.workload([largest.shape])
    row.prepare(work)
    try:
        allocated = peak_bytes(row.make(work), settings.device)
    except Exception:  # as in `interleave`, which has kept the reason for the notes
        if row.ours:
            raise
        return 0
    fused = row.name.startswith(baselines.STEP)
    return allocated + (work.state.scratch.nbytes if fused else 0)


def _notes(rows: Sequence[Row], work: Workload, clock, settings: Settings) -> list[str]:
    counted = {}
    for row in rows:
        counted.setdefault(row.counted, []).append(row.name)
    notes = [
        "Medians, all rows in turn in one run; ratio: time over that of "
        f"`{baselines.BASE}` in the same column. GB/s, roofline share, spread (quartile distance "
        f"over median) and best (shortest call): column {clock.basis}.",
        "Bytes counted: "
        + "; ".join(f"{what} ({', '.join(names)})" for what, names in counted.items())
        + ". topk, kthvalue, sort, quantile and the like select only: no shrink, mask or flips.",
        "Extra: memory at once beyond weights and results, from torch's and Python's allocators, "
        "and the state's scratch for the step; bookkeeping inside the native code is not seen.",
        f"Cold: {clock.flush_bytes / 1e6:.0f} MB were read before each call. {settings.settle} "
        "steps came before the first timed one.",
    ]
    if backends.active(settings.device) == "reference":
        notes.append("The step ran on its slow reference: no compiled back end is active here.")
    elif settings.keep is None:
        steps = 10
        notes.append(
            f"The bracket around the previous threshold missed {work.missed(steps)} of "
            f"{steps * len(work.weights)} searches."
        )
    return notes
