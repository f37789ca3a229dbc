"""Shared by the figures of several runs: their arguments."""

from __future__ import annotations

import argparse

from issp.cli import common


def add_arguments(parser: argparse.ArgumentParser, figure: str, layers: str) -> None:
    """Runs, layers, and where the picture goes.

    Args:
        parser: of the command.
        figure: its name, of the file too.
        layers: what is drawn without --layers.
    """
    parser.add_argument(
        "runs",
        metavar="[NAME=]RUN",
        nargs="+",
        help="folder of a run, and its name in the picture (default: that of the folder)",
    )
    parser.add_argument(
        "--layers",
        nargs="+",
        metavar="LAYER",
        default=[],
        help=f"names, name patterns such as 'body.*.conv1', or indices (default: {layers})",
    )
    parser.add_argument(
        "--index-base",
        type=int,
        choices=(0, 1),
        default=1,
        help="index of the first layer (default: 1); the paper does not say its own",
    )
    common.add_picture_argument(parser, f"{figure}.png")
