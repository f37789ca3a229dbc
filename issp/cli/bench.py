"""`issp bench`: the benchmarks live in issp.bench."""

from __future__ import annotations

import argparse

HELP = "measure the kernels and their peers on this machine"
EXAMPLE = "issp bench optim --model swinir-light --quick"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    from issp import bench

    bench.add_arguments(parser)


def main(args: argparse.Namespace) -> int:
    """Runs the benchmarks."""
    from issp import bench

    return bench.main(args)
