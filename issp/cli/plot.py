"""`issp plot`."""

from __future__ import annotations

import argparse

HELP = "draw a run's PSNR, loss, rate, flips, thresholds, gradients and its sparsity per layer"
EXAMPLE = "issp plot experiments/tiny -o pictures"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("run", metavar="RUN", help="folder of a run, such as experiments/tiny")
    parser.add_argument("--out", "-o", metavar="DIR", help="default: RUN/visualization")


def main(args: argparse.Namespace) -> int:
    """Writes the pictures and prints their paths."""
    from issp.sr import plots

    for path in plots.of_run(args.run, args.out):
        print(path)
    return 0
