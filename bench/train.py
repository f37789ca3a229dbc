"""What pruning costs a whole training iteration: forward, backward, optimizer and pruning.

Copies of one network train side by side from one steady state, on the same batches, in another
order each round: dense with torch's fused Adam, the same with the step after it, issp.optim.Adam,
and the authors' step (argsort on the CPU, index lists). Whole iterations vary by more than pruning
costs; so optimizer and pruning are timed inside the same iterations as well.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from bench import baselines, optim_parity, step
from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.plots import Bars, plot_bars
from bench.harness.progress import counted
from bench.harness.table import Column, Row, Table, number, percent
from bench.harness.training import OPTIMIZERS, TrainingReplica
from issp import ops
from issp.sr import models

EXAMPLE = "example: python -m bench train --model swinir-light --batch 2 --patch 32 --quick"
_MODELS = ("edsr-baseline", "swinir-light", "edsr-l")
# (batch, patch in LR pixels) that a few CPU cores can do; a GPU gets the paper's.
_SIZES = {"edsr-l": (1, 24), "cat-r": (1, 16)}
_DEFAULT_SIZE = {"cpu": (2, 32), "cuda": (32, 64)}
_WARM_UP_PATCH = 16
_MOST_ROUNDS = 100
_SHARE_OF_AUTHORS = 0.25
DENSE = "dense, torch Adam fused"
AFTER = "torch Adam fused, then issp step"
FUSED = "issp Adam, pruner attached"
AUTHORS = f"torch Adam fused, then {baselines.AUTHORS}"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What to train and for how long.

    Attributes:
        sparsity, shrink: of the pruning.
        device: "cpu" or "cuda".
        batch: images per iteration.
        patch: LR pixels per side.
        seconds: of all timed iterations of one network.
        settle: iterations on small patches before the first timed one.
    """

    sparsity: float
    shrink: float
    device: str
    batch: int
    patch: int
    seconds: float = 60.0
    settle: int = 60


@dataclass
class TrainVariant:
    """An optimizer and a pruning step.

    Attributes:
        name: as printed.
        replica: its copy of the network, optimizer and pruner.
        after: what follows the optimizer's step.
        iteration, update: round -> seconds of the iteration, and of its optimizer and pruning.
    """

    name: str
    replica: TrainingReplica
    after: Callable[[], None] = lambda: None
    iteration: dict[int, float] = field(default_factory=dict)
    update: dict[int, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench train`."""
    parser.add_argument(
        "--model",
        nargs="+",
        choices=models.names(),
        help=f"default {' '.join(_MODELS)} (quick: the first two)",
    )
    parser.add_argument("--batch", type=int, help="images; default 32 on a GPU, else 1 or 2")
    parser.add_argument("--patch", type=int, help="LR pixels; default 64 on a GPU, else 16 to 32")
    parser.add_argument(
        "--settle", type=int, help="untimed iterations on small patches, default 60 (quick: 10)"
    )
    options.add_arguments(parser, "of timed iterations per network, default 60 (quick: 6)")


def run(args: argparse.Namespace) -> None:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: the step or the fused optimizer differs from the reference.
    """
    options.apply(args)
    options.at_least_one(args, "batch", "patch", "settle")
    names = ("sparsity", "shrink", "device", "settle", "seconds")
    chosen = options.overrides(args, names, quick={"seconds": 6.0, "settle": 10})
    optim_parity.check(["adam"], args.device, args.sparsity, args.shrink)
    tables = []
    for model in args.model or _MODELS[: 2 if args.quick else None]:
        batch, patch = _DEFAULT_SIZE[args.device]
        if args.device == "cpu":
            batch, patch = _SIZES.get(model, (batch, patch))
        settings = Settings(batch=args.batch or batch, patch=args.patch or patch, **chosen)
        torch.manual_seed(0)
        # As the training driver lays it out.
        network = models.build(model, args.scale).to(
            settings.device, memory_format=torch.channels_last
        )
        step.check_parity(
            [tuple(p.shape) for p in network.parameters()],
            step.Settings(
                sparsity=args.sparsity, shrink=args.shrink, device=args.device, whole=False
            ),
        )
        tables.append(measure(f"{model} x{args.scale}", network, args.scale, settings))
        print(tables[-1].markdown(), flush=True)
    options.write_outputs(args, tables, lambda path: plot(tables, path))


def measure(title: str, network: nn.Module, scale: int, settings: Settings) -> Table:
    """Trains copies of a network side by side and times every iteration.

    Args:
        title: of the network.
        network: is left as it is; takes [N, 3, H, W], gives [N, 3, scale * H, scale * W].
        scale: of the network.
        settings: see `Settings`.
    """
    if settings.device == "cuda":
        torch.backends.cudnn.benchmark = True
    machine = machine_line(settings.device)
    data = Data(scale, settings.device)
    variants = make_variants(network, data, settings)
    rounds = time_iterations(variants, data, settings)
    count = sum(p.numel() for p in network.parameters())
    what = f"{count} weights, batch {settings.batch}, patch {settings.patch} (LR), float32"
    pruning = f"sparsity {settings.sparsity}, shrink {settings.shrink}"
    notes = _notes(variants, rounds, settings)
    return table(f"training {title}: {what}, {pruning}", machine, variants, notes)


def time_iterations(variants: Sequence[TrainVariant], data: Data, settings: Settings) -> int:
    """Fills in the times of the variants, the last of which is slow; returns the rounds."""
    watch = Stopwatch(settings.device)
    *fast, authors = variants
    batch = data.batch(settings.batch, settings.patch)
    for _ in range(2):  # the first iteration allocates and, on a GPU, chooses its algorithms
        seconds = 0.0
        for variant in fast:
            torch.manual_seed(0)
            seconds += sum(iterate(variant, *batch, watch))
    rounds = min(_MOST_ROUNDS, max(3, int(settings.seconds / seconds)))
    order = random.Random(0)
    slow_rounds = {0}
    for i in counted(range(rounds), "round"):
        batch = data.batch(settings.batch, settings.patch)
        now = [*fast, authors] if i in slow_rounds else list(fast)
        order.shuffle(now)
        for variant in now:
            torch.manual_seed(i)  # of dropped paths
            before, update = iterate(variant, *batch, watch)
            variant.iteration[i], variant.update[i] = before + update, update
        if i == 0:
            affordable = int(_SHARE_OF_AUTHORS * settings.seconds / authors.iteration[0])
            slow_rounds = set(range(0, rounds, max(1, -(-rounds // max(1, affordable)))))
    return rounds


def table(
    title: str, machine: str, variants: Sequence[TrainVariant], notes: Sequence[str]
) -> Table:
    """The table: medians; ratios and differences are taken round by round.

    Args:
        title, machine, notes: see `Table`.
        variants: with their times, the dense one first.
    """
    columns = [
        Column("what", "what"),
        Column("iteration", "iteration", "ms"),
        Column("over dense", "over dense", format=lambda x: f"{x:.4g}"),
        Column("quartiles", "quartiles"),
        Column("update", "update", "ms"),
        Column("update share", "of iteration", format=percent),
        Column("pruning", "pruning", "ms"),
        Column("pruning share", "of dense iteration", format=percent),
        Column("runs", "iterations"),
    ]
    dense, *sparse = variants
    rows = [_row(dense, dense), *(_row(variant, dense) for variant in sparse)]
    return Table(title, machine, columns, rows, list(notes))


def ratios(variant: TrainVariant, dense: TrainVariant) -> list[float]:
    """Time of each iteration over the dense one's of the same round."""
    return [t / dense.iteration[i] for i, t in variant.iteration.items()]


def pruning_seconds(variant: TrainVariant, dense: TrainVariant) -> float:
    """Seconds by which optimizer and pruning exceed the dense optimizer; median over rounds."""
    return statistics.median(t - dense.update[i] for i, t in variant.update.items())


def _row(variant: TrainVariant, dense: TrainVariant) -> Row:
    iteration = statistics.median(variant.iteration.values())
    update = statistics.median(variant.update.values())
    over = ratios(variant, dense)
    cells = {"what": variant.name, "iteration": iteration, "over dense": statistics.median(over)}
    if len(over) > 3:
        low, _, high = statistics.quantiles(over, n=4)
        cells["quartiles"] = f"{low:.4g} to {high:.4g}"
    cells |= {"update": update, "update share": update / iteration, "runs": len(variant.iteration)}
    if variant is not dense:
        cells["pruning"] = pruning_seconds(variant, dense)
        cells["pruning share"] = cells["pruning"] / statistics.median(dense.iteration.values())
    rounds = {"round": list(variant.iteration)}
    times = {"iteration": list(variant.iteration.values()), "update": list(variant.update.values())}
    return Row(cells, rounds | times)


class Data:
    """Batches of noise, the same in every run."""

    def __init__(self, scale: int, device: str) -> None:
        self._scale, self._device = scale, device
        self._random = torch.Generator(device).manual_seed(0)

    def batch(self, size: int, patch: int) -> tuple[Tensor, Tensor]:
        """Low and high resolution, [size, 3, patch, patch] and scale times that."""
        sides = patch, self._scale * patch
        low, high = (
            torch.rand(size, 3, side, side, generator=self._random, device=self._device)
            for side in sides
        )
        return low.contiguous(memory_format=torch.channels_last), high


class Stopwatch:
    """Two times of one iteration: by the wall clock, or between events on a GPU."""

    def __init__(self, device: str) -> None:
        self._events = None
        if device == "cuda":
            self._events = [torch.cuda.Event(enable_timing=True) for _ in range(3)]
        self._marks: list = []

    def start(self) -> None:
        """Begins an iteration, from an idle device."""
        self._marks = []
        if self._events:
            torch.cuda.synchronize()
        self.mark()

    def mark(self) -> None:
        """Ends the part that runs."""
        if self._events:
            self._events[len(self._marks)].record()
        self._marks.append(time.perf_counter())

    def read(self) -> tuple[float, float]:
        """Seconds between the three marks."""
        if self._events:
            a, b, c = self._events
            c.synchronize()
            return a.elapsed_time(b) * 1e-3, b.elapsed_time(c) * 1e-3
        a, b, c = self._marks
        return b - a, c - b


def iterate(
    variant: TrainVariant, low: Tensor, high: Tensor, watch: Stopwatch
) -> tuple[float, float]:
    """One iteration: seconds of forward and backward, and of optimizer and pruning."""
    model, optimizer = variant.replica.model, variant.replica.optimizer
    watch.start()
    loss = (model(low) - high).abs().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    watch.mark()
    optimizer.step()
    variant.after()
    watch.mark()
    return watch.read()


def make_variants(network: nn.Module, data: Data, settings: Settings) -> list[TrainVariant]:
    """The variants in the order of the table, each with a copy from one steady state."""

    def replica(kind: str, pruned: bool) -> TrainingReplica:
        pruning = {"sparsity": settings.sparsity, "shrink": settings.shrink}
        return TrainingReplica.copy_of(network, OPTIMIZERS["adam"], kind, pruned, **pruning)

    start = TrainVariant("warm up", replica("fused", True))
    watch = Stopwatch(settings.device)
    for _ in counted(range(settings.settle), "warm-up iteration"):
        iterate(start, *data.batch(1, min(settings.patch, _WARM_UP_PATCH)), watch)
    authors = TrainVariant(AUTHORS, replica("fused", False))
    variants = [
        TrainVariant(DENSE, replica("fused", False)),
        TrainVariant(AFTER, replica("fused", True)),
        TrainVariant(FUSED, replica("issp", True)),
        authors,
    ]
    for variant in variants:
        variant.replica.copy_state_from(start.replica)
    weights = [w.detach() for w in authors.replica.prunable()]
    flat = [w.as_strided((w.numel(),), (1,)) for w in weights]  # whatever its memory format
    k = [ops.num_pruned(w.numel(), settings.sparsity) for w in weights]
    authors.after = lambda: baselines.authors_step(flat, k, settings.shrink)
    return variants


def _notes(variants: Sequence[TrainVariant], rounds: int, settings: Settings) -> list[str]:
    _, after, fused, _ = variants
    tf32 = f" (float32 in convolutions: {torch.backends.cudnn.conv.fp32_precision})"
    return [
        "Medians. Ratios to the dense iteration, with quartiles, and the differences of "
        "optimizer and pruning to the dense optimizer are taken round by round. Update: optimizer "
        "and pruning, timed inside the iteration.",
        f"All train on the same batches from the same state{tf32 * (settings.device == 'cuda')}, "
        f"in another order each round; {settings.settle} iterations on small patches came before. "
        "The authors' step is slow and runs less often.",
        f"{difference(after.replica, fused.replica)} after {rounds + 2} iterations "
        f"({after.name}; {fused.name}).",
    ]


def difference(one: TrainingReplica, other: TrainingReplica) -> str:
    """In words: whether two replicas have the same bits, or where they differ first."""
    wrong, numel, first, largest = 0, 0, "", 0.0
    names = [name for name, _ in one.model.named_parameters()]
    for what in ("weights", *one.spec.moments):
        pairs = [
            x.parameters() if what == "weights" else x.moments(x.parameters(), what)
            for x in (one, other)
        ]
        for name, x, y in zip(names, *pairs, strict=True):
            x, y = x.detach(), y.detach()
            different = x.view(torch.int32) != y.view(torch.int32)
            numel += x.numel()
            if bool(different.any()):
                wrong += int(different.sum())
                first = first or f"{what} of {name}"
                largest = max(largest, float((x - y).abs().max()))
    others = other.pruner.masks()
    bits = sum(int((mask != others[name]).sum()) for name, mask in one.pruner.masks().items())
    if not wrong and not bits:
        return "The two sparse variants are bit-identical (weights, moments, masks)"
    return (
        f"The two sparse variants differ in {wrong} of {numel} weights and moments (first: "
        f"{first}; largest difference {largest:.2g}) and in {bits} bits of the masks (torch's "
        "fused kernels round the last few elements of a tensor in another order)"
    )


def plot(tables: Sequence[Table], path: Path) -> None:
    """Bars per network: forward and backward, then optimizer and pruning."""
    panels = []
    for each in tables:
        rows = each.rows
        update = [1e3 * row["update"] for row in rows]
        rest = [1e3 * row["iteration"] - u for row, u in zip(rows, update, strict=True)]
        labels = [f"{number(1e3 * r['iteration'])} ms, {r['over dense']:.3f} x" for r in rows]
        parts = {"forward, backward": rest, "update, pruning": update}
        names = [row["what"] for row in rows]
        panels.append(Bars(each.title, "ms per iteration, median", names, parts, labels))
    plot_bars(panels, path)
