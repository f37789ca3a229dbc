"""`issp prepare-data`."""

from __future__ import annotations

import argparse

HELP = "make bicubic low-resolution images (and crops) of a folder of originals"
EXAMPLE = "issp prepare-data DIV2K_train_HR --out data/DIV2K --scales 2 3 4 --crop-size 480"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of the command."""
    parser.add_argument("hr", metavar="HR_FOLDER", help="folder of original images")
    parser.add_argument("--out", "-o", required=True, metavar="DIR", help="gets HR, LR_bicubic/X4")
    parser.add_argument("--scales", type=int, nargs="+", default=[2, 3, 4], metavar="S")
    parser.add_argument("--crop-size", type=int, metavar="PX", help="cut crops of this side")
    parser.add_argument("--step", type=int, metavar="PX", help="distance between crops")
    parser.add_argument(
        "--thresh-size", type=int, default=0, metavar="PX", help="pixels a crop may omit"
    )
    parser.add_argument(
        "--small", choices=("error", "skip"), default="error", help="images below the crop size"
    )
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="threads")


def main(args: argparse.Namespace) -> int:
    """Writes the data set; a repeated call continues where an interrupted one stopped."""
    from issp.cli.common import item_progress
    from issp.sr import data

    with item_progress("images") as progress:
        names = ("scales", "crop_size", "step", "thresh_size", "small", "workers")
        options = {name: getattr(args, name) for name in names}
        result = data.prepare(args.hr, args.out, **options, progress=progress)
    print(
        f"{args.out}: {result.images} images from {result.sources} originals "
        f"({result.resumed} were finished before, {len(result.skipped)} too small)"
    )
    return 0
