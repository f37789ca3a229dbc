"""What issp.Recorder costs a training iteration: gradients and masks of every layer.

One network trains by issp.optim.Adam; recorders of gradients, of masks and of both record some of
its iterations, in another order each round. First the recorded values are compared with torch's.
Whole iterations vary by more than a recorder costs, so the recorder is timed inside them as well,
by the clock and by the CPU time of the process, which other processes do not lengthen. Both include
the rows that it writes to disk, and on a GPU are those of the host.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

import issp
from bench.harness import options
from bench.harness.errors import ParityError
from bench.harness.machine import machine_line
from bench.harness.progress import counted
from bench.harness.table import Column, Row, Table, percent
from bench.train import Data
from issp.sr import models
from issp.utils.csv_log import read_csv

EXAMPLE = "example: python -m bench record --batch 4 --patch 32 --threads 2 --quick"
VARIANTS = {
    "without": (),
    "gradients": ("gradients",),
    "masks": ("masks",),
    "gradients and masks": ("gradients", "masks"),
}
_DEFAULT_SIZE = {"cpu": (4, 48), "cuda": (16, 48)}  # batch, patch in LR pixels
# On a GPU a clock between single iterations would wait for it in each.
_CHUNK = {"cpu": 1, "cuda": 20}
_SETTLE = 20  # iterations before the first timed one


@dataclass
class Variant:
    """What is recorded, and its times.

    Args:
        recorder: None: nothing.
        iteration: round -> seconds per iteration.
        own: seconds of the recorder in all its iterations, by the clock.
        own_cpu, cpu: CPU seconds of the recorder, and of all its iterations.
        count: of these iterations.
    """

    recorder: issp.Recorder | None
    iteration: dict[int, float] = field(default_factory=dict)
    own: float = 0.0
    own_cpu: float = 0.0
    cpu: float = 0.0
    count: int = 0

    def step(self) -> None:
        """Records the iteration, timed."""
        self.count += 1
        if self.recorder is not None:
            self._timed(self.recorder.step)

    def flush(self) -> None:
        """Writes the last rows; their time counts."""
        if self.recorder is not None:
            self._timed(self.recorder.flush)

    def _timed(self, call: Callable[[], None]) -> None:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        call()
        self.own_cpu += time.process_time() - begin_cpu
        self.own += time.perf_counter() - begin


@dataclass
class Training:
    """The network that all variants train in turn.

    Args:
        model: on its device.
        data: its batches.
        batch, patch: their size.
        sparsity, shrink: of the pruning.
    """

    model: nn.Module
    data: Data
    batch: int
    patch: int
    sparsity: float
    shrink: float

    def __post_init__(self) -> None:
        self._optimizer = issp.optim.Adam(self.model.parameters(), 2e-4, betas=(0.9, 0.99))
        self.pruner = issp.attach(self.model, self._optimizer, self.sparsity, self.shrink)

    def iterate(self, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
        """One iteration."""
        low, high = batch
        loss = (self.model(low) - high).abs().mean()
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self._optimizer.step()

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Noise of the right size."""
        return self.data.batch(self.batch, self.patch)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench record`."""
    parser.add_argument("--model", default="edsr-baseline", choices=models.names())
    parser.add_argument("--batch", type=int, help="images; default 16 on a GPU, else 4")
    parser.add_argument("--patch", type=int, help="LR pixels; default 48")
    options.add_arguments(parser, "of timed iterations, default 120 (quick: 10)")


def run(args: argparse.Namespace) -> None:
    """Measures and prints the table.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: a recorded value is not torch's.
    """
    options.apply(args)
    options.at_least_one(args, "batch", "patch")
    if args.plot:
        raise ValueError("this benchmark has no picture: leave out --plot")
    seconds = args.seconds or (10.0 if args.quick else 120.0)
    batch, patch = _DEFAULT_SIZE[args.device]
    torch.manual_seed(0)
    model = models.build(args.model, args.scale)
    model = model.to(args.device, memory_format=torch.channels_last)  # as the driver lays it out
    data = Data(args.scale, args.device)
    sizes = {"batch": args.batch or batch, "patch": args.patch or patch}
    training = Training(model, data, **sizes, sparsity=args.sparsity, shrink=args.shrink)
    title = f"recording {args.model} x{args.scale}"
    table = measure(title, training, seconds, args.device)
    print(table.markdown())
    options.write_outputs(args, [table], lambda path: None)


def measure(title: str, training: Training, seconds: float, device: str) -> Table:
    """Trains with and without recorders in turn and makes the table."""
    machine = machine_line(device)
    for _ in counted(range(_SETTLE), "warm-up iteration"):
        training.iterate(training.next_batch())
    with tempfile.TemporaryDirectory() as folder:
        check(training, Path(folder))
        variants = {
            name: Variant(
                issp.Recorder(training.pruner, Path(folder) / name, record=kinds, hook=False)
                if kinds
                else None
            )
            for name, kinds in VARIANTS.items()
        }
        _time(training, list(variants.values()), seconds, _CHUNK[device])
        for variant in variants.values():
            variant.flush()
    weights = sum(x.numel() for x in training.pruner.buckets.weights())
    layers = len(training.pruner.buckets.prunable)
    size = f"batch {training.batch}, patch {training.patch} (LR)"
    notes = [
        "Medians; ratios to the iteration without are taken round by round. Every iteration is "
        "recorded, of every layer; an interval of N costs the N-th part.",
        f"Recorder: mean per iteration; {weights * 4 / 1e6:.3g} MB of gradients, and as much of "
        "weights, are read, rows are written to disk. Shares are of the iteration without.",
        "The recorded values of one iteration were compared with torch's before.",
    ]
    return _table(f"{title}: {layers} layers, {weights} weights, {size}", machine, variants, notes)


def check(training: Training, folder: Path) -> None:
    """Compares the rows of one iteration with what torch computes.

    Raises:
        ParityError: the first difference.
    """
    with issp.Recorder(training.pruner, folder / "check"):
        training.iterate(training.next_batch())
    flips = training.pruner.flips()
    gradients, masks = (
        {str(row["layer"]): row for row in read_csv(folder / "check" / name)}
        for name in ("gradients.csv", "masks.csv")
    )
    for layer in training.pruner.buckets.prunable:
        size = layer.weight.grad.double().abs()
        found, expected = gradients[layer.name], [size.norm(), size.var(), size.mean(), size.std()]
        for key, value in zip(("norm", "variance", "mean", "std"), expected, strict=True):
            if abs(found[key] - value.item()) > 1e-10 * abs(value.item()):
                raise ParityError(f"{key} of {layer.name} is {found[key]}, but torch has {value}")
        zeros = int((layer.weight == 0).sum())
        counts = masks[layer.name]["flips"], masks[layer.name]["zeros"]
        if counts != (flips[layer.name], zeros):
            raise ParityError(f"{layer.name} has {counts} flips and zeros: that is not torch's")


def _time(training: Training, variants: Sequence[Variant], seconds: float, chunk: int) -> None:
    """Fills in the times."""
    order, end, number = random.Random(0), time.monotonic() + seconds, 0
    while number < 3 or time.monotonic() < end:
        batches = [training.next_batch() for _ in range(chunk)]
        for variant in order.sample(list(variants), len(variants)):
            _synchronize(training.model)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            for batch in batches:
                training.iterate(batch)
                variant.step()
            _synchronize(training.model)
            variant.iteration[number] = (time.perf_counter() - begin) / chunk
            variant.cpu += time.process_time() - begin_cpu
        number += 1


def _synchronize(model: nn.Module) -> None:
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()


def _table(title: str, machine: str, variants: dict[str, Variant], notes: Sequence[str]) -> Table:
    base = variants["without"]
    typical = statistics.median(base.iteration.values())
    rows = []
    for name, variant in variants.items():
        over = [seconds / base.iteration[i] for i, seconds in variant.iteration.items()]
        low, middle, high = statistics.quantiles(over, n=4)
        cells = {
            "what": name,
            "iteration": statistics.median(variant.iteration.values()),
            "over": middle,
            "runs": variant.count,
        }
        if variant is not base:
            cells["quartiles"] = f"{low:.4g} to {high:.4g}"
            cells["own"] = variant.own / variant.count
            cells["share"] = cells["own"] / typical
            cells["own cpu"] = variant.own_cpu / variant.count
            cells["cpu share"] = variant.own_cpu / (base.cpu / base.count * variant.count)
        rows.append(Row(cells, {"iteration": list(variant.iteration.values())}))
    columns = [
        Column("what", "recorded"),
        Column("iteration", "iteration", "ms"),
        Column("over", "over without", format=lambda x: f"{x:.4g}"),
        Column("quartiles", "quartiles"),
        Column("own", "recorder", "ms"),
        Column("share", "of iteration", format=percent),
        Column("own cpu", "recorder CPU", "ms"),
        Column("cpu share", "of CPU time", format=percent),
        Column("runs", "iterations"),
    ]
    return Table(title, machine, columns, rows, list(notes))
