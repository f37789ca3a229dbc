"""What a pattern costs in accuracy: PSNR of the demo's network, trained once per pattern.

Every row starts from the same weights and sees the same batches of the demo's photographs; scores
are of the photographs that are held out. Beside the patterns stand the dense network and, for each
sparsity, unstructured pruning. All rows prune the same layers, those that every pattern divides,
so that the rows of a sparsity keep equally many weights.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.report import grid
from bench.harness.workload import divides
from issp.ops.keep import Keep
from issp.sr.interrupt import Interrupted
from issp.utils.files import atomic_write

EXAMPLE = """examples:
  issp bench accuracy --pattern 3:32 3:32:4 --iters 300 --seeds 0
  issp bench accuracy --threads 1 --out patterns-psnr.md"""
PATTERNS = ("3:32", "3:32:2", "3:32:4", "2:4")  # of 32 channels, 3 are the nearest to 90 %
ITERATIONS, SEEDS = 700, (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """One way to prune, a row of the table.

    Attributes:
        name: as printed.
        sparsity: share of the weights of a pruned layer that is pruned; 0: dense.
        keep: the pattern, None for unstructured weights.
    """

    name: str
    sparsity: float = 0.0
    keep: Keep | None = None


@dataclass
class Line:
    """A variant's results; `psnr`, `ssim`: seed -> mean of the photographs."""

    variant: Variant
    kept: int = 0
    psnr: dict[int, float] = field(default_factory=dict)
    ssim: dict[int, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `issp bench accuracy`."""
    parser.add_argument(
        "--pattern",
        nargs="+",
        default=list(PATTERNS),
        metavar="N:M[:v]",
        help=f"patterns, also N:M:flat; default {' '.join(PATTERNS)}",
    )
    parser.add_argument("--iters", type=int, default=ITERATIONS, help=f"default {ITERATIONS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default 0 1 2")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=Path, help="also write the table to this .md file")


def run(args: argparse.Namespace) -> list[Report]:
    """Trains every variant with every seed and prints the table; returns it.

    After each seed the table so far is written to --out.

    Raises:
        ValueError: an argument out of range, or patterns that no layer suits.
    """
    options.at_least_one(args, "iters", "threads")
    options.folders_exist(args.out)
    keeps = list(dict.fromkeys(map(Keep.parse, args.pattern)))
    seeds = list(dict.fromkeys(args.seeds))
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    report = Report(variants(keeps), args.iters)
    try:
        for seed in seeds:
            report.train(seed)
            if args.out:
                atomic_write(args.out, report.markdown().encode())
    except Interrupted as stopped:
        # Its advice how to go on is about one training, whose folder is gone.
        raise KeyboardInterrupt from stopped
    print(report.markdown(), flush=True)
    return [report]


def variants(keeps: Sequence[Keep]) -> list[Variant]:
    """The rows: dense, then each sparsity with its unstructured row in front of its patterns."""
    found = [Variant("dense")]
    for sparsity in dict.fromkeys(keep.sparsity for keep in keeps):
        found.append(Variant(_unstructured(sparsity), sparsity))
        found += [Variant(f"N:M {k.name}", sparsity, k) for k in keeps if k.sparsity == sparsity]
    return found


def stay_dense(model: nn.Module, keeps: Sequence[Keep]) -> list[str]:
    """The layers that some pattern does not divide.

    Raises:
        ValueError: these are all layers.
    """
    kinds = nn.Conv2d | nn.Linear
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, kinds)}
    dense = [n for n, shape in shapes.items() if not all(divides(keep, shape) for keep in keeps)]
    if len(dense) == len(shapes):
        names = ", ".join(keep.name for keep in keeps)
        raise ValueError(f"no layer is divided by every pattern ({names}): leave some out")
    return dense


def _unstructured(sparsity: float) -> str:
    return f"unstructured {100 * sparsity:.4g} %"


class Report:
    """The trainings and their table.

    Args:
        rows: what is trained; patterns need their sparsity's unstructured row.
        iterations: of each training.
    """

    def __init__(self, rows: Sequence[Variant], iterations: int) -> None:
        from issp.sr import builders, data, demo, evaluate

        self.lines = [Line(variant) for variant in rows]
        self.iterations = iterations
        self.seeds: list[int] = []
        self.machine = machine_line("cpu")
        plain = demo.settings(demo.Options(Path()), "shapes", iterations, None)
        model = builders.network(plain)
        self.dense = stay_dense(model, [row.keep for row in rows if row.keep])
        self.weights = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)
        )
        photographs = data.PairedArrays(data.sample_photographs("test"), demo.SCALE)
        self.held_out = data.EvalDataset(photographs, in_memory=True)
        self.bicubic = evaluate.mean(evaluate.evaluate(evaluate.bicubic(demo.SCALE), self.held_out))

    def train(self, seed: int) -> None:
        """Trains every variant with one seed; says on stderr how far it is."""
        for line in self.lines:
            self._train(line, seed)
            print(
                f"seed {seed}, {line.variant.name}: {line.psnr[seed]:.2f} dB",
                file=sys.stderr,
                flush=True,
            )
        self.seeds.append(seed)

    def _train(self, line: Line, seed: int) -> None:
        from issp.sr import checkpoint, evaluate
        from issp.sr.train import train

        with tempfile.TemporaryDirectory() as folder:
            model = train(self.settings(line.variant, seed, Path(folder)), quiet=True)
        score = evaluate.mean(evaluate.evaluate(evaluate.of_model(model), self.held_out))
        line.psnr[seed], line.ssim[seed] = score.psnr, score.ssim
        about = checkpoint.sparsity(model)
        line.kept = about["weights"] - about["zeros"]

    def settings(self, variant: Variant, seed: int, folder: Path):
        """The demo's configuration (`issp.sr.config.Config`) with this variant's pruning."""
        from issp.sr import config, demo

        chosen = demo.Options(folder, seed=seed)
        # Scored at the end alone.
        settings = demo.settings(
            chosen, "run", self.iterations, variant.sparsity or None, validation=False
        )
        if settings.sparsity:
            settings.sparsity.exclude = list(self.dense)
            keep = variant.keep
            if keep:
                settings.sparsity.keep = config.Keep(
                    n=keep.n, of=keep.of, v=keep.v, layout=keep.layout
                )
        return settings

    def against_unstructured(self, line: Line) -> list[float]:
        """Per seed: PSNR less that of unstructured pruning to the same sparsity, in dB."""
        control = _unstructured(line.variant.sparsity)
        other = next(x for x in self.lines if x.variant.name == control)
        return [line.psnr[seed] - other.psnr[seed] for seed in self.seeds]

    def markdown(self) -> str:
        """The table with its machine line, and what has to be known to read or repeat it."""
        from issp.sr import demo

        head = ["what", "kept weights", *(f"PSNR, seed {seed}" for seed in self.seeds)]
        head += ["mean", "SSIM", "against unstructured, dB"]
        empty = ["" for _ in self.seeds]
        cubic = [f"{self.bicubic.psnr:.2f}", f"{self.bicubic.ssim:.4f}", ""]
        rows = [["bicubic", "", *empty, *cubic], *map(self._cells, self.lines)]
        title = f"### PSNR by pattern: {demo.MODEL} x{demo.SCALE}, {self.iterations} steps"
        notes = (f"- {note}" for note in self._notes())
        return "\n".join([title, "", self.machine, "", *grid(head, rows), "", *notes, ""])

    def _cells(self, line: Line) -> list[str]:
        psnr, ssim = ([values[seed] for seed in self.seeds] for values in (line.psnr, line.ssim))
        cells = [line.variant.name, f"{line.kept:,}", *(f"{x:.2f}" for x in psnr)]
        cells += [f"{_mean(psnr):.2f}", f"{_mean(ssim):.4f}"]
        if not line.variant.keep:
            return [*cells, ""]
        apart = self.against_unstructured(line)
        return [*cells, f"{_mean(apart):+.2f} ({min(apart):+.2f} to {max(apart):+.2f})"]

    def _notes(self) -> list[str]:
        from issp.sr import demo

        sparse = next((x.variant for x in self.lines if x.variant.sparsity), None)
        freeze = self.settings(sparse, 0, Path()).sparsity.freeze_iter if sparse else 0
        patterns = " ".join(_written(x.variant.keep) for x in self.lines if x.variant.keep)
        seeds = " ".join(map(str, self.seeds))
        notes = [
            f"`issp bench accuracy --pattern {patterns} --iters {self.iterations} --seeds {seeds} "
            f"--threads {torch.get_num_threads()}` repeats it. PSNR in dB and SSIM: Y channel, "
            f"mean of {', '.join(self.held_out.pairs.names)}, which no training sees.",
            f"Each row is a training from random weights by ISS-P, {self.iterations} steps of "
            f"{demo.BATCH} crops of {demo.PATCH}x{demo.PATCH}; the mask is frozen at step "
            f"{freeze}. Within a seed all rows start from the same weights and see the same "
            "batches. The dense network's learning rate falls from the first step on, that of the "
            "others from the freeze on, as in `issp demo`.",
            f"Of {self.weights:,} weights, those of {', '.join(self.dense) or 'no layer'} stay "
            "dense in all rows: not every pattern divides them.",
            "Against unstructured: difference to the row of the same sparsity, seed by seed; mean "
            "(least to greatest).",
        ]
        if any(x.variant.keep and x.variant.keep.layout == "flat" for x in self.lines):
            notes.append(
                'Layout "flat" groups weights that are neighbours in memory: `issp train` keeps '
                "them channels_last, so neighbours are the input channels of a kernel position."
            )
        return notes


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _written(keep: Keep) -> str:
    """As `Keep.parse` reads it."""
    last = ":flat" if keep.layout == "flat" else f":{keep.v}" if keep.v > 1 else ""
    return f"{keep.n}:{keep.of}{last}"
