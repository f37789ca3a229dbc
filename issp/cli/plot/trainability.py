"""`issp plot trainability`."""

from __future__ import annotations

import argparse

from issp.cli import common
from issp.cli.plot import runs

HELP = "figure 1: norm and variance of layers' gradients in several runs"
EXAMPLE = (
    "issp train configs/train_issp_swinir_light_x4.yml --set logger.grad_stats_freq=100\n"
    "  issp plot trainability ISS-P=experiments/issp IHT=experiments/iht --layers conv_first 36"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    middle = "the convolution and the linear layer in the middle"
    runs.add_arguments(parser, "trainability", middle)


def main(args: argparse.Namespace) -> int:
    """Writes the picture and prints its path."""
    from issp.sr import plots

    path = common.picture_path(args.out, "trainability.png")
    common.check_output("--out", path)
    folders = common.named_paths(args.runs, "DIR")
    plots.draw_trainability(folders, path, args.layers, args.index_base)
    print(path)
    return 0
