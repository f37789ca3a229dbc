"""Whole trainings by the driver: two stages with fine-tuning sparse or masked, beside dense ones.

Every seed trains the network three times: dense; by ISS-P, one fifth of the iterations pruning and
the rest fine-tuning with masked dense layers; and the same with `sparsity.accelerate`. The wall
time is that of all iterations (data, optimizer and pruning included, validation and files not);
PSNR is that of the luma channel on the validation images.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.harness import options
from bench.harness.machine import machine_line
from bench.harness.table import Column, Row, Table
from issp.sr import config, logging, models
from issp.sr.train import train
from issp.utils import denormals
from issp.utils.files import user_path

EXAMPLE = """example:
  python -m bench whole-run --train datasets/BSDS400 --val datasets/benchmarks/Set5 --threads 2"""
_PRUNING_SHARE = 0.2
# Name of each way -> its `sparsity` section; "ratio" and "freeze_iter" are added.
WAYS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "ISS-P, then masked": {"accelerate": False},
    "ISS-P, then sparse": {"accelerate": True},
}


@dataclass
class Outcome:
    """The trainings of one way: seed -> seconds, PSNR in dB, seconds of a last iteration."""

    seconds: dict[int, float] = field(default_factory=dict)
    psnr: dict[int, float] = field(default_factory=dict)
    iteration: dict[int, float] = field(default_factory=dict)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench whole-run`."""
    parser.add_argument("--train", type=user_path, required=True, help="folder of HR images")
    parser.add_argument("--val", type=user_path, required=True, help="folder of HR images")
    parser.add_argument("--model", choices=models.names(), default="edsr-baseline")
    parser.add_argument("--scale", type=int, default=2, choices=(2, 3, 4), help="default 2")
    parser.add_argument("--batch", type=int, default=8, help="images; default 8")
    parser.add_argument("--patch", type=int, default=48, help="LR pixels; default 48")
    parser.add_argument("--iters", type=int, default=500, help="default 500")
    parser.add_argument("--sparsity", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="default 0 1")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    parser.add_argument("--out", type=user_path, help="also write the table to this .md file")


def run(args: argparse.Namespace) -> None:
    """Trains and prints the table.

    Raises:
        ValueError: an argument out of range, or images that cannot be read.
    """
    options.at_least_one(args, "batch", "patch", "threads")
    options.check_sparsities([args.sparsity])
    options.folders_exist(args.out)
    if args.iters < 5:
        raise ValueError(f"--iters is {args.iters}: use at least 5, one of which prunes")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    denormals.flush_denormals()
    machine, outcomes = machine_line("cpu"), {name: Outcome() for name in WAYS}
    order = random.Random(0)
    for seed in args.seeds:
        ways = list(WAYS)
        order.shuffle(ways)
        for way in ways:
            _train(args, way, seed, outcomes[way])
            done = outcomes[way]
            print(f"{way}, seed {seed}: {done.seconds[seed]:.1f} s, {done.psnr[seed]:.2f} dB")
    result = table(args, machine, outcomes)
    print(result.markdown(), flush=True)
    if args.out:
        args.out.write_text(result.markdown())


def _train(args: argparse.Namespace, way: str, seed: int, outcome: Outcome) -> None:
    """One training in a folder of its own, which is removed."""
    with tempfile.TemporaryDirectory() as folder:
        settings = config.parse(tree(args, way, seed, Path(folder)))
        train(settings, quiet=True)
        rows = logging.read_csv(settings.folder / "log" / "train.csv")
    counted = zip(rows, _counts(rows), strict=True)
    outcome.seconds[seed] = sum(row["seconds"] * count for row, count in counted)
    outcome.psnr[seed], outcome.iteration[seed] = rows[-1]["psnr"], rows[-1]["seconds"]


def _counts(rows: Sequence[dict[str, Any]]) -> list[int]:
    """How many iterations each row of the log sums up."""
    ends = [0, *(int(row["iteration"]) for row in rows)]
    return [b - a for a, b in zip(ends, ends[1:], strict=False)]


def tree(args: argparse.Namespace, way: str, seed: int, folder: Path) -> dict[str, Any]:
    """The configuration of a training, as nested mappings."""
    freeze = max(1, int(args.iters * _PRUNING_SHARE))
    own = WAYS[way]
    sparsity = (
        {} if own is None else {"sparsity": {"ratio": args.sparsity, "freeze_iter": freeze, **own}}
    )
    return {
        "name": "run",
        "scale": args.scale,
        "manual_seed": seed,
        "device": "cpu",
        "network_g": {"type": args.model},
        "path": {"experiments_root": str(folder)},
        "datasets": {
            "train": {
                "dataroot_gt": str(args.train),
                "gt_size": args.patch * args.scale,
                "batch_size_per_gpu": args.batch,
            },
            "val": {"name": "val", "dataroot_gt": str(args.val)},
        },
        "train": {
            "total_iter": args.iters,
            "optim_g": {"type": "Adam", "lr": 2e-4, "betas": [0.9, 0.99]},
            "scheduler": {"type": "MultiStepLR", "milestones": [0.5, 0.8, 0.95], "gamma": 0.5},
        },
        **sparsity,
        "val": {"val_freq": args.iters, "metrics": {"psnr": {"test_y_channel": True}}},
        "logger": {
            "print_freq": max(1, args.iters // 20),
            "save_checkpoint_freq": args.iters,
            "use_tb_logger": False,
        },
    }


def table(args: argparse.Namespace, machine: str, outcomes: dict[str, Outcome]) -> Table:
    """A row for each way: times over the dense training of the same seed, and PSNR."""
    columns = [
        Column("what", "what"),
        Column("seconds", "seconds"),
        Column("over", "over dense", format=lambda x: f"{x:.3f}"),
        Column("iteration", "last iterations", "ms"),
        Column("psnr", "PSNR"),
        Column("spread", "seeds"),
    ]
    dense, rows = outcomes["dense"], []
    for way, outcome in outcomes.items():
        over = [outcome.seconds[seed] / dense.seconds[seed] for seed in outcome.seconds]
        values = list(outcome.psnr.values())
        cells = {
            "what": way,
            "seconds": statistics.median(outcome.seconds.values()),
            "over": statistics.median(over),
            "iteration": statistics.median(outcome.iteration.values()),
            "psnr": f"{statistics.mean(values):.3f}",
            "spread": ", ".join(f"{x:.3f}" for x in values),
        }
        rows.append(Row(cells))
    freeze = max(1, int(args.iters * _PRUNING_SHARE))
    title = (
        f"{args.model} x{args.scale}, {args.iters} iterations, {freeze} of them pruning, batch "
        f"{args.batch}, patch {args.patch} (LR), sparsity {args.sparsity:g}"
    )
    notes = [
        "By `issp train`: data, forward, backward, optimizer, pruning and logs; medians of the "
        f"seeds {', '.join(map(str, args.seeds))}, in another order each. PSNR: Y channel, "
        f"{args.val.name}, of the network in its final form."
    ]
    return Table(title, machine, columns, rows, notes)
