"""`issp plot dynamics`."""

from __future__ import annotations

import argparse

from issp.cli import common
from issp.cli.plot import runs

HELP = "figure 2: how many weights change class per iteration in several runs"
EXAMPLE = (
    "issp train configs/train_issp_swinir_light_x4.yml --set logger.mask_stats_freq=100\n"
    "  issp plot dynamics ISS-P=experiments/issp IHT=experiments/iht --layers 1 3 36 80"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    paper = "the paper's 1 3 36 80; where a network has fewer, four over its depth"
    runs.add_arguments(parser, "dynamics", paper)


def main(args: argparse.Namespace) -> int:
    """Writes the picture, prints its path and a table of mean flips."""
    from issp.sr import plots
    from issp.utils.text import table

    path = common.picture_path(args.out, "dynamics.png")
    common.check_output("--out", path)
    folders = common.named_paths(args.runs, "DIR")
    found = plots.draw_dynamics(folders, path, args.layers, args.index_base)
    print(f"{path}\n\nmean flips per iteration of the pruning stage:\n")
    header = ["run", *found[0].layers, "all recorded layers", "% of weights"]
    rows = [
        [
            activity.label,
            *(f"{mean:.4g}" for mean in activity.layers.values()),
            f"{activity.total:.4g}",
            "" if activity.share is None else f"{100 * activity.share:.3g}",
        ]
        for activity in found
    ]
    print(table(header, rows))
    return 0
