"""What pruning costs a whole training iteration: forward, backward, optimizer and pruning.

Copies of one network train side by side from one steady state, on the same batches, in another
order each round: dense with torch's fused Adam, the same with the step after it, issp.optim.Adam,
and the authors' way (argsort on the CPU, index lists). Whole iterations vary by more than pruning
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
from typing import Any

import torch
from torch import Tensor, nn

from bench import baselines, optim_parity, step
from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.report import grid, new_figure, number, percent, save_figure
from bench.harness.training import FAMILIES, Trainee
from issp import ops
from issp.sr import models

EXAMPLE = "example: issp bench train --model swinir-light --batch 2 --patch 32 --quick"
_MODELS = ("edsr-baseline", "swinir-light", "edsr-l")
# (batch, patch in LR pixels) that a few CPU cores can do; a GPU gets the paper's.
_SIZES = {"edsr-l": (1, 24), "cat-r": (1, 16)}
_DEFAULT_SIZE = {"cpu": (2, 32), "cuda": (32, 64)}
_SETTLE_PATCH = 16
_MOST_ROUNDS = 100
_SHARE_OF_AUTHORS = 0.25
DENSE = "dense, torch Adam fused"
AFTER = "torch Adam fused, then issp step"
FUSED = "issp Adam, pruner attached"
AUTHORS = f"torch Adam fused, then {baselines.AUTHORS}"


@dataclass(frozen=True)
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
class Lane:
    """One way to train.

    Attributes:
        name: as printed.
        trainee: its copy of the network, optimizer and pruner.
        after: what follows the optimizer's step.
        whole, update: round -> seconds of the iteration, and of optimizer and pruning inside it.
    """

    name: str
    trainee: Trainee
    after: Callable[[], None] = lambda: None
    whole: dict[int, float] = field(default_factory=dict)
    update: dict[int, float] = field(default_factory=dict)


@dataclass
class Report:
    """The table of one network."""

    title: str
    machine: str
    lanes: list[Lane]
    notes: list[str]

    def markdown(self) -> str:
        """Medians; ratios and differences are taken round by round."""
        head = ["what", "iteration ms", "over dense", "quartiles", "update ms", "of iteration"]
        head += ["pruning ms", "of dense iteration", "iterations"]
        text = [f"### {self.title}", "", self.machine, ""]
        text += grid(head, map(self._cells, self.lanes))
        return "\n".join([*text, "", *(f"- {note}" for note in self.notes), ""])

    def record(self) -> dict[str, Any]:
        """Title, machine and every measured time in seconds, for JSON."""
        times = {x.name: {"iteration": x.whole, "update": x.update} for x in self.lanes}
        return {"title": self.title, "machine": self.machine, "seconds": times}

    def ratios(self, lane: Lane) -> list[float]:
        """Time of each iteration over the dense one's of the same round."""
        return [t / self.lanes[0].whole[i] for i, t in lane.whole.items()]

    def pruning(self, lane: Lane) -> float:
        """Seconds by which optimizer and pruning exceed the dense optimizer; median over rounds."""
        dense = self.lanes[0].update
        return statistics.median(t - dense[i] for i, t in lane.update.items())

    def _cells(self, lane: Lane) -> list[str]:
        whole = statistics.median(lane.whole.values())
        update = statistics.median(lane.update.values())
        ratios = self.ratios(lane)
        low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 3 else (None,) * 3
        cells = [lane.name, number(1e3 * whole), f"{statistics.median(ratios):.4g}"]
        cells.append("-" if low is None else f"{low:.4g} to {high:.4g}")
        cells += [number(1e3 * update), percent(update / whole)]
        if lane is self.lanes[0]:
            cells += ["-", "-"]
        else:
            cost = self.pruning(lane)
            dense = statistics.median(self.lanes[0].whole.values())
            cells += [number(1e3 * cost), percent(cost / dense)]
        return [*cells, str(len(lane.whole))]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `issp bench train`."""
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


def run(args: argparse.Namespace) -> list[Report]:
    """Measures and prints what the arguments ask for.

    Raises:
        ValueError: an argument out of range, or no GPU for --device cuda.
        ParityError: the step or the fused optimizer differs from the reference.
    """
    options.apply(args)
    options.at_least_one(args, "batch", "patch", "settle")
    pace = {"seconds": 6.0, "settle": 10} if args.quick else {}
    given = {"settle": args.settle, "seconds": args.seconds}
    pace |= {name: value for name, value in given.items() if value is not None}
    optim_parity.check(["adam"], args.device, args.sparsity, args.shrink)
    reports = []
    for model in args.model or _MODELS[: 2 if args.quick else None]:
        batch, patch = _DEFAULT_SIZE[args.device]
        if args.device == "cpu":
            batch, patch = _SIZES.get(model, (batch, patch))
        batch, patch = args.batch or batch, args.patch or patch
        settings = Settings(args.sparsity, args.shrink, args.device, batch, patch, **pace)
        torch.manual_seed(0)
        # As the training driver lays it out.
        network = models.build(model, args.scale).to(
            settings.device, memory_format=torch.channels_last
        )
        weights = [tuple(p.shape) for p in network.parameters()]
        step.check_parity(
            weights, step.Settings(args.sparsity, args.shrink, device=args.device, whole=False)
        )
        report = measure(f"{model} x{args.scale}", network, args.scale, settings)
        reports.append(report)
        print(report.markdown(), flush=True)
    options.deliver(args, reports, plot)
    return reports


def measure(title: str, network: nn.Module, scale: int, settings: Settings) -> Report:
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
    lanes = make_lanes(network, data, settings)
    watch = Stopwatch(settings.device)
    fast, authors = lanes[:-1], lanes[-1]
    batch = data.batch(settings.batch, settings.patch)
    for _ in range(2):  # the first iteration allocates and, on a GPU, chooses its algorithms
        taken = 0.0
        for lane in fast:
            torch.manual_seed(0)
            taken += sum(iterate(lane, *batch, watch))
    rounds = min(_MOST_ROUNDS, max(3, int(settings.seconds / taken)))
    order = random.Random(0)
    slow_rounds = {0}
    for i in range(rounds):
        batch = data.batch(settings.batch, settings.patch)
        now = [*fast, authors] if i in slow_rounds else list(fast)
        order.shuffle(now)
        for lane in now:
            torch.manual_seed(i)  # of dropped paths
            before, update = iterate(lane, *batch, watch)
            lane.whole[i], lane.update[i] = before + update, update
        if i == 0:
            affordable = int(_SHARE_OF_AUTHORS * settings.seconds / authors.whole[0])
            slow_rounds = set(range(0, rounds, max(1, -(-rounds // max(1, affordable)))))
    notes = _notes(lanes, rounds, settings)
    count = sum(p.numel() for p in network.parameters())
    what = f"{count} weights, batch {settings.batch}, patch {settings.patch} (LR), float32"
    pruning = f"sparsity {settings.sparsity}, shrink {settings.shrink}"
    return Report(f"training {title}: {what}, {pruning}", machine, lanes, notes)


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


def iterate(lane: Lane, low: Tensor, high: Tensor, watch: Stopwatch) -> tuple[float, float]:
    """One iteration: seconds of forward and backward, and of optimizer and pruning."""
    model, optimizer = lane.trainee.model, lane.trainee.optimizer
    watch.start()
    loss = (model(low) - high).abs().mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    watch.mark()
    optimizer.step()
    lane.after()
    watch.mark()
    return watch.read()


def make_lanes(network: nn.Module, data: Data, settings: Settings) -> list[Lane]:
    """The ways to train, in the order of the table, each with a copy from one settled state."""

    def train(kind: str, pruned: bool) -> Trainee:
        pruning = settings.sparsity, settings.shrink
        return Trainee.of(network, FAMILIES["adam"], kind, pruned, *pruning)

    start = Lane("settle", train("fused", True))
    watch = Stopwatch(settings.device)
    for _ in range(settings.settle):
        iterate(start, *data.batch(1, min(settings.patch, _SETTLE_PATCH)), watch)
    lanes = [
        Lane(DENSE, train("fused", False)),
        Lane(AFTER, train("fused", True)),
        Lane(FUSED, train("issp", True)),
        Lane(AUTHORS, train("fused", False)),
    ]
    for lane in lanes:
        lane.trainee.take(start.trainee)
    weights = [w.detach() for w in lanes[-1].trainee.prunable()]
    flat = [w.as_strided((w.numel(),), (1,)) for w in weights]  # whatever its memory format
    k = [ops.num_pruned(w.numel(), settings.sparsity) for w in weights]
    lanes[-1].after = lambda: baselines.authors_step(flat, k, settings.shrink)
    return lanes


def _notes(lanes: Sequence[Lane], rounds: int, settings: Settings) -> list[str]:
    tf32 = f" (float32 in convolutions: {torch.backends.cudnn.conv.fp32_precision})"
    return [
        "Medians. Ratios to the dense iteration, with quartiles, and the differences of "
        "optimizer and pruning to the dense optimizer are taken round by round. Update: optimizer "
        "and pruning, timed inside the iteration.",
        f"All train on the same batches from the same state{tf32 * (settings.device == 'cuda')}, "
        f"in another order each round; {settings.settle} iterations on small patches came before. "
        "The authors' way is slow and runs less often.",
        f"{difference(lanes[1].trainee, lanes[2].trainee)} after {rounds + 2} iterations "
        f"({lanes[1].name}; {lanes[2].name}).",
    ]


def difference(one: Trainee, other: Trainee) -> str:
    """In words: whether two trainees have the same bits, or where they differ first."""
    wrong, numel, first, largest = 0, 0, "", 0.0
    names = [name for name, _ in one.model.named_parameters()]
    for what in ("weights", *one.family.moments):
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
    theirs = other.pruner.masks()
    bits = sum(int((mask != theirs[name]).sum()) for name, mask in one.pruner.masks().items())
    if not wrong and not bits:
        return "The two sparse variants are bit-identical (weights, moments, masks)"
    return (
        f"The two sparse variants differ in {wrong} of {numel} weights and moments (first: "
        f"{first}; largest difference {largest:.2g}) and in {bits} bits of the masks (torch's "
        "fused kernels round the last few elements of a tensor in another order)"
    )


def plot(reports: Sequence[Report], path: Path) -> None:
    """Stacked bars per network: forward and backward, then optimizer and pruning."""
    figure = new_figure(figsize=(10, 0.4 + 2.2 * len(reports)))
    panels = figure.subplots(len(reports), 1, squeeze=False)[:, 0]
    for panel, report in zip(panels, reports, strict=True):
        names = [lane.name for lane in report.lanes]
        whole = [1e3 * statistics.median(lane.whole.values()) for lane in report.lanes]
        update = [1e3 * statistics.median(lane.update.values()) for lane in report.lanes]
        rest = [a - b for a, b in zip(whole, update, strict=True)]
        panel.barh(names, rest, color="tab:gray", label="forward, backward")
        bars = panel.barh(names, update, left=rest, color="tab:orange", label="update, pruning")
        ratios = [statistics.median(report.ratios(lane)) for lane in report.lanes]
        labels = [f" {number(t)} ms, {r:.3f} x" for t, r in zip(whole, ratios, strict=True)]
        panel.bar_label(bars, labels=labels)
        panel.invert_yaxis()
        panel.margins(x=0.25)
        panel.set_xlabel("ms per iteration, median")
        panel.set_title(report.title, fontsize="small")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)
