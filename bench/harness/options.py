"""What the benchmarks' command lines share: where to run, for how long, what to write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.table import Table
from issp import ops
from issp.utils.files import atomic_write, check_file, user_path

NO_CUDA = "torch sees no CUDA device: use --device cpu"


def add_arguments(parser: argparse.ArgumentParser, seconds: str) -> None:
    """Adds the shared options.

    Args:
        parser: of one benchmark.
        seconds: help of its --seconds.
    """
    parser.add_argument("--scale", type=int, default=4, choices=(2, 3, 4))
    parser.add_argument("--sparsity", type=float, default=0.95, help="default 0.95")
    parser.add_argument("--shrink", type=float, default=0.95, help="factor alpha, default 0.95")
    parser.add_argument("--threads", type=int, help="CPU threads; default: torch's")
    add_pace(parser, seconds)


def add_pace(parser: argparse.ArgumentParser, seconds: str) -> None:
    """Adds where to run, for how long, and what to write; the arguments are `add_arguments`'s."""
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--seconds", type=float, help=seconds)
    parser.add_argument("--quick", action="store_true", help="fewer repetitions")
    parser.add_argument("--out", type=user_path, help="also write the tables to this .md file")
    parser.add_argument("--plot", type=user_path, help="also draw them into this .png file")
    parser.add_argument("--samples", type=user_path, help="also write every measured time, .json")


def apply(args: argparse.Namespace) -> None:
    """Refuses what cannot work, before anything takes time; sets the number of threads.

    Raises:
        ValueError: an argument out of range, no GPU for --device cuda, or no such folder.
    """
    check_pace(args)
    if not 0.0 <= args.shrink <= 1.0:
        raise ValueError(f"--shrink is {args.shrink}: it must lie in 0..1")
    ops.num_pruned(1, args.sparsity)
    at_least_one(args, "threads")
    if args.threads is not None:
        torch.set_num_threads(args.threads)


def check_pace(args: argparse.Namespace) -> None:
    """Checks the options of `add_pace`.

    Raises:
        ValueError: no GPU for --device cuda, no time to measure, or no such folder.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(NO_CUDA)
    if args.seconds is not None and not args.seconds > 0:
        raise ValueError(f"--seconds is {args.seconds}: it must be above 0")
    folders_exist(args.out, args.plot, args.samples)


def folders_exist(*paths: Path | None) -> None:
    """Checks where files will be written.

    Raises:
        ValueError: a path lies in no folder.
        OSError: see `check_file`.
    """
    for path in filter(None, paths):
        if not path.parent.is_dir():
            raise ValueError(f"the folder of {path} does not exist: create {path.parent}")
        check_file(path)


def at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Checks options that count something.

    Raises:
        ValueError: one of them is given and below 1.
    """
    for name in names:
        value = getattr(args, name)
        check_counts(f"--{name}", None if value is None else [value])


def check_counts(option: str, values: Sequence[int] | None) -> None:
    """Checks an option that takes several counts.

    Raises:
        ValueError: one of them is below 1.
    """
    if values and min(values) < 1:
        raise ValueError(f"{option} is {min(values)}: use at least 1")


def check_sparsities(values: Sequence[float] | None) -> None:
    """Checks the values of --sparsity where it takes several.

    Raises:
        ValueError: one of them does not lie between 0 and 1.
    """
    for value in values or ():
        if not 0.0 < value < 1.0:
            raise ValueError(f"--sparsity is {value}: it must lie between 0 and 1")


def overrides(
    args: argparse.Namespace, names: Sequence[str], quick: dict[str, Any]
) -> dict[str, Any]:
    """Settings that the options change.

    Args:
        args: the options.
        names: of the options that are settings of the same name; those not used are left out.
        quick: what --quick sets where no option does.
    """
    used = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return {**(quick if args.quick else {}), **used}


def write_outputs(
    args: argparse.Namespace, tables: Sequence[Table], plot: Callable[[Path], None]
) -> None:
    """Writes the files that --out, --plot and --samples ask for, each whole or not at all.

    Args:
        args: the options.
        tables: printed already.
        plot: draws the picture into a file.
    """
    if args.out:
        atomic_write(args.out, "\n".join(table.markdown() for table in tables).encode())
    if args.samples:
        text = json.dumps([table.record() for table in tables], indent=1)
        atomic_write(args.samples, text.encode())
    if args.plot:
        plot(args.plot)
