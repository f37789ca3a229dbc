"""Sparse linear layers, forward and training step, against dense ones of every precision.

All prunable linear layers of the networks with as many tokens as they see for a low-resolution
image, or given shapes; unstructured and N:M weights. Every packed weight is compared with float64
first; if its error is more than twice that of dense, no figure of the layer is printed and the exit
status is 1.
"""

from __future__ import annotations

import argparse

from bench.sparse import measure

EXAMPLE = """examples:
  python -m bench matmul --model swinir-light --size 64 --threads 1 2 --plot matmul.png
  python -m bench matmul --shape 180x60 256x256 --size 48 --sparsity 0.9 0.99 --v 4 --passes step"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `python -m bench matmul`."""
    measure.add_arguments(parser, conv=False)


def run(args: argparse.Namespace) -> None:
    """See `bench.sparse.measure.run`."""
    measure.run(args, conv=False)
