"""What a pattern costs in accuracy: PSNR of the demo's network, trained once per pattern.

Every row starts from the same weights and sees the same batches of the demo's photographs; scores
are of the photographs that are held out. Beside the patterns stand the dense network and, for each
sparsity, unstructured pruning. All rows prune the same layers, those that every pattern divides,
so that the rows of a sparsity keep equally many weights.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.table import Column, Row, Table
from issp.ops.keep import Keep, Unit
from issp.sr import builders, checkpoint, config, data, demo, evaluate
from issp.sr.interrupt import Interrupted
from issp.sr.train import train
from issp.utils.files import atomic_write, user_path

EXAMPLE = """examples:
  python -m bench accuracy --pattern 3:32 3:32:4 --iters 300 --seeds 0
  python -m bench accuracy --threads 1 --out patterns-psnr.md"""
PATTERNS = ("3:32", "3:32:2", "3:32:4", "2:4")  # of 32 channels, 3 are the nearest to 90 %
ITERATIONS, SEEDS = 700, (0, 1, 2)


@dataclass(frozen=True)
class Variant:
    """One way to prune, a row of the table.

    Attributes:
        name: as printed.
        sparsity: share of the weights of a pruned layer that is pruned; 0: dense.
        keep: the pattern, None without one.
        unit: what is pruned at a time, None for single weights.
    """

    name: str
    sparsity: float = 0.0
    keep: Keep | None = None
    unit: Unit | None = None

    @property
    def pattern(self) -> Keep | Unit | None:
        """What divides the pruned layers, None for single weights."""
        return self.keep or self.unit


@dataclass
class Score:
    """A variant's results; `psnr`, `ssim`: seed -> mean of the photographs."""

    variant: Variant
    kept: int = 0
    psnr: dict[int, float] = field(default_factory=dict)
    ssim: dict[int, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench accuracy`."""
    parser.add_argument(
        "--pattern",
        nargs="+",
        default=list(PATTERNS),
        metavar="N:M[:v[xc]]",
        help=f"patterns, also N:M:flat; default {' '.join(PATTERNS)}",
    )
    parser.add_argument(
        "--units",
        nargs="*",
        default=[],
        metavar="VxC",
        help="also prune units of V rows x C channels to each sparsity, such as 16x2",
    )
    parser.add_argument("--iters", type=int, default=ITERATIONS, help=f"default {ITERATIONS}")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS), help="default 0 1 2")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")


def run(args: argparse.Namespace) -> None:
    """Trains every variant with every seed and prints the table.

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
    study = Study(variants(keeps, list(map(Unit.parse, args.units))), args.iters)
    try:
        for seed in seeds:
            study.train(seed)
            if args.out:
                atomic_write(args.out, study.table().markdown().encode())
    except Interrupted as stopped:
        # Its advice how to go on is about one training, whose folder is deleted.
        raise KeyboardInterrupt from stopped
    print(study.table().markdown(), flush=True)


def variants(keeps: Sequence[Keep], units: Sequence[Unit] = ()) -> list[Variant]:
    """The rows: dense, then each sparsity: unstructured, units, its patterns."""
    rows = [Variant("dense")]
    for sparsity in dict.fromkeys(keep.sparsity for keep in keeps):
        rows.append(Variant(_unstructured(sparsity), sparsity))
        rows += [
            Variant(f"units {unit.name} {100 * sparsity:.4g} %", sparsity, unit=unit)
            for unit in dict.fromkeys(units)
        ]
        rows += [Variant(f"N:M {k.name}", sparsity, k) for k in keeps if k.sparsity == sparsity]
    return rows


def stay_dense(model: nn.Module, patterns: Sequence[Keep | Unit]) -> list[str]:
    """The layers that some pattern or unit does not divide.

    Raises:
        ValueError: these are all layers.
    """
    kinds = nn.Conv2d | nn.Linear
    shapes = {n: m.weight.shape for n, m in model.named_modules() if isinstance(m, kinds)}
    dense = [n for n, shape in shapes.items() if not all(x.divides(shape) for x in patterns)]
    if len(dense) == len(shapes):
        names = ", ".join(x.name for x in patterns)
        raise ValueError(f"no layer is divided by every pattern ({names}): leave some out")
    return dense


def _unstructured(sparsity: float) -> str:
    return f"unstructured {100 * sparsity:.4g} %"


class Study:
    """The trainings and their table.

    Args:
        rows: what is trained; patterns need their sparsity's unstructured row.
        iterations: of each training.
    """

    def __init__(self, rows: Sequence[Variant], iterations: int) -> None:
        self.scores = [Score(variant) for variant in rows]
        self.iterations = iterations
        self.seeds: list[int] = []
        self.machine = machine_line("cpu")
        plain = demo.settings(demo.Options(Path()), "shapes", iterations, None)
        model = builders.network(plain)
        self.dense = stay_dense(model, [row.pattern for row in rows if row.pattern])
        self.weights = sum(
            m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)
        )
        photographs = data.PairedArrays(data.sample_photographs("test"), demo.SCALE)
        self.held_out = data.EvalDataset(photographs, in_memory=True)
        self.bicubic = evaluate.mean(evaluate.evaluate(evaluate.bicubic(demo.SCALE), self.held_out))

    def train(self, seed: int) -> None:
        """Trains every variant with one seed; says on stderr how far it is."""
        for score in self.scores:
            self._train(score, seed)
            print(
                f"seed {seed}, {score.variant.name}: {score.psnr[seed]:.2f} dB",
                file=sys.stderr,
                flush=True,
            )
        self.seeds.append(seed)

    def _train(self, score: Score, seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            model = train(self.settings(score.variant, seed, Path(folder)), quiet=True)
        mean = evaluate.mean(evaluate.evaluate(evaluate.of_model(model), self.held_out))
        score.psnr[seed], score.ssim[seed] = mean.psnr, mean.ssim
        counts = checkpoint.sparsity(model)
        score.kept = counts["weights"] - counts["zeros"]

    def settings(self, variant: Variant, seed: int, folder: Path):
        """The demo's configuration (`issp.sr.config.Config`) with this variant's pruning."""

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
                    n=keep.n, of=keep.of, v=keep.v, layout=keep.layout, c=keep.c
                )
            if variant.unit:
                settings.sparsity.unit = config.Unit(v=variant.unit.v, c=variant.unit.c)
        return settings

    def against_unstructured(self, score: Score) -> list[float]:
        """Per seed: PSNR less that of unstructured pruning to the same sparsity, in dB."""
        control = _unstructured(score.variant.sparsity)
        other = next(x for x in self.scores if x.variant.name == control)
        return [score.psnr[seed] - other.psnr[seed] for seed in self.seeds]

    def table(self) -> Table:
        """The table, and what has to be known to read or repeat it."""
        db, signed = "{:.2f}".format, "{:+.2f}".format
        columns = [Column("what", "what"), Column("kept", "kept weights", format="{:,.0f}".format)]
        columns += [Column(f"psnr {s}", f"PSNR, seed {s}", format=db) for s in self.seeds]
        columns += [
            Column("mean", "mean", format=db),
            Column("ssim", "SSIM", format="{:.4f}".format),
        ]
        columns += [Column("against", "against unstructured, dB")]
        bicubic = {"what": "bicubic", "mean": self.bicubic.psnr, "ssim": self.bicubic.ssim}
        rows = [Row(bicubic)]
        for score in self.scores:
            psnr, ssim = ([x[seed] for seed in self.seeds] for x in (score.psnr, score.ssim))
            cells = {"what": score.variant.name, "kept": score.kept}
            cells |= {f"psnr {seed}": score.psnr[seed] for seed in self.seeds}
            cells |= {"mean": statistics.mean(psnr), "ssim": statistics.mean(ssim)}
            if score.variant.pattern:
                apart = self.against_unstructured(score)
                extremes = f"({signed(min(apart))} to {signed(max(apart))})"
                cells["against"] = f"{signed(statistics.mean(apart))} {extremes}"
            rows.append(Row(cells))
        title = f"PSNR by pattern: {demo.MODEL} x{demo.SCALE}, {self.iterations} steps"
        return Table(title, self.machine, columns, rows, self._notes())

    def _notes(self) -> list[str]:
        sparse = next((x.variant for x in self.scores if x.variant.sparsity), None)
        freeze = self.settings(sparse, 0, Path()).sparsity.freeze_iter if sparse else 0
        patterns = " ".join(x.variant.keep.written for x in self.scores if x.variant.keep)
        units = dict.fromkeys(x.variant.unit.name for x in self.scores if x.variant.unit)
        asked = f" --units {' '.join(units)}" if units else ""
        seeds = " ".join(map(str, self.seeds))
        notes = [
            f"`python -m bench accuracy --pattern {patterns}{asked} --iters {self.iterations} "
            f"--seeds {seeds} --threads {torch.get_num_threads()}` repeats it. "
            "PSNR in dB and SSIM: Y channel, mean of "
            f"{', '.join(self.held_out.pairs.names)}, which no training sees.",
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
        if any(x.variant.keep and x.variant.keep.layout == "flat" for x in self.scores):
            notes.append(
                'Layout "flat" groups weights that are neighbours in memory: `issp train` keeps '
                "them channels_last, so neighbours are the input channels of a kernel position."
            )
        return notes
