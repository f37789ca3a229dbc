"""What a fine-tuning iteration takes when the kept weights alone are trained.

Copies of one network train side by side on the same batches, in another order each round, by
torch's fused Adam: dense in both memory formats and under bfloat16 autocast, and with fixed masks
after `pruner.freeze(accelerate=example)`, each layer as it was measured here. The baseline is the
fastest float32 dense one of the same round.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

import issp
from bench.harness import options
from bench.harness.errors import ParityError
from bench.harness.machine import machine_line
from bench.harness.plots import Bars, plot_bars
from bench.harness.progress import counted
from bench.harness.table import Column, Row, Table, number
from bench.train import Data
from issp.nn.report import LayerReport
from issp.sr import models

EXAMPLE = "example: python -m bench finetune --model edsr-baseline --scale 2 --batch 8 --threads 2"
# Batch of each network, on patches of 48x48 LR pixels (SwinIR: 64x64, as it is trained).
_BATCH = {"edsr-l": 4, "edsr-baseline": 8, "swinir-light": 2}
_PATCH = {"swinir-light": 64}
_SPARSITIES = (0.9, 0.95, 0.99)
# Speed over the fastest dense float32, at 90, 95 and 99 %.
TARGETS = {"edsr-l": (2.5, 3.5, 5.0), "edsr-baseline": (2.0, 2.5, 3.0), "swinir-light": (1.0,) * 3}
_MIN_ROUNDS, _MOST_ROUNDS = 5, 40
_BF16 = "dense bf16 autocast"
_TOLERANCE = 1e-3  # of the loss's gradients, in the norm


@dataclass
class Variant:
    """A copy of the network, how it trains, and its times.

    Attributes:
        name: as printed.
        model, optimizer: the copy and its Adam.
        memory_format: of its images.
        bf16: trains under autocast.
        sparsity: None: dense.
        report: of the layers that train sparse.
        seconds: of each round.
    """

    name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    memory_format: torch.memory_format
    bf16: bool = False
    sparsity: float | None = None
    report: LayerReport | None = None
    seconds: list[float] = field(default_factory=list)

    def step(self, low: Tensor, high: Tensor) -> None:
        """One training iteration."""
        low = low.contiguous(memory_format=self.memory_format)
        with torch.autocast(low.device.type, torch.bfloat16, enabled=self.bf16):
            loss = (self.model(low) - high).abs().mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench finetune`."""
    parser.add_argument("--model", nargs="+", choices=models.names(), default=list(_BATCH))
    parser.add_argument("--scale", type=int, default=2, choices=(2, 3, 4), help="default 2")
    parser.add_argument("--batch", type=int, help="images; default 2 to 8, by network")
    parser.add_argument("--patch", type=int, help="LR pixels; default 48, SwinIR 64")
    parser.add_argument(
        "--sparsity", nargs="+", type=float, default=list(_SPARSITIES), help="default 0.9 0.95 0.99"
    )
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--layers", action="store_true", help="also print every layer's choice")
    options.add_pace(parser, "of timed iterations per network, default 300 (quick: 10)")


def run(args: argparse.Namespace) -> None:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: an accelerated network's gradients differ from the dense ones.
    """
    options.check_pace(args)
    options.at_least_one(args, "batch", "patch", "threads")
    options.check_sparsities(args.sparsity)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    seconds = args.seconds or (10.0 if args.quick else 300.0)
    tables = []
    for name in args.model:
        batch, side = args.batch or _BATCH.get(name, 2), args.patch or _PATCH.get(name, 48)
        torch.manual_seed(0)
        network = models.build(name, args.scale).to(args.device)
        data = Data(args.scale, args.device)
        machine = machine_line(args.device)
        # The choices of this run alone: none is remembered from an earlier, busier hour.
        with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, ISSP_CACHE=folder):
            variants = make_variants(network, data.batch(batch, side)[0], args.sparsity)
        rounds = measure(variants, partial(data.batch, batch, side), seconds)
        title = f"fine-tuning {name} x{args.scale}, batch {batch}, patch {side} (LR)"
        tables.append(table(title, machine, variants, TARGETS.get(name), rounds))
        print(tables[-1].markdown(), flush=True)
        for variant in variants if args.layers else ():
            if variant.report is not None:
                print(f"{variant.name}:\n\n{variant.report()}\n", flush=True)
    options.write_outputs(args, tables, lambda path: plot(tables, path))


def make_variants(
    network: nn.Module, example: Tensor, sparsities: Sequence[float]
) -> list[Variant]:
    """The dense variants, then one of each sparsity with its layers chosen.

    Args:
        network: is left as it is.
        example: a batch of LR images.
        sparsities: shares of zeros.
    """
    variants = []
    contiguous, last = torch.contiguous_format, torch.channels_last
    for name, kind, bf16 in (
        ("dense", contiguous, False),
        ("dense channels_last", last, False),
        (_BF16, last, True),
    ):
        model = copy.deepcopy(network).to(memory_format=kind)
        variants.append(Variant(name, model, _adam(model), kind, bf16))
    for sparsity in sparsities:
        model = copy.deepcopy(network)
        optimizer = _adam(model)
        pruner = issp.attach(model, optimizer, sparsity=sparsity)
        pruner.freeze()
        expected = _gradients(model, example, pruner)
        pruner.freeze(accelerate=example)
        _check(_gradients(model, example, pruner), expected, f"{sparsity:.0%}")
        name = f"accelerated {100 * sparsity:.4g} %"
        variant = Variant(name, model, optimizer, contiguous, sparsity=sparsity)
        variant.report = pruner.acceleration
        variants.append(variant)
    return variants


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), 1e-5, fused=True)


def _gradients(model: nn.Module, example: Tensor, pruner: issp.Pruner) -> Tensor:
    """All gradients of kept weights in a row, of a small part of the example."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(0)  # of dropped paths
    model(example[:1, :, :24, :24].contiguous()).square().mean().backward()
    masks = pruner.masks()
    parts = []
    for name, p in model.named_parameters():
        mask = masks.get(name.removesuffix(".weight"))
        grad = p.grad
        assert grad is not None
        parts.append(
            grad[mask] if mask is not None and mask.shape == grad.shape else grad.flatten()
        )
    model.zero_grad(set_to_none=True)
    return torch.cat([x.flatten() for x in parts])


def _check(actual: Tensor, expected: Tensor, what: str) -> None:
    error = float((actual - expected).norm() / expected.norm())
    if not error <= _TOLERANCE:
        raise ParityError(f"accelerated at {what}: gradients are off by {error:.2g} of their norm")


def measure(
    variants: Sequence[Variant], batch: Callable[[], tuple[Tensor, Tensor]], seconds: float
) -> int:
    """Fills in the times; returns the rounds."""
    once = 0.0
    for variant in variants:
        for _ in range(2):  # the first iteration allocates
            begin = time.perf_counter()
            variant.step(*batch())
            last = time.perf_counter() - begin
        once += last
    rounds = min(_MOST_ROUNDS, max(_MIN_ROUNDS, int(seconds / once)))
    order = random.Random(0)
    for _ in counted(range(rounds), "round"):
        images = batch()
        now = list(variants)
        order.shuffle(now)
        for variant in now:
            begin = time.perf_counter()
            variant.step(*images)
            variant.seconds.append(time.perf_counter() - begin)
    return rounds


def table(
    title: str,
    machine: str,
    variants: Sequence[Variant],
    targets: Sequence[float] | None,
    rounds: int,
) -> Table:
    """The table: medians; speeds are taken round by round.

    Args:
        title, machine: see `Table`.
        variants: with their times.
        targets: speeds to reach, of the sparsities 0.9, 0.95 and 0.99.
        rounds: how often each was timed.
    """
    plain = [v for v in variants if v.sparsity is None and not v.bf16]
    fastest = min(plain, key=lambda v: statistics.median(v.seconds))
    bf16 = next(v for v in variants if v.bf16)
    wanted = dict(zip(_SPARSITIES, targets or (), strict=False))
    columns = [
        Column("what", "what"),
        Column("iteration", "iteration", "ms"),
        Column("speed", "speed over dense fp32"),
        Column("quartiles", "quartiles"),
        Column("must", "must show"),
        Column("bf16", "speed over dense bf16"),
        Column("sparse", "sparse layers"),
    ]
    rows = []
    for v in variants:
        ratios = [a / b for a, b in zip(fastest.seconds, v.seconds, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        over_bf16 = [a / b for a, b in zip(bf16.seconds, v.seconds, strict=True)]
        cells = {"what": v.name, "iteration": statistics.median(v.seconds)}
        cells |= {"speed": statistics.median(ratios), "quartiles": f"{low:.3g} to {high:.3g}"}
        cells["bf16"] = statistics.median(over_bf16)
        if v.sparsity in wanted:
            cells["must"] = f">= {number(wanted[v.sparsity])}"
        if v.report is not None:
            lines = v.report.lines
            cells["sparse"] = f"{sum(x.is_sparse for x in lines)} of {len(lines)}"
        rows.append(Row({c.key: cells.get(c.key) for c in columns}, {"iteration": v.seconds}))
    notes = [
        f"Medians of {rounds} rounds; ratios are taken round by round, to {fastest.name}. All "
        "train by torch.optim.Adam(fused=True); forward, backward and step are timed together.",
        "Before: gradients of the kept weights equal the masked dense ones' within "
        f"{_TOLERANCE:g} of their norm.",
    ]
    return Table(title, machine, columns, rows, notes)


def plot(tables: Sequence[Table], path: Path) -> None:
    """Bars per network."""
    panels = []
    for each in tables:
        parts = {"iteration": [1e3 * row["iteration"] for row in each.rows]}
        labels = [f"{number(1e3 * r['iteration'])} ms, {r['speed']:.3g} x" for r in each.rows]
        names = [row["what"] for row in each.rows]
        panels.append(Bars(each.title, "ms per iteration, median", names, parts, labels))
    plot_bars(panels, path)
