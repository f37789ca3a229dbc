"""`issp demo`."""

from __future__ import annotations

import argparse

from issp.cli.common import name_crowding
from issp.utils.files import user_path

HELP = "train a 90 % sparse network in minutes on a CPU and compare it with bicubic"
EXAMPLE = "issp demo --minutes 2 --dense --out runs/demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    out = "runs/demo"
    parser.add_argument("--out", "-o", default=out, metavar="DIR", help=f"default: {out}")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--iters", type=int, metavar="N", help="iterations (default: fixed)")
    length.add_argument(
        "--minutes", type=float, metavar="M", help="time for each training; sets the iterations"
    )
    parser.add_argument("--dense", action="store_true", help="also train it without pruning")
    parser.add_argument("--sparsity", type=float, default=0.9, metavar="X", help="default: 0.9")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")


def main(args: argparse.Namespace) -> int:
    """Trains, prints one table, leaves a model and two pictures."""
    from issp.sr.demo import Options, run

    name_crowding(args)
    options = {name: getattr(args, name) for name in ("minutes", "dense", "sparsity", "seed")}
    run(Options(user_path(args.out), args.iters, **options))
    return 0
