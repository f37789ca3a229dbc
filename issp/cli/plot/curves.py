"""`issp plot RUN`, `issp plot curves RUN`."""

from __future__ import annotations

import argparse

from issp.utils.files import check_folder, user_path

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

    runs = common.named_paths(args.runs, "DIR")
    out = user_path(args.out) if args.out else None
    places = {
        name: out / (name if len(runs) > 1 else "") if out else user_path(run) / "visualization"
        for name, run in runs.items()
    }
    logs = {name: plots.read_logs(run) for name, run in runs.items()}
    for place in places.values():
        check_folder(place)
    for name in runs:
        for path in plots.draw_logs(logs[name], places[name]):
            print(path)
    return 0
