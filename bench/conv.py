"""Sparse convolutions, forward and training step, against dense ones of every precision and layout.

All prunable convolutions of the networks at the size they have for a low-resolution image, or given
shapes; unstructured and N:M weights. Every packed weight is compared with float64 first; if its
error is more than twice that of dense, no figure of the layer is printed and the exit status is 1.
"""

from __future__ import annotations

import argparse

from bench.sparse import measure

EXAMPLE = """examples:
  python -m bench conv --model edsr-l --size 48 --threads 1 2 --plot conv.png
  python -m bench conv --shape 256x256x3x3 --size 48 --sparsity 0.9 0.95 --v 1 4 --passes forward
  python -m bench conv --shape 256x256x3x3 --size 48 --precisions fp32 fp16 --passes forward
  python -m bench conv --must-show"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench conv`."""
    measure.add_arguments(parser, conv=True)
    parser.add_argument(
        "--must-show",
        action="store_true",
        help="the table of targets instead: three layers at 90, 95 and 99 %%",
    )


def run(args: argparse.Namespace) -> None:
    """See `bench.sparse.measure.run`."""
    measure.run(args, conv=True)
