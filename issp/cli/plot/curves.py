"""`issp plot RUN`, `issp plot curves RUN`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "PSNR, loss, rate, flips, thresholds, gradients and sparsity per layer; `issp plot RUN`"
EXAMPLE = "issp plot experiments/tiny -o pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="folder of a run, such as experiments/tiny"
    )
    parser.add_argument(
        "--out",
        "-o",
        metavar="DIR",
        help="default: RUN/visualization; of several runs, each gets a folder of its name there",
    )


def main(args: argparse.Namespace) -> int:
    """Writes the pictures and prints their paths."""
    from issp.cli import common
    from issp.sr import plots

    for name, run in common.named_paths(args.runs, "DIR").items():
        out = args.out and (Path(args.out) / name if len(args.runs) > 1 else args.out)
        for path in plots.of_run(run, out):
            print(path)
    return 0
