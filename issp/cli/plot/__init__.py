"""`issp plot`: the curves of runs, or one of the paper's figures."""

from __future__ import annotations

import argparse
import importlib
from types import ModuleType

from issp import cli

HELP = "draw a run's curves, or a figure of the paper: trainability, dynamics, crops"
EXAMPLE = (
    "issp plot experiments/tiny -o pictures\n"
    "  issp plot trainability ISS-P=experiments/issp IHT=experiments/iht\n"
    "  issp plot dynamics --help"
)
COMMANDS = ("curves", "trainability", "dynamics", "crops")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The figures as sub-commands; without one it is `curves`."""
    cli.add_subcommands(parser, "figure", {name: subcommand(name) for name in COMMANDS})


def subcommand(name: str) -> ModuleType:
    """The module of a figure."""
    return importlib.import_module(f"{__name__}.{name}")


def main(args: argparse.Namespace) -> int:
    """Draws the figure that was asked for."""
    return subcommand(args.figure_command).main(args)
