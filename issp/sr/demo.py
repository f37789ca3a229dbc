"""The demo: trains a sparse network on a CPU in minutes, on real photographs.

edsr-tiny x2 is trained from random initialisation by ISS-P on the sample photographs of the train
split and compared with bicubic interpolation on the photographs of the test split.
"""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from issp.sr import builders, checkpoint, config, data, evaluate, logging, metrics, plots
from issp.sr.config import Config
from issp.sr.run_folder import RunFolder
from issp.sr.timing import seconds_per_iteration
from issp.sr.train import train
from issp.utils import denormals
from issp.utils.errors import ConfigError
from issp.utils.text import table

SCALE, MODEL, BATCH, PATCH, LEARNING_RATE = 2, "edsr-tiny", 8, 64, 1e-3
ITERATIONS = 3000  # under three minutes on two idle cores
_CROP = 96


@dataclass(frozen=True)
class Options:
    """Options of `issp demo`.

    Args:
        out: folder of the results.
        iterations: of training; None: `ITERATIONS`, or what fits into `minutes`.
        minutes: time for each training.
        dense: also train the same network without pruning.
        sparsity: share of each layer's weights to prune.
        seed: of all random numbers.
    """

    out: Path
    iterations: int | None = None
    minutes: float | None = None
    dense: bool = False
    sparsity: float = 0.9
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One line of the demo's table."""

    name: str
    scores: list[evaluate.Score]
    kept: str = ""
    update_share: str = ""

    def cells(self) -> list[str]:
        """As text."""
        mean = evaluate.mean(self.scores)
        return [self.name, f"{mean.psnr:.2f}", f"{mean.ssim:.4f}", self.kept, self.update_share]


def run(options: Options) -> list[Row]:
    """Trains, prints one table, writes model.safetensors, curves.png and comparison.png.

    Returns:
        The rows of the table: bicubic, ISS-P and, with `dense`, the dense twin.
    """
    if options.minutes is not None and not 0 < options.minutes < math.inf:  # NaN is refused as well
        raise ConfigError(f"--minutes is {options.minutes}: it must be positive, such as 4")
    started = time.perf_counter()
    denormals.flush_denormals()
    iterations = ITERATIONS if options.iterations is None else options.iterations
    if options.minutes is not None:
        iterations = fitting_iterations(options)
    photographs = data.PairedArrays(data.sample_photographs("test"), SCALE)
    held_out = data.EvalDataset(photographs, in_memory=True)
    cubic = evaluate.evaluate(evaluate.bicubic(SCALE), held_out)
    rows = [Row("bicubic", cubic)]
    pruned = settings(options, "iss-p", iterations, options.sparsity)
    sparse, row = _train(pruned, held_out)
    rows.append(row)
    if options.dense:
        rows.append(_train(settings(options, "dense", iterations, None), held_out)[1])

    checkpoint.save(sparse, options.out / "model.safetensors", iteration=iterations)
    log = logging.read_csv(options.out / "iss-p" / "log" / "train.csv")
    title = f"{MODEL} x{SCALE}, ISS-P at {100 * options.sparsity:g} % sparsity"
    bicubic = evaluate.mean(cubic).psnr
    plots.curves(log, options.out / "curves.png", title, bicubic, pruned.freeze_iter)
    label = f"ISS-P, {100 * options.sparsity:g} % zeros"
    plots.comparison(_sheets(sparse, label, held_out), options.out / "comparison.png")

    names = ", ".join(held_out.pairs.names)
    print(f"\nx{SCALE} on photographs not trained on ({names}), Y channel:\n")
    header = ["", "PSNR", "SSIM", "kept weights", "optimizer step incl. pruning"]
    print(table(header, [row.cells() for row in rows]))
    minutes = (time.perf_counter() - started) / 60
    print(
        f"\n{minutes:.1f} minutes; see {options.out}: model.safetensors, curves.png, comparison.png"
    )
    return rows


def settings(
    options: Options, name: str, iterations: int, sparsity: float | None, validation: bool = True
) -> Config:
    """The configuration of one of the demo's trainings.

    Args:
        options, name, iterations: of the demo, of the run, of the training.
        sparsity: share of each layer's weights to prune; None: dense training.
        validation: score the held-out photographs during the training.
    """
    freeze = max(1, iterations * 2 // 5)
    tree: dict[str, Any] = {
        "name": name,
        "scale": SCALE,
        "manual_seed": options.seed,
        "device": "cpu",
        "network_g": {"type": MODEL},
        "path": {"experiments_root": str(options.out)},
        "datasets": {
            "train": {"type": "SamplePhotographs", "gt_size": PATCH, "batch_size_per_gpu": BATCH},
            "val": {"name": "held-out", "type": "SamplePhotographs"},
        },
        "train": {
            "total_iter": iterations,
            "warmup_iter": min(50, iterations // 10),
            "optim_g": {"lr": LEARNING_RATE, "betas": [0.9, 0.99]},
            "scheduler": {
                "type": "CosineAnnealingRestartLR",
                "periods": [iterations - (0 if sparsity is None else freeze) or 1],
                "eta_min": LEARNING_RATE / 100,
            },
        },
        "val": {"val_freq": max(1, iterations // 20)},
        "logger": {
            "print_freq": max(1, iterations // 100),
            "save_checkpoint_freq": iterations,
            "use_tb_logger": False,
        },
    }
    if not validation:
        del tree["datasets"]["val"]
    if sparsity is not None:
        tree["sparsity"] = {"method": "iss-p", "ratio": sparsity, "freeze_iter": freeze}
    return config.parse(tree)


def fitting_iterations(options: Options, probe: int = 12) -> int:
    """How many iterations fit into `options.minutes`, from a few timed ones.

    Args:
        probe: iterations to time, after three that warm up.
    """
    trial = settings(options, "probe", 1000, options.sparsity)
    batches = builders.loader(trial, pin_memory=False)
    each = seconds_per_iteration(trial, torch.device("cpu"), batches, probe)
    # The rest goes to validation, of two models while pruning.
    return max(20, int(0.86 * 60 * options.minutes / each))


def _train(settings: Config, held_out: data.EvalDataset) -> tuple[nn.Module, Row]:
    # A repeated demo replaces its own earlier run, but not one that runs.
    earlier = RunFolder(settings.folder)
    if settings.folder.is_dir():
        earlier.claim()
        earlier.release()
    shutil.rmtree(settings.folder, ignore_errors=True)
    model = train(settings)
    scores = evaluate.evaluate(evaluate.of_model(model), held_out)
    counts = checkpoint.sparsity(model)
    kept = counts["weights"] - counts["zeros"]
    rows = logging.read_csv(settings.folder / "log" / "train.csv")
    pruning = [r for r in rows if r["stage"] == "pruning"]
    rows = pruning or rows
    share = sum(r["update_share"] * r["seconds"] for r in rows) / sum(r["seconds"] for r in rows)
    name = f"ISS-P, {100 * settings.sparsity.ratio:g} %" if settings.sparsity else "dense twin"
    return model, Row(name, scores, f"{kept:,} of {counts['weights']:,}", f"{100 * share:.1f} %")


def _sheets(model: nn.Module, label: str, held_out: data.EvalDataset) -> list[list[plots.Panel]]:
    """For every photograph the window with the most detail; PSNR is of the whole image."""
    sheets = []
    upscalers = {"bicubic": evaluate.bicubic(SCALE), label: evaluate.of_model(model)}
    for i, name in enumerate(held_out.pairs.names):
        lr, hr = held_out.load(i)
        top, left = plots.busiest(hr, _CROP, SCALE, border=8)
        window = np.s_[top : top + _CROP, left : left + _CROP]
        y, x, side = top // SCALE, left // SCALE, _CROP // SCALE
        panels = [plots.Panel("low resolution", lr[y : y + side, x : x + side], name)]
        for title, upscaler in upscalers.items():
            sr = upscaler(lr)
            psnr = metrics.psnr(sr, hr, SCALE)
            panels.append(plots.Panel(title, sr[window], f"{psnr:.2f} dB (whole image)"))
        sheets.append([*panels, plots.Panel("original", hr[window], "")])
    return sheets
