"""`issp bench`: runs the benchmarks of a checkout; an installed package does not have them."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

HELP = "measure the kernels beside other implementations on this machine (in a checkout)"
EXAMPLE = "issp bench optim --model swinir-light --quick"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command: all of them are those of `python -m bench`."""
    parser.add_argument("rest", nargs=argparse.REMAINDER, metavar="BENCHMARK [OPTIONS]")


def main(args: argparse.Namespace) -> int:
    """Runs `python -m bench` of the checkout that this package is imported from.

    Raises:
        ValueError: the package is not part of a checkout.
    """
    root = Path(__file__).resolve().parents[2]
    if not (root / "bench" / "__main__.py").is_file():
        raise ValueError(
            "the benchmarks are not part of the installed package: clone the repository and run "
            "`python -m bench` there"
        )
    # `python -m` would take a bench.py of the user's working folder first.
    run = (
        "import runpy, sys; sys.path[0] = sys.argv.pop(1); "
        "runpy.run_module('bench', run_name='__main__')"
    )
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", run, str(root), *args.rest]
    return subprocess.call(command, env={**os.environ, "PYTHONPATH": path})
