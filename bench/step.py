"""The fused step (select, shrink, mask, flips) beside its baselines, in the steady state.

Weights start as PyTorch initialises them and are perturbed by a learning rate's length before
every step; the perturbation is not timed. Before anything is timed, the step is compared with the
reference bit for bit; if it differs, nothing is printed and the exit status is 1. With --pattern
the step prunes N:M groups: layers that the pattern does not divide are left out, and the
baselines, which know no groups, select as many weights.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench import baselines, scaling
from bench.baselines import Operation
from bench.harness import options, step_table
from bench.harness.errors import ParityError
from bench.harness.machine import machine_line
from bench.harness.memory import peak_bytes
from bench.harness.progress import counted
from bench.harness.settings import TimingSettings
from bench.harness.table import Table, timing_notes
from bench.harness.timing import Task, interleave
from bench.harness.workload import Workload, divides
from issp.ops import backends, reference
from issp.ops.keep import Keep
from issp.sr import shapes

EXAMPLE = """examples:
  python -m bench step --model swinir-light --sparsity 0.95 --quick
  python -m bench step --pattern 1:10:4 --quick
  python -m bench step --scaling --quick --plot scaling.png"""
DTYPES = ("float32", "float16", "bfloat16", "float64")
PARITY_NUMEL = 1 << 16  # a larger tensor is cut to so many elements for the parity check
_BRACKET_STEPS = 10  # further steps whose bracket misses are counted


@dataclass(frozen=True, kw_only=True)
class Settings(TimingSettings):
    """What to measure.

    Attributes:
        sparsity: share of each weight that is selected; ignored where `keep` is set.
        shrink: alpha.
        dtype: one of `DTYPES`.
        settle: steps before the first timed one. For some 60 steps the thresholds fall by the
            factor alpha each, then perturbation and shrinkage balance: training is in that state.
        whole: the parity check includes the largest tensor whole.
        keep: the N:M pattern; None: unstructured.
    """

    sparsity: float = 0.95
    shrink: float = 0.95
    dtype: str = "float32"
    settle: int = 200
    whole: bool = True
    keep: Keep | None = None

    @property
    def pruning(self) -> str:
        """What is selected, for titles."""
        if self.keep is None:
            return f"sparsity {self.sparsity}"
        return f"{self.keep.name} ({100 * self.keep.sparsity:.4g} %)"

    @property
    def element_size(self) -> int:
        """Bytes of one weight."""
        return getattr(torch, self.dtype).itemsize

    def divided(self, model_shapes: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """The shapes that the pattern divides.

        Raises:
            ValueError: it divides none.
        """
        shapes_ = [s for s in model_shapes if self.keep is None or divides(self.keep, s)]
        if not shapes_:
            raise ValueError(f"the pattern {self.keep.name} divides no layer: choose another")
        return shapes_

    def workload(self, model_shapes: Sequence[tuple[int, ...]]) -> Workload:
        """Weights of these shapes, all of which the pattern divides."""
        dtype = getattr(torch, self.dtype)
        return Workload(
            model_shapes, self.sparsity, dtype, self.device, self.shrink, keep=self.keep
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench step`."""
    default = ["swinir-light", "edsr-l", "cat-r"]
    parser.add_argument("--model", nargs="+", default=default, choices=shapes.MODELS)
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--pattern",
        metavar="N:M[:v[xc]]",
        help="prune N:M groups, such as 2:4, 1:10:4, 2:32:16x2 or 1:20:flat",
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


def run(args: argparse.Namespace) -> None:
    """Measures and prints what the arguments ask for.

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
        check_parity([(1, 1000), (100, 100), (1, PARITY_NUMEL)], settings)
        scaling.run(args, settings)
        return
    models = {
        f"{name} x{args.scale}": shapes.prunable_shapes(name, args.scale) for name in args.model
    }
    for model_shapes in models.values():
        check_parity(model_shapes, settings)
    # Groups are selected without a bracket, so their step has no cold start.
    operations = [
        op for op in baselines.operations(args.device) if keep is None or op.name != baselines.COLD
    ]
    tables = []
    for name, model_shapes in models.items():
        tables.append(measure(name, model_shapes, settings, operations))
        print(tables[-1].markdown(), flush=True)
    options.write_outputs(args, tables, lambda path: step_table.plot(tables, path))


def _pattern(args: argparse.Namespace) -> Keep | None:
    if args.pattern is None:
        return None
    if args.sparsity is not None:
        raise ValueError("--pattern says how many weights are pruned: leave --sparsity out")
    if args.scaling:
        raise ValueError("--scaling makes tensors of any size: leave --pattern out")
    return Keep.parse(args.pattern)


def _settings(args: argparse.Namespace, keep: Keep | None) -> Settings:
    quick = {"rounds": 7, "seconds": 1.0, "settle": 100, "whole": False}
    names = ("sparsity", "shrink", "dtype", "device", "settle", "seconds")
    return Settings(keep=keep, **options.overrides(args, names, quick))


def check_parity(model_shapes: Sequence[tuple[int, ...]], settings: Settings) -> None:
    """Compares three steps of each size of tensor, cut short, with the reference, bit for bit.

    Raises:
        ParityError: names the first difference.
    """
    sample = parity_shapes(settings.divided(model_shapes), settings)
    for bracket in (True, False):
        workload = settings.workload(sample)
        for step in counted(range(3), "parity with the reference, step"):
            workload.perturb()
            expected = _reference_step(workload)
            workload.step(bracket)
            state = workload.state
            actual = [*workload.weights, state.thresholds, state.packed, state.flips]
            names = [f"weight of {w.numel()} elements" for w in workload.weights]
            names += ["thresholds", "masks", "flips"]
            for name, x, y in zip(names, actual, expected, strict=True):
                if not torch.equal(x.cpu().view(torch.uint8), y.view(torch.uint8)):
                    raise ParityError(
                        f"the step is not bitwise equal to the reference ({name}, step {step}, "
                        f"bracket {bracket}, back end {backends.active(settings.device)}): "
                        "nothing was timed"
                    )


def parity_shapes(
    model_shapes: Sequence[tuple[int, ...]], settings: Settings
) -> list[tuple[int, ...]]:
    """One tensor of each size, cut to `PARITY_NUMEL`; the largest also whole, if asked for."""
    largest = max(model_shapes, key=math.prod)
    whole = {largest} if settings.whole else set()
    if settings.keep is None:
        sample = {(1, min(math.prod(s), PARITY_NUMEL)) for s in model_shapes}
        sample |= {(1, math.prod(s)) for s in whole}
    else:
        sample = {_fewer_rows(s, settings.keep) for s in model_shapes} | whole
    return sorted(sample, key=lambda shape: (math.prod(shape), shape))


def _fewer_rows(shape: tuple[int, ...], keep: Keep) -> tuple[int, ...]:
    """A weight's shape with as many rows as fit into `PARITY_NUMEL`, and its groups whole."""
    row = math.prod(shape[1:])
    together = keep.v if keep.layout == "channels" else keep.of // math.gcd(keep.of, row)
    max_rows = max(together, PARITY_NUMEL // row // together * together)
    return (min(shape[0], max_rows), *shape[1:])


def _reference_step(workload: Workload) -> list[torch.Tensor]:
    """Weights, thresholds, masks and flips after the step, by the reference on the CPU."""
    weights = [w.cpu().clone() for w in workload.weights]
    names = ("k", "thresholds", "packed", "flips", "scratch")
    k, thresholds, packed, flips, scratch = (
        getattr(workload.state, name).cpu().clone() for name in names
    )
    reference.soft_shrink_(
        *(weights, k, workload.shrink, thresholds, packed, flips, scratch),
        patterns=workload.state.patterns,
    )
    return [*weights, thresholds, packed, flips]


def measure(
    name: str,
    model_shapes: Sequence[tuple[int, ...]],
    settings: Settings,
    operations: Sequence[Operation] = baselines.OPERATIONS,
) -> Table:
    """Times every operation on weights of these shapes. Call `check_parity` first.

    Args:
        name: of the model, for the title.
        model_shapes: one per prunable weight.
        settings: see `Settings`.
        operations: what to time.
    """
    divided = settings.divided(model_shapes)
    workload = settings.workload(divided)
    clock = settings.clock()
    workload.warm_up(settings.settle)
    machine = machine_line(settings.device)
    tasks = {op.name: _task(op, workload) for op in operations}
    timed = [(op.name, tasks[op.name]) for op in operations if not op.missing()]
    probe = settings.probe()
    interleave(
        [*(task for _, task in timed), *probe.tasks], clock, settings.rounds, settings.seconds
    )
    entries = [
        step_table.Entry(
            name=op.name,
            task=tasks[op.name],
            traffic=op.traffic(workload.numel, settings.element_size),
            extra=None if op.missing() else _extra_bytes(op, workload, settings) / workload.numel,
            missing=op.missing(),
        )
        for op in operations
    ]
    table = step_table.make(
        title=f"{name}: {len(divided)} tensors, {workload.numel} weights, {settings.dtype}, "
        f"{settings.pruning}, shrink {settings.shrink}",
        machine=machine,
        clock=clock,
        bandwidth=probe.result(clock.basis),
        numel=workload.numel,
        entries=entries,
        base=baselines.BASE,
    )
    table.notes = _notes(operations, workload, clock, settings)
    if settings.keep:
        table.notes.append(_pattern_note(settings.keep, len(divided), len(model_shapes)))
    table.notes += timing_notes(timed, settings.rounds)
    return table


def _pattern_note(keep: Keep, divided: int, tensors: int) -> str:
    text = (
        f"The step prunes {keep.name} groups; its baselines select as many weights without groups."
    )
    if divided == tensors:
        return text
    left_out = tensors - divided
    return (
        f"{text} {left_out} of {tensors} tensors, which the pattern does not divide, are left out."
    )


def _task(op: Operation, workload: Workload) -> Task:
    return Task(op.make(workload), lambda: op.prepare(workload), op.ours, op.capturable)


def _extra_bytes(op: Operation, workload: Workload, settings: Settings) -> int:
    """Working memory: what the call allocates, and the state's scratch for the fused step."""
    if op.per_layer:
        # One layer after the other: the largest sets the peak, and a slow one runs only on it.
        largest = max(workload.weights, key=torch.Tensor.numel)
        workload = settings.workload([largest.shape])
    op.prepare(workload)
    try:
        allocated = peak_bytes(op.make(workload), settings.device)
    except Exception:  # as in `interleave`, which has kept the reason for the notes
        if op.ours:
            raise
        return 0
    fused = op.name.startswith(baselines.STEP)
    return allocated + (workload.state.scratch.nbytes if fused else 0)


def _notes(
    operations: Sequence[Operation], workload: Workload, clock: Any, settings: Settings
) -> list[str]:
    counted: dict[str, list[str]] = {}
    for op in operations:
        counted.setdefault(op.counted, []).append(op.name)
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
        searches = _BRACKET_STEPS * len(workload.weights)
        notes.append(
            "The bracket around the previous threshold missed "
            f"{workload.bracket_misses(_BRACKET_STEPS)} of {searches} searches."
        )
    return notes
